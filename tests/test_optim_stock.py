"""The optimizers in place of their stock twins: PyTorch's own samples, state, schedulers, AMP."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Counted
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

import fused
from fused import _load, _route
from fused.optim._options import OPTION_NAMES
from fused.testing import assert_as_accurate_as_stock

TWINS = {
    torch.optim.Adam: fused.Adam,
    torch.optim.AdamW: fused.AdamW,
    torch.optim.SGD: fused.SGD,
}
STOCK = {twin: stock for stock, twin in TWINS.items()}
INFOS = [info for info in optim_db if info.optim_cls in TWINS]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CLASSES = [fused.Adam, fused.AdamW, fused.SGD]
OPTIONS = {
    fused.Adam: {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True},
    fused.AdamW: {"lr": 0.05},
    fused.SGD: {"lr": 0.05, "momentum": 0.9, "dampening": 0.1},
}


def model(dtype: torch.dtype = torch.float32, device: Any = "cpu") -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(device, dtype)


def set_gradients(network: nn.Module, step: int) -> None:
    for i, p in enumerate(network.parameters()):
        generator = torch.Generator().manual_seed(1000 * step + i)
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def run(network: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterator[int] | range) -> None:
    for step in steps:
        set_gradients(network, step)
        optimizer.step()


def parameters(network: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach()


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Bit for bit, keys and all."""
    first, second = a.state_dict(), b.state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for key, entry in first["state"].items():
        assert entry.keys() == second["state"][key].keys()
        for name, value in entry.items():
            assert torch.equal(value, second["state"][key][name]), name


# --- PyTorch's own samples ------------------------------------------------------------------------


def samples(info: OptimizerInfo, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every sample with every one of foreach, fused, differentiable and capturable."""
    emulated = _route.kernels() is not _load.load()
    # The name of the device only chooses options: on CUDA, and so in the emulator, capturable too.
    device = "cuda" if emulated or torch.cuda.is_available() else "cpu"
    for sample in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info):
        yield dict(sample.kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("info", INFOS, ids=lambda i: i.optim_cls.__name__)
def test_pytorch_samples(
    info: OptimizerInfo, dtype: torch.dtype, backend: torch.device, counted: Counted
) -> None:
    listed = list(samples(info, dtype))
    for options in listed:
        if is_refused(info, options, dtype, backend):
            counted()
            continue
        plain = {k: v for k, v in options.items() if k not in ("capturable", "fused")}
        plain["foreach"] = False
        truth, stock, ours = model(torch.float64), model(dtype), model(dtype, backend)
        if dtype == torch.float64:
            stock = model(torch.float32)
        truth.load_state_dict(ours.state_dict())
        run_sample(info.optim_cls, truth, as_numbers(plain))
        run_sample(info.optim_cls, stock, plain)
        run_sample(TWINS[info.optim_cls], ours, options)
        results = (parameters(network) for network in (ours, truth, stock))
        assert_as_accurate_as_stock(*results, what=str(options))
        counted()
    assert counted.number == len(listed) > 10


def is_refused(
    info: OptimizerInfo, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether stock refuses the sample on this device, which ours then has to do too.

    With differentiable it is stock that makes the step, and it takes capturable on an accelerator
    only; the samples of CUDA have it, and run emulated.
    """
    if not (device.type == "cpu" and options.get("differentiable") and options.get("capturable")):
        return False
    for cls in (info.optim_cls, TWINS[info.optim_cls]):
        with pytest.raises(AssertionError, match="capturable=True, params and state_steps must be"):
            run_sample(cls, model(dtype, device), options)
    return True


def as_numbers(options: dict[str, Any]) -> dict[str, Any]:
    """Stock rounds what it works out of a float32 tensor to float32: no truth for float64."""
    if "betas" in options:
        options = {**options, "betas": tuple(float(beta) for beta in options["betas"])}
    return {k: v.item() if isinstance(v, Tensor) else v for k, v in options.items()}


def run_sample(cls: type, network: nn.Module, options: dict[str, Any]) -> None:
    if options.get("differentiable"):
        # Leaves cannot be changed in place where gradients are recorded: as in PyTorch's tests.
        params = [p.detach().clone() for p in network.parameters()]
        optimizer = cls(params, **options)
        for step in range(5):
            set_gradients(network, step)
            for p, q in zip(params, network.parameters(), strict=True):
                p.grad = q.grad
            optimizer.step()
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params), network.parameters())
    else:
        run(network, cls(network.parameters(), **options), range(5))


@pytest.mark.parametrize("info", INFOS, ids=lambda i: i.optim_cls.__name__)
def test_pytorch_error_samples(info: OptimizerInfo) -> None:
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        sample = error.optimizer_error_input
        params = sample.params
        if params is None:
            params = [torch.randn(2, requires_grad=True)]
        cls = TWINS[info.optim_cls]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
                if issubclass(error.error_type, Warning):
                    continue
                with pytest.raises(error.error_type, match=error.error_regex):
                    cls(params, **sample.kwargs)
            else:
                optimizer = cls(params, **sample.kwargs)
                with pytest.raises(error.error_type, match=error.error_regex):
                    optimizer.step()


@pytest.mark.parametrize("info", INFOS, ids=lambda i: i.optim_cls.__name__)
def test_schedulers(info: OptimizerInfo, backend: torch.device) -> None:
    """Every scheduler of PyTorch's own list for the class, with a number and a tensor for lr."""
    cls = TWINS[info.optim_cls]
    for makers in info.scheduler_inputs:
        for lr in (0.125, torch.tensor(0.125)):
            networks, learning_rates = [model(device=backend), model(device=backend)], []
            for network, kind in zip(networks, (cls, info.optim_cls), strict=True):
                optimizer = kind(network.parameters(), lr=copy.deepcopy(lr))
                schedulers = [make(optimizer) for make in makers]
                for step in range(8):
                    run(network, optimizer, range(step, step + 1))
                    for scheduler in schedulers:
                        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                        scheduler.step(1.0) if plateau else scheduler.step()
                learning_rates.append(float(optimizer.param_groups[0]["lr"]))
            assert learning_rates[0] == learning_rates[1]
            torch.testing.assert_close(parameters(networks[0]), parameters(networks[1]))


# --- What the class is ----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_constructor_and_type(cls: type) -> None:
    stock = STOCK[cls]
    assert issubclass(cls, stock)
    ours, theirs = (inspect.signature(kind).parameters for kind in (cls, stock))
    assert list(ours.values())[: len(theirs)] == list(theirs.values())
    extras = list(ours.values())[len(theirs) :]
    assert [p.name for p in extras] == list(OPTION_NAMES)
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in extras)
    network = model()
    assert repr(cls(network.parameters())) == repr(stock(network.parameters()))


def test_adamw_is_an_adam() -> None:
    assert issubclass(fused.AdamW, fused.Adam)


@pytest.mark.parametrize("cls", CLASSES)
def test_hooks_and_profile(cls: type) -> None:
    network = model()
    optimizer, calls = cls(network.parameters()), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    with torch.profiler.profile() as profile:
        run(network, optimizer, range(2))
    assert calls == ["before", "after"] * 2
    names = [event.key for event in profile.key_averages()]
    assert f"Optimizer.step#{cls.__name__}.step" in names
    assert ("fused::sgd_" if cls is fused.SGD else "fused::adam_") in names


@pytest.mark.parametrize("cls", CLASSES)
def test_closure(cls: type, backend: torch.device) -> None:
    network = model(device=backend)
    optimizer = cls(network.parameters(), **OPTIONS[cls])
    x = torch.randn(4, 5, device=backend)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = network(x).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert optimizer.step(closure).requires_grad  # gradients are on in it, whatever is outside


@pytest.mark.parametrize("cls", CLASSES)
def test_devices_without_kernels_are_stocks(cls: type) -> None:
    networks = [model(device="meta") for _ in range(2)]
    optimizers = [c(n.parameters(), **OPTIONS[cls]) for c, n in zip((cls, STOCK[cls]), networks)]
    for network, optimizer in zip(networks, optimizers):
        for p in network.parameters():
            p.grad = torch.empty_like(p)
        for _ in range(2):
            optimizer.step()
    ours, stock = (optimizer.state_dict()["state"] for optimizer in optimizers)
    assert ours.keys() == stock.keys() and ours[0].keys() == stock[0].keys()
    assert fused.explain(optimizers[0].step).paths == ("composite",)
    clipping = cls(networks[0].parameters(), **OPTIONS[cls], max_norm=1.0)
    with pytest.raises(NotImplementedError, match=r"max_norm must be left out where stock"):
        clipping.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_differentiable_goes_through_the_step(cls: type) -> None:
    gradients = []
    for kind in (cls, STOCK[cls]):
        lr = torch.tensor(0.1, requires_grad=True, dtype=torch.float64)
        start = torch.linspace(1, 2, 5, dtype=torch.float64, requires_grad=True)
        p = start.clone()
        optimizer = kind([p], lr=lr, differentiable=True)
        for _ in range(3):
            p.grad = start * 2
            optimizer.step()
        gradients.append(torch.autograd.grad(p.sum(), [start, lr]))
    assert gradients[0][0].abs().sum() > 0
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# --- State ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused_flag", [None, True])
@pytest.mark.parametrize("to_fused", [True, False], ids=["stock to fused", "fused to stock"])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("at", [0, 1, 4])
def test_state_dict_moves_at_any_step(
    cls: type, to_fused: bool, at: int, fused_flag: bool | None, backend: torch.device
) -> None:
    first, second = (STOCK[cls], cls) if to_fused else (cls, STOCK[cls])
    options = {**OPTIONS[cls], "fused": fused_flag}
    straight, moved = model(device=backend), model(device=backend)
    run(straight, first(straight.parameters(), **options), range(8))
    before = first(moved.parameters(), **options)
    run(moved, before, range(at))
    saved = io.BytesIO()
    torch.save(before.state_dict(), saved)
    saved.seek(0)
    after = second(moved.parameters())
    after.load_state_dict(torch.load(saved))
    assert_same_state(before, after)
    run(moved, after, range(at, 8))
    torch.testing.assert_close(parameters(moved), parameters(straight))


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
@pytest.mark.parametrize("cls", CLASSES)
def test_copies_in_mid_training(cls: type, duplicate: str, backend: torch.device) -> None:
    network = model(device=backend)
    optimizer = cls(network.parameters(), **OPTIONS[cls])
    run(network, optimizer, range(3))
    pair = (network, optimizer)
    other, copied = (
        copy.deepcopy(pair) if duplicate == "deepcopy" else pickle.loads(pickle.dumps(pair))
    )
    assert type(copied) is cls
    assert copied._step_supports_amp_scaling
    run(network, optimizer, range(3, 6))
    run(other, copied, range(3, 6))
    assert torch.equal(parameters(network), parameters(other))
    assert_same_state(optimizer, copied)


@pytest.mark.parametrize("as_saved", [int, torch.tensor], ids=["number", "integer tensor"])
@pytest.mark.parametrize("cls", [fused.Adam, fused.AdamW])
def test_counts_of_other_types_are_loaded(
    cls: type, as_saved: Callable[[int], Any], backend: torch.device
) -> None:
    """Old checkpoints hold numbers; stock goes on with whatever a checkpoint holds."""
    network = model(device=backend)
    optimizer = cls(network.parameters())
    run(network, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = as_saved(int(entry["step"]))
    optimizer.load_state_dict(saved)
    run(network, optimizer, range(2, 3))
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {3.0}


# --- GradScaler -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_grad_scaler(cls: type, unscale: bool, backend: torch.device) -> None:
    """An overflow at steps 0 and 3; both must leave everything as it was."""
    networks = [model(device=backend), model(device=backend)]
    scalers, optimizers = [], []
    for network, kind in zip(networks, (cls, STOCK[cls]), strict=True):
        optimizers.append(kind(network.parameters(), **OPTIONS[cls]))
        scalers.append(torch.amp.GradScaler(backend.type, init_scale=256.0))
    for step in range(6):
        for network, optimizer, scaler in zip(networks, optimizers, scalers, strict=True):
            before = parameters(network), copy.deepcopy(optimizer.state_dict())
            loss = network(torch.full((2, 5), 0.1 * step, device=backend)).square().sum()
            scaler.scale(loss).backward()
            if step in (0, 3):
                network[0].weight.grad[0, 0] = torch.inf
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            if step in (0, 3):
                assert torch.equal(before[0], parameters(network))
                entries = optimizer.state_dict()["state"]
                for key, entry in before[1]["state"].items():
                    assert all(torch.equal(entry[n], entries[key][n]) for n in entry)
            scaler.update()
        if step not in (0, 3):
            # Gradients are left unscaled, as GradScaler.unscale_ leaves them.
            grads = [[p.grad for p in network.parameters()] for network in networks]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 64.0
    torch.testing.assert_close(parameters(networks[0]), parameters(networks[1]))


def test_grad_scaler_with_differentiable() -> None:
    p = torch.ones(3)
    optimizer = fused.Adam([p], lr=0.5, differentiable=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    p.grad = torch.full((3,), 8.0)
    optimizer.step()
    assert torch.equal(p, torch.ones(3)) and not optimizer.state[p]
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(p.grad, torch.full((3,), 2.0))
    torch.testing.assert_close(p, torch.full((3,), 0.5))
