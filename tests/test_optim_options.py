"""What the optimizers have beyond stock, each alone and combined, against the definition."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from conftest import Counted
from hypothesis import strategies as st
from test_optim import EXAMPLES, every_run_the_same
from torch import Tensor

import fused
from fused.optim._options import StepOptions
from fused.reference import optim as reference
from fused.testing import assert_as_accurate_as_stock
from fused.testing.optim import moments_of, plain_run, value_of

Options = dict[str, Any]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Scalar, empty, a block of int8 states with and without a tail, and a chunk with a tail.
SHAPES = [(), (0,), (7,), (2, 256), (3, 301), (8192 + 37,)]
SHORT = [(), (0,), (7,), (2, 256), (3, 301)]
RULES = {"adam": fused.Adam, "adamw": fused.AdamW, "sgd": fused.SGD}
RULE_OPTIONS: dict[str, Options] = {
    "adam": {"lr": 0.02, "eps": 1e-3, "amsgrad": True, "weight_decay": 0.1},
    "adamw": {"lr": 0.02, "eps": 1e-3},
    "sgd": {"lr": 0.1, "momentum": 0.9},
}
EXTRAS: dict[str, Options] = {
    "max_norm": {"max_norm": 3.0},
    "zero_grad": {"zero_grad": True},
    "ema_decay": {"ema_decay": 0.9},
    "float32 master": {"master_weights": "float32"},
    "remainder": {"master_weights": "remainder"},
    "stochastic rounding": {"stochastic_rounding": True},
    "float32 state": {"state_dtype": torch.float32},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "int8 state": {"state_dtype": "int8"},
    "everything": {
        "max_norm": 5.0,
        "zero_grad": True,
        "ema_decay": 0.8,
        "master_weights": "float32",
        "state_dtype": "int8",
    },
}


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def applies(options: Options, dtype: torch.dtype) -> bool:
    return not (options.get("master_weights") == "remainder" and dtype == torch.float16)


def compare(
    rule: str,
    dtype: torch.dtype,
    options: Options,
    extra: Options,
    device: torch.device,
    steps: int,
    shapes: list[tuple[int, ...]] = SHAPES,
) -> None:
    """Runs kernels, plain torch and the definition, and compares parameters, moments, averages."""
    start = draw(shapes, dtype, seed=0)
    grads = [draw(shapes, dtype, seed=1 + i) for i in range(steps)]
    torch.manual_seed(0)
    params = [p.clone().to(device).requires_grad_() for p in start]
    optimizer = RULES[rule](params, **options, **extra)
    for step_grads in grads:
        for p, g in zip(params, step_grads, strict=True):
            p.grad = g.clone().to(device)
        optimizer.step()
        for p, g in zip(params, step_grads, strict=True):
            expected_grad = torch.zeros_like(g) if extra.get("zero_grad") else g
            assert torch.equal(p.grad.cpu(), expected_grad)
    extras = StepOptions(**extra)
    # Stock's error at float64 is what it is at float32, in other units, unless states are rounded.
    rounds = dtype == torch.float64 and extras.state_dtype is not None
    plain_dtype = torch.float32 if dtype == torch.float64 and not rounds else dtype
    plain = plain_run(
        rule,
        [p.to(plain_dtype) for p in start],
        [[g.to(plain_dtype) for g in step_grads] for step_grads in grads],
        options,
        extras,
    )
    if extras.max_norm is not None:
        grads = [reference.clipped(step_grads, extras.max_norm) for step_grads in grads]
    named = {**options, "ema_decay": extras.ema_decay}
    if rule == "adamw":
        named = {"weight_decay": 1e-2, **named, "decoupled_weight_decay": True}
    definition = reference.sgd if rule == "sgd" else reference.adam
    truth = [
        definition(p, g, **named) for p, g in zip(start, zip(*grads, strict=True), strict=True)
    ]
    names = [
        "param",
        *moments_of(rule, options),
        *(["ema"] if extras.ema_decay is not None else []),
    ]
    for name in names:
        a = [p.detach() if name == "param" else value_of(optimizer.state[p], name) for p in params]
        actual, expected, by_torch = (
            torch.cat([t.flatten().cpu() for t in tensors])
            for tensors in (a, [t[name] for t in truth], [t[name] for t in plain])
        )
        if rounds:
            actual, by_torch = actual.float(), by_torch.float()
        assert_as_accurate_as_stock(actual, expected, by_torch, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("rule", RULES)
def test_each_option(rule: str, extra: str, dtype: torch.dtype, backend: torch.device) -> None:
    if not applies(EXTRAS[extra], dtype):
        with pytest.raises(ValueError, match="params must be bfloat16 for master_weights"):
            RULES[rule]([torch.ones(2, dtype=dtype)], **EXTRAS[extra])
        return
    compare(rule, dtype, RULE_OPTIONS[rule], EXTRAS[extra], backend, steps=4)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("rule", RULES)
def test_a_hundred_steps(rule: str, extra: str, backend: torch.device) -> None:
    dtype = torch.bfloat16 if extra in ("remainder", "stochastic rounding") else torch.float32
    options = {**RULE_OPTIONS[rule], "lr": 0.01}
    compare(rule, dtype, options, EXTRAS[extra], backend, steps=100, shapes=[(), (3, 301)])


@every_run_the_same
@hypothesis.given(data=st.data())
def check_random_combination(backend: torch.device, count: Counted, data: st.DataObject) -> None:
    def one_of(name: str, *values: Any) -> Any:
        return data.draw(st.sampled_from(values), name)

    dtype, rule = one_of("dtype", *DTYPES), one_of("rule", *RULES)
    options: Options = {
        "lr": one_of("lr", 1e-3, 0.02, 0.1),
        "weight_decay": one_of("weight_decay", 0.0, 0.01, 0.3),
        "maximize": one_of("maximize", False, True),
    }
    if rule == "sgd":
        options["momentum"] = one_of("momentum", 0.0, 0.5, 0.9)
        options["nesterov"] = options["momentum"] > 0 and one_of("nesterov", False, True)
        if not options["nesterov"]:
            options["dampening"] = one_of("dampening", 0.0, 0.3)
    else:
        options["amsgrad"] = one_of("amsgrad", False, True)
        options["eps"] = one_of("eps", 1e-3, 0.1)
        options["betas"] = one_of("betas", (0.9, 0.999), (0.6, 0.9))
    masters = (None, "float32", "remainder")
    extra: Options = {
        "max_norm": one_of("max_norm", None, 1.0, 1e6),
        "nonfinite": one_of("nonfinite", "propagate", "error", "skip"),
        "zero_grad": one_of("zero_grad", False, True),
        "ema_decay": one_of("ema_decay", None, 0.5, 0.99),
        "master_weights": one_of("master_weights", *masters[: 2 if dtype == torch.float16 else 3]),
        "state_dtype": one_of("state_dtype", None, torch.float32, torch.bfloat16, "int8"),
    }
    if extra["master_weights"] is None and dtype != torch.float16:
        extra["stochastic_rounding"] = one_of("stochastic_rounding", False, True)
    compare(rule, dtype, options, extra, backend, one_of("steps", 1, 2, 5), shapes=SHORT)
    count()


def test_random_combinations(backend: torch.device, counted: Counted) -> None:
    check_random_combination(backend, counted)
    assert counted.number >= EXAMPLES
