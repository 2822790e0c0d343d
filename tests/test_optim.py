"""Optimizer steps against the definition: every option alone and random combinations."""

from __future__ import annotations

import os
from typing import Any

import hypothesis
import pytest
import torch
from conftest import Counted
from hypothesis import strategies as st
from torch import Tensor

import fused
from fused import _load, _route
from fused.reference import optim as reference
from fused.testing import assert_as_accurate_as_stock

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Scalar, empty, ragged, and longer than a chunk of the GPU kernel and of the CPU's threads.
SHAPES = [(), (0,), (1,), (3, 5), (17, 1, 13), (8192 + 37,)]
STEPS = 8
# FUSED_EXAMPLES=500 for the long run.
EXAMPLES = int(os.environ.get("FUSED_EXAMPLES", "60"))
every_run_the_same = hypothesis.settings(max_examples=EXAMPLES, derandomize=True, deadline=None)

Options = dict[str, Any]

ADAM_OPTIONS: dict[str, Options] = {
    "default": {},
    "lr": {"lr": 0.05},
    "betas": {"betas": (0.5, 0.8)},
    "no memory": {"betas": (0.0, 0.0)},
    "eps": {"eps": 1e-3},
    "weight_decay": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "everything": {"lr": 0.02, "weight_decay": 0.3, "amsgrad": True, "maximize": True},
}
SGD_OPTIONS: dict[str, Options] = {
    "default": {},
    "lr": {"lr": 0.5},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "everything": {
        "lr": 0.1,
        "momentum": 0.8,
        "nesterov": True,
        "weight_decay": 0.2,
        "maximize": True,
    },
}
# Adam's default eps underflows in float16, where stock computes in the parameter's dtype.
CASES = [
    *((fused.Adam, torch.optim.Adam, name, options) for name, options in ADAM_OPTIONS.items()),
    *((fused.AdamW, torch.optim.AdamW, name, options) for name, options in ADAM_OPTIONS.items()),
    *((fused.SGD, torch.optim.SGD, name, options) for name, options in SGD_OPTIONS.items()),
]


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype) for x in numbers]


def draw_run(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, steps: int
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters to start from and the gradients of each step."""
    return draw(shapes, dtype, seed=0), [draw(shapes, dtype, seed=1 + i) for i in range(steps)]


def run(
    cls: type[torch.optim.Optimizer],
    start: list[Tensor],
    grads: list[list[Tensor]],
    device: torch.device,
    options: Options,
) -> list[dict[str, Tensor]]:
    """Parameters and state after a step for each list of gradients."""
    params = [p.clone().to(device).requires_grad_() for p in start]
    optimizer = cls(params, **options)
    for step_grads in grads:
        for p, g in zip(params, step_grads, strict=True):
            p.grad = g.clone().to(device)
        optimizer.step()
    return [
        {"param": p.detach()} | {k: v for k, v in optimizer.state[p].items() if k != "step"}
        for p in params
    ]


def compare(
    cls: type[torch.optim.Optimizer],
    stock_cls: type[torch.optim.Optimizer],
    dtype: torch.dtype,
    device: torch.device,
    options: Options,
    steps: int = STEPS,
) -> None:
    if dtype == torch.float16 and cls is not fused.SGD:
        options = {"eps": 1e-3, **options}
    start, grads = draw_run(SHAPES, dtype, steps)
    stock_dtype = torch.float32 if dtype == torch.float64 else dtype
    stock = run(
        stock_cls,
        [p.to(stock_dtype) for p in start],
        [[g.to(stock_dtype) for g in step_grads] for step_grads in grads],
        torch.device("cpu"),
        {**options, "foreach": False},
    )
    actual = run(cls, start, grads, device, options)
    definition = reference.sgd if cls is fused.SGD else reference.adam
    if cls is fused.AdamW:
        options = {"weight_decay": 1e-2, **options, "decoupled_weight_decay": True}
    # In one tensor, so that stock's error is that of many elements and not one's luck.
    grads_of = list(zip(*grads, strict=True))
    expected = [definition(p, g, **options) for p, g in zip(start, grads_of, strict=True)]
    for name in expected[0]:
        results = (actual, expected, stock)
        a, e, s = (torch.cat([t[name].flatten().cpu() for t in x]) for x in results)
        assert a.dtype == dtype
        assert_as_accurate_as_stock(a, e, s, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    "cls, stock_cls, options",
    [pytest.param(c, s, o, id=f"{c.__name__}-{n}") for c, s, n, o in CASES],
)
def test_each_option(
    cls: type, stock_cls: type, options: Options, dtype: torch.dtype, backend: torch.device
) -> None:
    compare(cls, stock_cls, dtype, backend, options)


def tensor_options(cls: type, options: Options, dtype: torch.dtype) -> Options:
    changed = {"lr": torch.tensor(options.get("lr", 1e-3), dtype=dtype)}
    if cls is not fused.SGD:
        betas = options.get("betas", (0.9, 0.999))
        changed["betas"] = tuple(torch.tensor([[b]], dtype=dtype) for b in betas)
    return {**options, **changed}


@pytest.mark.parametrize("scalar_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cls", [fused.Adam, fused.AdamW, fused.SGD])
def test_tensor_hyperparameters_are_their_values(
    cls: type, scalar_dtype: torch.dtype, backend: torch.device
) -> None:
    options = tensor_options(cls, {"lr": 0.25, "betas": (0.5, 0.75)}, scalar_dtype)
    plain = {"lr": 0.25} if cls is fused.SGD else {"lr": 0.25, "betas": (0.5, 0.75)}
    if cls is fused.SGD:
        options.pop("betas")
    start, grads = draw_run(SHAPES, torch.float32, 3)
    tensors = run(cls, start, grads, backend, options)
    numbers = run(cls, start, grads, backend, plain)
    for a, b in zip(tensors, numbers, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("cls", [fused.Adam, fused.AdamW, fused.SGD])
def test_a_hundred_steps(cls: type, backend: torch.device) -> None:
    options = {"momentum": 0.9} if cls is fused.SGD else {"amsgrad": True, "lr": 0.01}
    stock_cls = getattr(torch.optim, cls.__name__)
    compare(cls, stock_cls, torch.float32, backend, options, steps=100)


@every_run_the_same
@hypothesis.given(data=st.data())
def check_random_combination(backend: torch.device, count: Counted, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    flag = st.booleans()
    options: Options = {
        "lr": data.draw(st.sampled_from([1e-3, 0.02, 0.3]), "lr"),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.01, 0.5]), "weight_decay"),
        "maximize": data.draw(flag, "maximize"),
    }
    if data.draw(flag, "sgd"):
        cls, stock_cls = fused.SGD, torch.optim.SGD
        options["momentum"] = data.draw(st.sampled_from([0.0, 0.5, 0.95]), "momentum")
        options["nesterov"] = options["momentum"] > 0 and data.draw(flag, "nesterov")
        if not options["nesterov"]:
            options["dampening"] = data.draw(st.sampled_from([0.0, 0.3]), "dampening")
    else:
        both = [(fused.Adam, torch.optim.Adam), (fused.AdamW, torch.optim.AdamW)]
        cls, stock_cls = data.draw(st.sampled_from(both), "class")
        options["amsgrad"] = data.draw(flag, "amsgrad")
        betas = [(0.9, 0.999), (0.0, 0.9), (0.6, 0.0)]
        options["betas"] = data.draw(st.sampled_from(betas), "betas")
        # Without a memory of squares a step divides by |g| + eps. Where gradient and decay cancel,
        # a small eps makes one element's rounding the whole error, stock's and ours alike.
        smallest = [] if options["betas"][1] == 0 else [1e-3]
        options["eps"] = data.draw(st.sampled_from([*smallest, 0.1]), "eps")
    compare(cls, stock_cls, dtype, backend, options, steps=data.draw(st.integers(1, 6), "steps"))
    count()


def test_random_combinations(backend: torch.device, counted: Counted) -> None:
    check_random_combination(backend, counted)
    assert counted.number >= EXAMPLES


@pytest.mark.parametrize("cls", [fused.Adam, fused.AdamW])
def test_counts_and_hyperparameters_on_the_device(cls: type, backend: torch.device) -> None:
    """`capturable`: the host reads nothing. For CUDA, as in stock, and its kernels emulated."""
    start, grads = draw_run(SHAPES, torch.float32, 3)
    options = {"lr": 0.25, "betas": (0.5, 0.75)}
    on_device = {
        "capturable": True,
        "lr": torch.tensor(0.25, device=backend),
        "betas": tuple(torch.tensor(b, device=backend) for b in (0.5, 0.75)),
    }
    if backend.type == "cpu" and _route.kernels() is _load.load():
        with pytest.raises(ValueError, match="adam: capturable must be False for parameters off"):
            run(cls, start, grads, backend, on_device)
        return
    device = run(cls, start, grads, backend, on_device)
    host = run(cls, start, grads, backend, options)
    for a, b in zip(device, host, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("cls", [fused.Adam, fused.SGD])
def test_results_do_not_depend_on_the_other_tensors(cls: type, backend: torch.device) -> None:
    options = {"momentum": 0.9} if cls is fused.SGD else {}
    start, grads = draw_run(SHAPES, torch.float32, 2)
    together = run(cls, start, grads, backend, options)
    for i, result in enumerate(together):
        alone = run(cls, start[i : i + 1], [g[i : i + 1] for g in grads], backend, options)[0]
        assert all(torch.equal(result[name], alone[name]) for name in result)


@pytest.mark.parametrize("cls", [fused.Adam, fused.SGD])
def test_more_tensors_than_one_launch_takes(cls: type, backend: torch.device) -> None:
    shapes = [(1 + i % 7,) for i in range(500)]
    start, grads = draw_run(shapes, torch.float32, 2)
    options = {"momentum": 0.9} if cls is fused.SGD else {"fused": True}
    many = run(cls, start, grads, backend, options)
    one = run(cls, [torch.cat(start)], [[torch.cat(g)] for g in grads], backend, options)[0]
    for name, value in one.items():
        assert torch.equal(torch.cat([result[name] for result in many]), value)
