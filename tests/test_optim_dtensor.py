"""The optimizers and the norm of gradients on DTensors, in every placement."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_ranks import (
    CLASSES,
    OPTIONS,
    STEPS,
    assert_same,
    backward,
    everything,
    model,
    on_ranks,
    only_kernels,
    sharded_model,
    train,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fused

# --- What a DTensor may be like -------------------------------------------------------------------


def check_placements() -> None:
    """A whole and a sharded parameter in one group, gradients and states placed in another way."""
    mesh = init_device_mesh("cpu", (2,))
    for cls in CLASSES:
        results = []
        for sharded in (True, False):
            torch.manual_seed(0)
            params = [torch.randn(5, 3), torch.randn(5, 3), torch.randn(()), torch.randn(4)]
            if sharded:
                placements = [Shard(0), Shard(1), Replicate()]
                params[:3] = [
                    distribute_tensor(p, mesh, [placement])
                    for p, placement in zip(params, placements, strict=False)
                ]
            params = [p.requires_grad_() for p in params]
            optimizer = cls(params, **OPTIONS[cls])
            if sharded:
                only_kernels(optimizer)
            for step in range(STEPS):
                for index, p in enumerate(params):
                    generator = torch.Generator().manual_seed(10 * step + index)
                    p.grad = torch.randn(p.shape, generator=generator)
                    if isinstance(p, DTensor):
                        elsewhere = [Replicate() if step == 1 else p.placements[0]]
                        p.grad = distribute_tensor(p.grad, mesh, elsewhere)
                        if step == 2:
                            scatter_states(optimizer, p, [Replicate()])
                versions = [p._version for p in params]
                optimizer.step()
                assert all(p._version > v for p, v in zip(params, versions, strict=True))
            results.append([(p, optimizer.state[p]) for p in params])
        for (p, entry), (expected, expected_entry) in zip(*results, strict=True):
            assert torch.equal(whole(p), expected.detach())
            for name, value in entry.items():
                assert torch.equal(whole(value), expected_entry[name]), name


def scatter_states(optimizer: torch.optim.Optimizer, p: DTensor, placements: list[Any]) -> None:
    entry = optimizer.state[p]
    for name, value in entry.items():
        if isinstance(value, DTensor):
            entry[name] = value.redistribute(p.device_mesh, placements)


def test_placements(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_placements)


def no_memory(group: Any) -> None:
    raise torch.OutOfMemoryError("no memory")


def check_failed_step() -> None:
    for cls in CLASSES:
        network = sharded_model((2,))
        optimizer = cls(network.parameters(), **OPTIONS[cls])
        backward(network, 0)
        optimizer._new_states = no_memory
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
        assert not optimizer.state
        del optimizer._new_states
        train(network, optimizer, range(1))
        backward(network, 1)
        last = list(network.parameters())[-1]
        last.grad._local_tensor.data = last.grad._local_tensor.double()
        before = everything(network, optimizer)
        params = list(optimizer.param_groups[0]["params"])
        with pytest.raises(TypeError, match="grad must have the dtype of its parameter"):
            optimizer.step()
        after = everything(network, optimizer)
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert all(a is b for a, b in zip(params, optimizer.param_groups[0]["params"]))


def test_a_failed_step_changes_nothing(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_failed_step)


def check_gradients_are_freed() -> None:
    network = sharded_model((2,))
    optimizer = fused.AdamW(network.parameters())
    backward(network, 0)
    gradients = [weakref.ref(p.grad._local_tensor) for p in network.parameters()]
    optimizer.step()
    assert all(gradient() is not None for gradient in gradients)
    optimizer.zero_grad()
    assert all(gradient() is None for gradient in gradients)
    assert "kernel" in str(fused.explain(optimizer.step)).splitlines()[0]


def test_gradients_are_freed(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_gradients_are_freed)


def check_remainders() -> None:
    """Placed in another way, and put in the place of float32 masters and back, on every rank."""
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for sharded in (True, False):
        torch.manual_seed(0)
        p = torch.randn(5, 3).to(torch.bfloat16)
        p = (distribute_tensor(p, mesh, [Shard(0)]) if sharded else p).requires_grad_()
        saved: dict[str, Any] = {}
        for step, master in enumerate(("remainder", "remainder", "float32", "remainder")):
            optimizer = fused.AdamW([p], lr=0.1, master_weights=master)
            optimizer.load_state_dict(saved or optimizer.state_dict())
            if sharded:
                scatter_remainder(optimizer, p)
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(p.shape, generator=generator).to(torch.bfloat16)
            p.grad = distribute_tensor(p.grad, mesh, [Shard(0)]) if sharded else p.grad
            optimizer.step()
            kept = {"remainder": "remainder", "float32": "master"}[master]
            assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq", kept}
            saved = optimizer.state_dict()
        results.append({name: whole(value) for name, value in optimizer.state[p].items()})
        results[-1]["p"] = whole(p)
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def scatter_remainder(optimizer: torch.optim.Optimizer, p: DTensor) -> None:
    entry = optimizer.state[p]
    if "remainder" in entry:
        numbers = entry["remainder"].to(torch.int32).redistribute(p.device_mesh, [Shard(1)])
        entry["remainder"] = numbers.to(torch.int16)


def test_remainders(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_remainders)


# --- The norm over ranks --------------------------------------------------------------------------


def check_clip(shape: tuple[int, ...]) -> None:
    for max_norm in (0.3, 1e6):
        results = []
        for module in (fused, torch.nn.utils):
            network = sharded_model(shape)
            backward(network, 0)
            params = list(network.parameters())
            total = module.get_total_norm([p.grad for p in params])
            versions = [p.grad._version for p in params]
            norm = module.clip_grad_norm_(params, max_norm)
            if module is fused:
                assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))
            assert isinstance(norm, DTensor) and isinstance(total, DTensor)
            results.append([whole(norm), whole(total), *(whole(p.grad) for p in params)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        # Every rank has the norm of all, without asking for it.
        local = fused.get_total_norm([p.grad for p in params]).to_local()
        assert torch.equal(local, whole(fused.get_total_norm([p.grad for p in params])))


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)], ids=str)
def test_clip_of_fully_sharded_gradients(shape: tuple[int, ...], tmp_path: Path) -> None:
    on_ranks(torch.Size(shape).numel(), tmp_path, check_clip, shape)


def check_norm_placements() -> None:
    """Of whole tensors: replicated ones count once, sums that are left to do are done."""
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    tensors = [torch.randn(5, 3) for _ in range(6)]
    placements = [
        [Shard(0), Replicate()],
        [Replicate(), Replicate()],
        [Shard(0), Shard(1)],
        [Shard(0), Shard(0)],
        [Replicate(), Shard(1)],
    ]
    sharded = [distribute_tensor(t, mesh, p) for t, p in zip(tensors[:5], placements, strict=True)]
    ones = DTensor.from_local(torch.ones(2), mesh, [Partial(), Shard(0)])  # of twos, in truth
    everything_local = [t.clone() for t in tensors] + [torch.full((4,), 2.0)]
    expected = torch.nn.utils.get_total_norm(everything_local)
    norm = fused.get_total_norm([*sharded, tensors[5], ones])
    torch.testing.assert_close(norm.to_local(), expected)
    params = [nn.Parameter(torch.zeros_like(t)) for t in (*sharded, tensors[5], ones)]
    for p, gradient in zip(params, (*sharded, tensors[5], ones), strict=True):
        p.grad = gradient
    fused.clip_grad_norm_(params, 1.0)
    for p, gradient in zip(params, everything_local, strict=True):
        torch.testing.assert_close(whole(p.grad), gradient / (expected + 1e-6))


def test_norm_of_tensors_in_all_placements(tmp_path: Path) -> None:
    on_ranks(4, tmp_path, check_norm_placements)


# --- The options beyond stock's -------------------------------------------------------------------

EXTRAS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "clip": (torch.float32, {"max_norm": 0.3, "nonfinite": "skip"}),
    "clip groups": (torch.float32, {"max_norm": 0.1, "norm_scope": "group", "zero_grad": True}),
    "average": (torch.float32, {"ema_decay": 0.9, "zero_grad": True}),
    "remainder": (torch.bfloat16, {"master_weights": "remainder", "max_norm": 0.3}),
    "master": (torch.bfloat16, {"master_weights": "float32", "ema_decay": 0.9}),
    "small states": (torch.float32, {"state_dtype": torch.bfloat16}),
}


def groups_of(network: nn.Module) -> list[dict[str, Any]]:
    params = list(network.parameters())
    return [{"params": params[:2]}, {"params": params[2:]}]


def check_extras() -> None:
    """The sharded steps against those of the whole model, on the same data on every rank."""
    for name, (dtype, options) in EXTRAS.items():
        for cls in (fused.AdamW, fused.SGD):
            results = []
            for sharded in (True, False):
                network = sharded_model((2,), dtype) if sharded else model().to(dtype)
                all_options = {**OPTIONS[cls], **options}
                optimizer = cls(groups_of(network), **all_options)
                norms = []
                for step in range(STEPS):
                    backward(network, step, per_rank=False)
                    optimizer.step()
                    norms.append(optimizer.grad_norm)
                    if "zero_grad" in options:
                        assert not any(whole(p.grad).any() for p in network.parameters())
                    optimizer.zero_grad()
                results.append(everything(network, optimizer))
                if "max_norm" in options:
                    assert not any(isinstance(norm, DTensor) for norm in norms)
                    results[-1]["norms"] = torch.stack(norms)
                if "ema_decay" in options:
                    with optimizer.averaged():
                        for p in network.parameters():
                            average = optimizer.state[p]["ema"]
                            assert torch.equal(whole(p), whole(average).to(dtype))
            try:
                assert_same(*results)
            except AssertionError as error:
                raise AssertionError(f"{name}, {cls.__name__}: {error}") from error


def test_options_on_shards(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_extras)


def check_skip() -> None:
    """What one rank finds in its shard, all ranks heed."""
    network = sharded_model((2,))
    optimizer = fused.AdamW(network.parameters(), nonfinite="skip")
    train(network, optimizer, range(1))
    before = everything(network, optimizer)
    backward(network, 1)
    if torch.distributed.get_rank() == 1:
        next(network.parameters()).grad.to_local()[0, 0] = float("inf")
    optimizer.step()
    after = everything(network, optimizer)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert optimizer.grad_norm is not None and optimizer.grad_norm.isinf()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm.item() == 0
    backward(network, 2)
    quantised = fused.AdamW(network.parameters(), state_dtype="int8")
    with pytest.raises(NotImplementedError, match='state_dtype must not be "int8" for DTensor'):
        quantised.step()


def test_a_gradient_that_is_not_finite_on_one_rank(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_skip)
