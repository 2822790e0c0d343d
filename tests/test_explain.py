"""fused.explain: a kernel for every listed option and dtype, and the reason where there is none."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fused
from fused import functional
from fused.testing.cases.attention import CASES, AttentionCase

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_attention_runs_a_kernel(case: AttentionCase, dtype: torch.dtype) -> None:
    tensors, options = case.make(dtype, "cpu")
    for dropout_p in (0.0, 0.1):
        explanation = fused.explain(
            functional.scaled_dot_product_attention, *tensors, dropout_p=dropout_p, **options
        )
        assert len(explanation.paths) == 1
        assert explanation.paths[0].startswith("CPU kernel ("), str(explanation)


def test_attention_says_why_not() -> None:
    q = torch.randn(1, 1, 2, 520)
    explanation = fused.explain(functional.scaled_dot_product_attention, q, q, q)
    assert explanation.paths == ("composite",)
    refused = explanation.decisions[0].refused
    kernel = next(path for path in refused if path.startswith("CPU kernel"))
    assert refused[kernel] == "no kernel for head_dim 520 and 520 (1 to 512)"
    assert refused["CUDA kernel"].startswith("the tensors are on cpu")
    assert "attention: composite" in str(explanation)


def test_nothing_is_computed_and_the_generator_stays() -> None:
    q = torch.randn(1, 1, 2, 4)
    state = torch.get_rng_state()
    fused.explain(functional.scaled_dot_product_attention, q, q, q, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_and_a_function_without_ops() -> None:
    module = fused.Attention(8, 2)
    x = torch.randn(3, 2, 8)
    assert len(fused.explain(module, x, x, x, need_weights=False).paths) == 1
    with_weights = fused.explain(module, x, x, x)  # a drop-in that asks for them without using them
    assert len(with_weights.paths) == 1 and with_weights.paths[0].startswith("CPU kernel")
    assert str(fused.explain(torch.sin, x)) == "no op of fused was called"


def test_an_optimizer_in_place_of_its_step() -> None:
    optimizer = fused.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(TypeError, match=r"such as an optimizer's step, got SGD$"):
        fused.explain(optimizer)


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_a_packed_sequence(enforce_sorted: bool, with_state: bool) -> None:
    module = fused.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    packed = pack_sequence([torch.randn(n, 3) for n in (5, 3, 2)], enforce_sorted=enforce_sorted)
    state = [torch.zeros(4, 3, 2), torch.zeros(4, 3, 4)] if with_state else None
    paths = fused.explain(module, packed, state).paths
    assert len(paths) == 4 and all(path.startswith("CPU kernel") for path in paths)


def test_the_layers_run_kernels() -> None:
    x = torch.randn(3, 2, 8)
    for module, count in (
        (fused.LSTM(8, 4, num_layers=2, bidirectional=True), 4),
        (fused.LSTMCell(8, 4), 1),
    ):
        inputs = x if count > 1 else x[0]
        explanation = fused.explain(module, inputs)
        assert len(explanation.paths) == count
        assert all(path.startswith("CPU kernel") for path in explanation.paths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (fused.Adam, {}),
        (fused.Adam, {"amsgrad": True, "maximize": True, "weight_decay": 0.1}),
        (fused.Adam, {"lr": torch.tensor(1e-3)}),
        (fused.AdamW, {"amsgrad": True}),
        (fused.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (fused.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    ],
)
def test_an_optimizer_runs_kernels_and_is_not_stepped(
    kind: type[torch.optim.Optimizer], options: dict, dtype: torch.dtype
) -> None:
    parameters = [torch.nn.Parameter(torch.randn(3, dtype=dtype)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.clone() for parameter in parameters]
    optimizer = kind([{"params": [p]} for p in parameters], **options)
    explanation = fused.explain(optimizer.step)
    assert len(explanation.paths) == 2
    assert all(path.startswith("CPU kernel") for path in explanation.paths), str(explanation)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    differentiable = kind(parameters, **{**options, "differentiable": True})
    assert fused.explain(differentiable.step).paths == ("composite",)
