"""Saved states: as they were, stored in another way, by stock and back; copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from optim_states import CLASSES, OPTIONS, STORED, assert_equal, everything, leaves, run
from torch import Tensor

import fused
from fused.optim import _state
from fused.optim._kept import _MOMENTS


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_checkpoint_goes_on_bit_for_bit(cls: type, stored: str, backend: torch.device) -> None:
    extras = STORED[stored]
    straight, moved = leaves(backend), leaves(backend)
    optimizer = cls(straight, **OPTIONS[cls], **extras)
    run(straight, optimizer, range(6))
    before = cls(moved, **OPTIONS[cls], **extras)
    run(moved, before, range(3))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = cls(moved, **extras)
    after.load_state_dict(torch.load(file))
    assert_equal(everything(moved, before), everything(moved, after))
    run(moved, after, range(3, 6))
    assert_equal(everything(straight, optimizer), everything(moved, after))


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_checkpoint_loaded_into_a_compiled_step(
    cls: type, stored: str, steps_before: int
) -> None:
    cpu = torch.device("cpu")
    params, restored = leaves(cpu), leaves(cpu)
    optimizer = cls(params, **OPTIONS[cls], **STORED[stored])
    run(params, optimizer, range(3))
    compiled = cls(restored, **OPTIONS[cls], **STORED[stored])
    torch._dynamo.reset()
    compiled.step = torch.compile(compiled.step, fullgraph=True, backend="aot_eager")
    run(restored, compiled, range(10, 10 + steps_before))
    with torch.no_grad():
        for p, saved in zip(restored, params, strict=True):
            p.copy_(saved)
    compiled.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained in (params, optimizer), (restored, compiled):
        run(*trained, range(3, 6))
    assert_equal(everything(params, optimizer), everything(restored, compiled))


@pytest.mark.parametrize("to", STORED)
@pytest.mark.parametrize("of", STORED)
@pytest.mark.parametrize("cls", [fused.Adam, fused.SGD])
def test_a_checkpoint_of_another_way_of_storing(
    cls: type, of: str, to: str, backend: torch.device
) -> None:
    """Masters and averages stay where both have one; moments lose what the coarser one loses."""
    params = leaves(backend)
    first = cls(params, **OPTIONS[cls], **STORED[of])
    run(params, first, range(3))
    second = cls(params, **STORED[to])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.extras == type(second.extras)(**STORED[to])
    masters = [_master(p, first.state[p]) for p in params]
    for p in params:
        assert_same_values(first.state[p], second.state[p])
    step_by_nothing(params, second)
    for p, master in zip(params, masters, strict=True):
        entry = second.state[p]
        assert ("ema" in entry) == ("ema_decay" in STORED[to])
        assert_same_master(master, _master(p, entry))
    run(params, second, range(4, 6))
    assert all(p.isfinite().all() for p in params)


def assert_same_values(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The moments of two entries but for how they are stored, the averages bit for bit."""
    moments = [name for name in a if name in _MOMENTS]
    assert moments == [name for name in b if name in _MOMENTS] != []
    for name in moments:
        values = [_values(entry, name) for entry in (a, b)]
        # Half of int8's widest step and of bfloat16's, of the largest of all.
        largest = float(values[0].abs().max()) if values[0].numel() else 0.0
        atol = (0.9 / 128 + 2**-8) * largest
        torch.testing.assert_close(*values, rtol=0.0, atol=atol)
    if "ema" in a and "ema" in b:
        assert torch.equal(a["ema"], b["ema"])


def step_by_nothing(params: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """A step that changes no parameter, but makes what a loaded state lacks."""
    (group,) = optimizer.param_groups
    lr, group["lr"] = group["lr"], 0.0
    before = [p.detach().clone() for p in params]
    run(params, optimizer, range(3, 4))
    for p, old in zip(params, before, strict=True):
        if p.dtype == torch.bfloat16 and "master" in optimizer.state[p]:
            # At a tie a remainder's parameter was rounded away from zero, a master's is to even.
            bits = optimizer.state[p]["master"].view(torch.int32)
            assert ((bits - (old.view(torch.int16).int() << 16)).abs() <= 0x8000).all()
        else:
            assert torch.equal(p, old)
    group["lr"] = lr


def _values(entry: dict[str, Tensor], name: str) -> Tensor:
    scale = entry.get(_state.scale_name(name))
    return entry[name].float() if scale is None else _state.dequantize(entry[name], scale)


def _master(p: Tensor, entry: dict[str, Tensor]) -> Tensor | None:
    if "remainder" in entry:
        return _state.join_remainder(p, entry["remainder"])
    return entry.get("master")


def assert_same_master(a: Tensor | None, b: Tensor | None) -> None:
    """Where both are there. A float32 master at a tie was rounded to even: as a remainder it is a
    unit off."""
    if a is not None and b is not None and a.numel() > 0:
        assert (a.view(torch.int32) - b.view(torch.int32)).abs().max() <= 1


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_checkpoint_of_stock(cls: type, stored: str, backend: torch.device) -> None:
    """Loads, and keeps the options that it lacks; masters and averages begin at the next step."""
    params = leaves(backend)
    stock = getattr(torch.optim, cls.__name__)(params, **OPTIONS[cls])
    run(params, stock, range(2))
    ours = cls(params, **STORED[stored])
    ours.load_state_dict(copy.deepcopy(stock.state_dict()))
    for p in params:
        assert_same_values(stock.state[p], ours.state[p])
    step_by_nothing(params, ours)
    fresh = cls(leaves(backend), **OPTIONS[cls], **STORED[stored])
    run(fresh.param_groups[0]["params"], fresh, range(1))
    for p, q in zip(params, fresh.param_groups[0]["params"], strict=True):
        entry = ours.state[p]
        kinds = {name: value.dtype for name, value in fresh.state[q].items()}
        assert {name: value.dtype for name, value in entry.items()} == kinds
        if "ema" in entry:
            torch.testing.assert_close(entry["ema"], p.detach().float())
        assert_same_master(p.detach().float(), _master(p, entry))
    run(params, ours, range(4, 6))
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("to", ["float32", "remainder"])
@pytest.mark.parametrize("of", ["float32", "remainder", "stock"])
@pytest.mark.parametrize("cls", [fused.AdamW, fused.SGD])
def test_a_model_loaded_after_its_optimizer(
    cls: type, of: str, to: str, backend: torch.device
) -> None:
    """Masters and averages are those of the loaded weights, not of what was there before."""
    saved = leaves(backend)
    options = {**OPTIONS[cls], "dampening": 0.1} if cls is fused.SGD else OPTIONS[cls]
    if of == "stock":
        first = getattr(torch.optim, cls.__name__)(saved, **options)
    else:
        first = cls(saved, **options, master_weights=of)
    run(saved, first, range(3))
    masters = [p.detach().float() if of == "stock" else _master(p, first.state[p]) for p in saved]
    params = [torch.full_like(p, 7.0, requires_grad=True) for p in saved]
    second = cls(params, master_weights=to, ema_decay=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(params, saved, strict=True):
        p.data.copy_(q)
    again = cls(saved, master_weights=to, ema_decay=0.5)  # whose weights are there already
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    step_by_nothing(params, second)
    step_by_nothing(saved, again)
    assert_equal(everything(params, second), everything(saved, again))
    for p, master in zip(params, masters, strict=True):
        torch.testing.assert_close(second.state[p]["ema"], p.detach().float(), rtol=2**-7, atol=0.0)
        assert_same_master(master, _master(p, second.state[p]))
    step_by_nothing(saved, first)
    for p, q in zip(params, saved, strict=True):  # moments that were there have not begun anew
        assert_same_values(first.state[q], second.state[p])


@pytest.mark.parametrize(
    "master, dtype",
    [("float32", torch.bfloat16), ("float32", torch.float16), ("remainder", torch.bfloat16)],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_master_that_stock_has_carried_along(
    cls: type, master: str, dtype: torch.dtype, backend: torch.device
) -> None:
    """Stock casts it, and changes the parameter without it: a new one begins."""
    params = leaves(backend, dtype)
    first = cls(params, **OPTIONS[cls], master_weights=master)
    run(params, first, range(2))
    stock = getattr(torch.optim, cls.__name__)(params)
    stock.load_state_dict(copy.deepcopy(first.state_dict()))
    run(params, stock, range(2, 3))
    back = cls(params, master_weights=master)
    back.load_state_dict(copy.deepcopy(stock.state_dict()))
    step_by_nothing(params, back)
    for p in params:
        assert torch.equal(_master(p, back.state[p]), p.detach().float())


@pytest.mark.parametrize("cls", CLASSES)
def test_codes_that_stock_took_for_numbers(cls: type, backend: torch.device) -> None:
    """They are no moments any more. Refused, with nothing loaded."""
    params = leaves(backend)
    first = cls(params, **OPTIONS[cls], state_dtype="int8")
    run(params, first, range(2))
    stock = getattr(torch.optim, cls.__name__)(params)
    stock.load_state_dict(copy.deepcopy(first.state_dict()))
    without = copy.deepcopy(first.state_dict())
    for entry in without["state"].values():
        for name in [name for name in entry if name.endswith("_scale")]:
            del entry[name]
    refusals = {
        r"must be int8 or uint8 beside \w+_scale, got torch.bfloat16": stock.state_dict(),
        r"must be floating-point without \w+_scale, got torch.int8": without,
    }
    for extras in ({"state_dtype": "int8"}, {"state_dtype": torch.float32}, {}):
        back = cls(params, lr=0.7, **extras)
        run(params, back, range(1))
        before = [t.clone() for t in everything(params, back)]
        for message, saved in refusals.items():
            with pytest.raises(ValueError, match=message):
                back.load_state_dict(saved)
        assert_equal(before, everything(params, back))
        assert back.param_groups[0]["lr"] == 0.7


IN_MID_TRAINING: dict[str, dict[str, Any]] = {
    **STORED,
    "clip and skip": {"max_norm": 1.0, "nonfinite": "skip", "zero_grad": True},
    "clip groups": {"max_norm": 1.0, "norm_scope": "group", "nonfinite": "error"},
    "average": {"ema_decay": 0.9},
    "by chance": {"stochastic_rounding": True},
}


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
@pytest.mark.parametrize("extra", IN_MID_TRAINING)
@pytest.mark.parametrize("cls", [fused.AdamW, fused.SGD])
def test_copies_in_mid_training(
    cls: type, extra: str, duplicate: str, backend: torch.device
) -> None:
    """A copy has the options, the states and the norm, and goes on as the original does."""
    extras = IN_MID_TRAINING[extra]
    params = leaves(backend)
    optimizer = cls(params, **OPTIONS[cls], **extras)
    run(params, optimizer, range(3))
    pair = (params, optimizer)
    others, copied = (
        copy.deepcopy(pair) if duplicate == "deepcopy" else pickle.loads(pickle.dumps(pair))
    )
    assert type(copied) is cls and copied.extras == optimizer.extras
    if "max_norm" in extras:
        assert torch.equal(copied.grad_norm, optimizer.grad_norm)
    assert_equal(everything(params, optimizer), everything(others, copied))
    for tensors, each in ((params, optimizer), (others, copied)):
        torch.manual_seed(7)  # of the rounding
        run(tensors, each, range(3, 6))
    assert_equal(everything(params, optimizer), everything(others, copied))
