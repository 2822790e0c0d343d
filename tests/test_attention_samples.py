"""The samples that PyTorch's own test suite keeps for attention."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import freeze_rng_state

import fused
from fused.functional import scaled_dot_product_attention
from fused.testing import assert_as_accurate_as_stock

OP = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
MODULE = next(info for info in module_db if info.module_cls is torch.nn.MultiheadAttention)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def double(options: dict) -> dict:
    return {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }


def four_dims(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Stock's fused kernel takes nothing else, and its rounding is the one to compare with.

    A gradient of attention is a difference of large numbers, one of which comes from the rounded
    output in every fused kernel, and from the unrounded probabilities in stock's composite.
    """
    batch = max((t.shape[:-3] for t in tensors), key=len)
    if len(batch) == 0:
        return [t.unsqueeze(0) for t in tensors]
    return [t.expand(*batch, *t.shape[-3:]) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_samples(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    samples = list(OP.sample_inputs("cpu", dtype, requires_grad=True))
    compared = 0
    everything: tuple[list[torch.Tensor], ...] = ([], [], [])  # ours, stock's, the truth
    for sample in samples:
        leaves = [sample.input, *sample.args]
        with freeze_rng_state():
            expected = OP.op(*leaves, **sample.kwargs)
        with freeze_rng_state():
            actual = scaled_dot_product_attention(*leaves, **sample.kwargs)
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        grad_out = torch.randn_like(expected)
        if sample.kwargs.get("dropout_p", 0.0) > 0.0:
            torch.autograd.grad(actual, leaves, grad_out)  # other random numbers, same shapes
            continue
        stock = OP.op(*four_dims(leaves), **sample.kwargs).view(expected.shape)
        truth_leaves = [t.detach().double().requires_grad_() for t in leaves]
        truth = OP.op(*truth_leaves, **double(sample.kwargs))
        results = [
            (out, *torch.autograd.grad(out, inputs, grad_out.to(out.dtype)))
            for out, inputs in ((actual, leaves), (stock, leaves), (truth, truth_leaves))
        ]
        if dtype == torch.float64:
            torch.testing.assert_close(results[0], results[1])
        for kept, result in zip(everything, results, strict=True):
            kept.extend(
                (x.detach().double() / t.abs().max()).flatten().to(x.dtype)
                for x, t in zip(result, results[2], strict=True)
            )
        compared += 1
    if dtype != torch.float64:
        # One judgement over all samples, each to its own scale: in a sample of a few dozen numbers
        # the largest error of either side is luck.
        ours, theirs, truth = (torch.cat(kept) for kept in everything)
        assert_as_accurate_as_stock(ours, truth, theirs)
    print(f"{OP.name} {dtype}: {len(samples)} samples, {compared} compared number by number")
    assert compared > 10


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_module_samples(dtype: torch.dtype, training: bool, need_weights: bool) -> None:
    samples = MODULE.module_inputs_func(
        MODULE, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        stock = torch.nn.MultiheadAttention(*args, dtype=dtype, **kwargs).train(training)
        ours = fused.Attention(*args, dtype=dtype, **kwargs).train(training)
        ours.load_state_dict(stock.state_dict())
        inputs, options = sample.forward_input.args, sample.forward_input.kwargs
        options = {**options, "need_weights": need_weights}
        expected, weights = stock(*inputs, **options)
        actual, our_weights = ours(*inputs, **options)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(our_weights, weights)
    print(f"MultiheadAttention {dtype}: {len(samples)} samples")
    assert len(samples) > 20


def test_bad_input_is_refused() -> None:
    """Some of these stock lets through and reads beyond the end or mixes up rows."""
    q = torch.randn(1, 2, 3, 4)
    bad = [
        ((q, q[..., :3], q), {}),
        ((q, q, q[..., :2, :]), {}),
        ((q, q, q), {"attn_mask": torch.ones(5, 5, dtype=torch.bool)}),
        ((q, q.double(), q), {}),
        ((q, q[:, :1], q[:, :1].expand(1, 3, 3, 4)), {"enable_gqa": True}),
    ]
    for args, kwargs in bad:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            scaled_dot_product_attention(*args, **kwargs)
