"""How states are stored: masters, remainders, rounding by chance, int8, averages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim_states import CLASSES, OPTIONS, assert_equal, everything, leaves, run

import fused
from fused.optim import _state


@pytest.mark.parametrize("cls", CLASSES)
def test_a_remainder_is_the_exact_master(cls: type, backend: torch.device) -> None:
    """Bit for bit the float32 master, and the parameter its rounding."""
    runs = []
    for master in ("float32", "remainder"):
        params = leaves(backend)
        optimizer = cls(params, **OPTIONS[cls], master_weights=master, ema_decay=0.9)
        run(params, optimizer, range(20))
        runs.append((params, optimizer))
    (whole, first), (split, second) = runs
    for p, q in zip(whole, split, strict=True):
        master = first.state[p]["master"]
        assert torch.equal(master, _state.join_remainder(q, second.state[q]["remainder"]))
        assert torch.equal(p.detach(), master.to(torch.bfloat16))
        assert torch.equal(first.state[p]["ema"], second.state[q]["ema"])
        assert second.state[q]["remainder"].dtype == torch.int16


def test_remainders_of_any_float(backend: torch.device) -> None:
    """Ties, the largest numbers, infinities and subnormals come back exactly; a NaN as NaN."""
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0x00008000, 0x00000001, 0],
        dtype=torch.int64,
    )
    start = torch.cat([bits, bits | 0x80000000]).to(torch.int32).view(torch.float32).to(backend)
    p = torch.zeros_like(start, dtype=torch.bfloat16).requires_grad_()
    optimizer = fused.SGD([p], lr=1.0, master_weights="float32")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["master"].copy_(start)
    optimizer.step()
    loaded = fused.SGD([p], lr=1.0, master_weights="remainder")
    p.data.copy_(start)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded.step()  # by nothing: what is joined and split again is the same
    joined = _state.join_remainder(p, loaded.state[p]["remainder"])
    # A master that was rounded to even at a tie is a unit in its last place off.
    difference = (joined.view(torch.int32) - start.view(torch.int32)).abs()
    assert difference.max() <= 1
    p.grad.fill_(torch.nan)
    loaded.step()
    assert p.isnan().all()


def test_a_parameter_set_from_outside_meets_its_old_remainder(backend: torch.device) -> None:
    """Zero and infinity would become NaN by a remainder that points beyond them."""
    values = torch.tensor([1.002, 1.006, -1.002, -1.006], device=backend)
    p = torch.nn.Parameter(values.to(torch.bfloat16))
    optimizer = fused.SGD([p], lr=1.0, master_weights="remainder")
    p.grad = (p.detach().float() - values).to(torch.bfloat16)
    optimizer.step()
    remainder = optimizer.state[p]["remainder"]
    assert (remainder > 0).any() and (remainder < 0).any()
    p.grad.zero_()
    for value in (0.0, -0.0, torch.inf, -torch.inf):
        kept = remainder.clone()
        p.data.fill_(value)
        joined = _state.join_remainder(p, remainder)
        optimizer.step()
        assert torch.equal(p, torch.full_like(p, value))
        assert not joined.isnan().any()
        assert torch.equal(joined, _state.join_remainder(p, remainder))
        remainder.copy_(kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_by_chance_is_right_on_average(dtype: torch.dtype, backend: torch.device) -> None:
    torch.manual_seed(0)
    for start, change in ((1.0, 1e-3), (-1.0, 1e-3), (1e-6, 1e-8), (3.0, 1.0)):
        p = torch.full((40_000,), start, dtype=dtype, device=backend).requires_grad_()
        optimizer = fused.SGD([p], lr=1.0, stochastic_rounding=True)
        p.grad = torch.full_like(p, change)
        exact = float(p.detach()[0].double() - p.grad[0].double())
        optimizer.step()
        found = p.detach().double().unique()
        assert len(found) <= 2 and found.min() <= exact <= found.max()
        if len(found) == 2:
            expected = (exact - found[0]) / (found[1] - found[0])
            share = (p.detach().double() == found[1]).double().mean()
            assert abs(share - expected) < 0.02


def test_rounding_by_chance_is_the_generator_s(backend: torch.device) -> None:
    results = []
    for seed in (5, 5, 6):
        params = leaves(backend)
        torch.manual_seed(seed)
        optimizer = fused.AdamW(params, lr=1e-3, stochastic_rounding=True)
        run(params, optimizer, range(3))
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][1], results[2][1])


@pytest.mark.parametrize("unsigned", [False, True])
def test_int8_codes(unsigned: bool) -> None:
    """Levels rise, each is its own code, and what lies between goes to the nearest."""
    levels = _state.levels(unsigned)
    assert len(levels) == (255 if unsigned else 128) and levels[0] == 0 and levels[-1] == 1
    assert (levels.diff() > 0).all()
    values = torch.cat([levels, torch.rand(1000, generator=torch.Generator().manual_seed(0))])
    values = values if unsigned else torch.cat([values, -values])
    codes, scale = _state.quantize(values, unsigned=unsigned)
    again = _state.dequantize(codes, scale)
    nearest = (levels[None] * scale[0] - values.abs()[:, None]).abs().amin(1)
    assert torch.allclose((again - values).abs()[:256], nearest[:256], atol=1e-7)
    assert torch.equal(_state.quantize(again, unsigned=unsigned)[0], codes)


@pytest.mark.parametrize("cls", CLASSES)
def test_int8_kernels_store_what_the_definition_stores(cls: type, backend: torch.device) -> None:
    """A first step's moments, quantised by the kernel and by plain torch: at most a code apart."""
    quantised, whole = leaves(backend, torch.float32), leaves(backend, torch.float32)
    ours = cls(quantised, **OPTIONS[cls], state_dtype="int8")
    exact = cls(whole, **OPTIONS[cls])
    run(quantised, ours, range(1))
    run(whole, exact, range(1))
    for p, q in zip(quantised, whole, strict=True):
        for name in (n for n in exact.state[q] if n != "step"):
            entry, value = ours.state[p], exact.state[q][name]
            codes, scale = _state.quantize(value, unsigned=_state.is_unsigned(name))
            torch.testing.assert_close(entry[f"{name}_scale"], scale)
            difference = (entry[name].int() - codes.int()).abs()
            assert difference.numel() == 0 or difference.max() <= 1
            assert (difference > 0).sum() <= 0.01 * difference.numel() + 1


@pytest.mark.parametrize("cls", CLASSES)
def test_averaged(cls: type, backend: torch.device) -> None:
    params = leaves(backend)
    optimizer = cls(params, **OPTIONS[cls], ema_decay=0.9, master_weights="remainder")
    idle = torch.ones(3, device=backend, requires_grad=True)
    optimizer.add_param_group({"params": [idle]})
    run(params, optimizer, range(3))
    before = [p.detach().clone() for p in params]
    with optimizer.averaged():
        for p, old in zip(params, before, strict=True):
            assert torch.equal(p.detach(), optimizer.state[p]["ema"].to(p.dtype))
            assert p.numel() == 0 or not torch.equal(p.detach(), old)
        assert torch.equal(idle.detach(), torch.ones_like(idle))
    assert all(torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True))
    with pytest.raises(KeyboardInterrupt), optimizer.averaged():
        raise KeyboardInterrupt
    assert all(torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True))
    optimizer.state[params[1]]["ema"] = torch.ones(2, device=backend)
    with pytest.raises(RuntimeError, match="must match"), optimizer.averaged():
        pass
    assert all(torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True))
    with (
        pytest.raises(ValueError, match="ema_decay must be given for averaged"),
        cls(params).averaged(),
    ):
        pass


def test_mixed_dtypes_in_one_group(backend: torch.device) -> None:
    """Each parameter with the states of its dtype, as if it were alone."""
    extras = {"master_weights": "float32", "ema_decay": 0.5, "state_dtype": "int8"}
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    together = [torch.linspace(-2, 2, 300).to(backend, d).requires_grad_() for d in dtypes]
    alone = [p.detach().clone().requires_grad_() for p in together]
    run(together, fused.AdamW(together, **extras), range(3))
    for i, p in enumerate(alone):
        optimizer = fused.AdamW([p], **extras)
        for step in range(3):
            generator = torch.Generator().manual_seed(1000 * step + i)
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            optimizer.step()
        assert torch.equal(p, together[i])


COMPILED: list[dict[str, Any]] = [
    {"max_norm": 1.0, "zero_grad": True},
    {"nonfinite": "skip", "ema_decay": 0.9, "master_weights": "remainder"},
    {"state_dtype": "int8", "master_weights": "float32", "max_norm": 2.0},
]


@pytest.mark.parametrize("extras", COMPILED)
@pytest.mark.parametrize("cls", [fused.AdamW, fused.SGD])
def test_compiled_steps(cls: type, extras: dict[str, Any]) -> None:
    device = torch.device("cpu")
    eager, compiled = leaves(device)[:2], leaves(device)[:2]
    first, second = (cls(p, **OPTIONS[cls], **extras) for p in (eager, compiled))
    torch._dynamo.reset()
    step = torch.compile(second.step, fullgraph=True)
    for index in range(3):
        for params, run_step in ((eager, first.step), (compiled, step)):
            for i, p in enumerate(params):
                generator = torch.Generator().manual_seed(1000 * index + i)
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            run_step()
    assert_equal(everything(eager, first), everything(compiled, second))
