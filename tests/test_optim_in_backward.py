"""Steps inside the backward pass."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import fused
from fused.optim import step_after_backward, step_in_backward

CLASSES = [fused.Adam, fused.AdamW, fused.SGD]
OPTIONS: dict[type, dict[str, Any]] = {
    fused.Adam: {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True},
    fused.AdamW: {"lr": 0.05},
    fused.SGD: {"lr": 0.05, "momentum": 0.9, "dampening": 0.1},
}


def model(device: torch.device | str = "cpu") -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(device)


def backward(network: nn.Module, step: int) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    network(x.to(next(network.parameters()).device)).square().sum().backward()


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(network, step)
        optimizer.step()
        optimizer.zero_grad()


def assert_same(
    a: tuple[nn.Module, torch.optim.Optimizer], b: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    """Bit for bit: parameters, states and options."""
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(p, q)
    first, second = a[1].state_dict(), b[1].state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for key, entry in first["state"].items():
        assert entry.keys() == second["state"][key].keys()
        assert all(torch.equal(value, second["state"][key][n]) for n, value in entry.items())


@pytest.mark.parametrize("cls", CLASSES)
def test_as_the_ordinary_step(cls: type, backend: torch.device) -> None:
    ordinary = model(backend)
    optimizer = cls(ordinary.parameters(), **OPTIONS[cls])
    train(ordinary, optimizer, range(4))
    inside = model(backend)
    inner = step_in_backward(inside, cls, **OPTIONS[cls])
    assert type(inner) is cls
    for step in range(4):
        backward(inside, step)
        assert all(p.grad is None for p in inside.parameters())
    assert_same((ordinary, optimizer), (inside, inner))


@pytest.mark.parametrize("kind", ["class", "factory", "made"])
def test_ways_to_say_which_optimizer(kind: str) -> None:
    def groups(network: nn.Sequential) -> list[dict[str, Any]]:
        return [{"params": network[0].parameters()}, {"params": network[2].parameters(), "lr": 0.3}]

    ordinary, inside = model(), model()
    if kind == "class":
        optimizer = fused.SGD(ordinary.parameters(), lr=0.1)
        inner = step_in_backward(inside, fused.SGD, lr=0.1)
    else:
        optimizer = fused.SGD(groups(ordinary), lr=0.1)
        if kind == "made":
            inner = step_in_backward(inside, fused.SGD(groups(inside), lr=0.1))
        else:
            inner = step_in_backward(inside, lambda _: fused.SGD(groups(inside), lr=0.1))
    train(ordinary, optimizer, range(2))
    train(inside, inner, range(2))
    assert_same((ordinary, optimizer), (inside, inner))


def test_one_gradient_at_a_time() -> None:
    """The peak of gradient memory: that of one parameter in the backward pass, of all without."""

    def peak(prepare: Callable[[nn.Module], object]) -> int:
        torch.manual_seed(0)
        network = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
        alive: list[weakref.ref[Tensor]] = []
        most = 0

        def watch(parameter: Tensor) -> None:
            nonlocal most
            alive.append(weakref.ref(parameter.grad))
            grads = [grad for ref in alive if (grad := ref()) is not None]
            most = max(most, sum(grad.nbytes for grad in grads))

        for p in network.parameters():
            p.register_post_accumulate_grad_hook(watch)  # runs ahead of the later ones
        prepare(network)
        network(torch.randn(2, 16)).sum().backward()
        assert len(alive) == 16
        return most

    assert peak(lambda network: None) == 8 * (16 * 16 + 16) * 4
    assert peak(lambda network: step_in_backward(network, fused.AdamW)) == 16 * 16 * 4


@pytest.mark.filterwarnings("error::UserWarning")  # schedulers warn where no step came before
def test_schedulers() -> None:
    ordinary, inside = model(), model()
    optimizer = fused.AdamW(ordinary.parameters(), lr=torch.tensor(0.1))
    inner = step_in_backward(inside, fused.AdamW, lr=torch.tensor(0.1))
    scheduler, inner_scheduler = StepLR(optimizer, 1, 0.5), StepLR(inner, 1, 0.5)
    for step in range(3):
        train(ordinary, optimizer, range(step, step + 1))
        scheduler.step()
        backward(inside, step)
        inner_scheduler.step()
    assert inner_scheduler.get_last_lr() == [0.0125]
    assert_same((ordinary, optimizer), (inside, inner))


@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_both_ways(cls: type) -> None:
    ordinary, inside = model(), model()
    optimizer = cls(ordinary.parameters(), **OPTIONS[cls])
    train(ordinary, optimizer, range(2))
    inner = step_in_backward(inside, cls)
    inside.load_state_dict(ordinary.state_dict())
    inner.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(ordinary, optimizer, range(2, 4))
    for step in range(2, 4):
        backward(inside, step)
    assert_same((ordinary, optimizer), (inside, inner))

    back = model()
    last = cls(back.parameters())
    back.load_state_dict(inside.state_dict())
    last.load_state_dict(copy.deepcopy(inner.state_dict()))
    train(back, last, range(4, 5))
    backward(inside, 4)
    assert_same((back, last), (inside, inner))


def test_frozen_tied_and_late_parameters() -> None:
    results = []
    for inside in (False, True):
        network = model()
        network.append(nn.Linear(3, 3))
        network.append(nn.Linear(3, 3))
        network[4].weight = network[3].weight
        network[0].weight.requires_grad_(False)
        optimizer = fused.AdamW(network.parameters(), lr=0.1)
        if inside:
            step_in_backward(network, optimizer)
        for step in range(3):
            if step == 1:
                network[0].weight.requires_grad_(True)
            if step == 2:
                network.append(nn.Linear(3, 3))
                optimizer.add_param_group({"params": network[-1].parameters(), "lr": 0.2})
            train(network, optimizer, range(step, step + 1))
        results.append((network, optimizer))
    assert_same(*results)


def test_undone() -> None:
    ordinary, inside = model(), model()
    optimizer = fused.AdamW(ordinary.parameters())
    inner = step_in_backward(inside, fused.AdamW)
    step_after_backward(inner)
    step_after_backward(inner)
    backward(inside, 0)
    assert all(p.grad is not None and not vars(p) for p in inside.parameters())
    inner.step()
    inner.zero_grad()
    train(ordinary, optimizer, range(1))
    assert_same((ordinary, optimizer), (inside, inner))
    step_in_backward(inside, inner)
    backward(inside, 1)
    train(ordinary, optimizer, range(1, 2))
    assert_same((ordinary, optimizer), (inside, inner))


def test_copies_and_pickles() -> None:
    network = model()
    optimizer = step_in_backward(network, fused.AdamW)
    backward(network, 0)
    copied = copy.deepcopy(network)
    backward(copied, 1)
    assert all(p.grad is not None for p in copied.parameters())
    assert not hasattr(pickle.loads(pickle.dumps(optimizer)), "_step_in_backward")
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with pytest.raises(RuntimeError, match="must be called again for a model that was pickled"):
        loaded[0].weight._in_backward_optimizers[0].step()
    inner = step_in_backward(loaded, fused.AdamW)
    inner.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    backward(loaded, 1)
    backward(network, 1)
    assert_same((loaded, inner), (network, optimizer))


def test_nothing_outlives_the_model() -> None:
    network = model()
    refs = [weakref.ref(step_in_backward(network, fused.AdamW)), weakref.ref(network[0].weight)]
    backward(network, 0)
    gc.collect()
    assert all(ref() is not None for ref in refs)
    del network
    gc.collect()
    assert all(ref() is None for ref in refs)


@pytest.mark.parametrize(
    "name, value",
    [("max_norm", 1.0), ("nonfinite", "skip"), ("nonfinite", "error"), ("differentiable", True)],
)
def test_refuses_what_needs_all_gradients(name: str, value: Any) -> None:
    network = model()
    optimizer = fused.SGD(network.parameters(), lr=0.1, **{name: value})
    with pytest.raises(ValueError, match=f"step_in_backward: {name} must be .*, got {value!r}"):
        step_in_backward(network, optimizer)
    step_in_backward(network, fused.SGD, lr=0.1)


def test_refusals() -> None:
    network = model()
    with pytest.raises(TypeError, match="optimizer must be a fused one, or make one, got AdamW"):
        step_in_backward(network, torch.optim.AdamW)
    optimizer = fused.AdamW(network.parameters())
    with pytest.raises(ValueError, match=r"options must be left out for an optimizer .*, got lr"):
        step_in_backward(network, optimizer, lr=0.1)
    step_in_backward(network, optimizer)
    with pytest.raises(ValueError, match="must not step in the backward pass already"):
        step_in_backward(network, optimizer)
    backward(network, 0)
    assert all(optimizer.state[p]["step"] == 1 for p in network.parameters())
