"""The samples that PyTorch's own test suite keeps for convolution."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fused
from fused import functional
from fused.testing import assert_as_accurate_as_stock

OPS = [op for op in op_db if op.name in {f"nn.functional.conv{n}d" for n in (1, 2, 3)}]
MODULES = [
    m for m in module_db if m.module_cls in {getattr(torch.nn, f"Conv{n}d") for n in (1, 2, 3)}
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def results(function, leaves: list, kwargs: dict, double: bool = False) -> list[torch.Tensor]:
    if double:
        leaves = [t.detach().double().requires_grad_() if torch.is_tensor(t) else t for t in leaves]
    out = function(*leaves, **kwargs)
    inputs = [t for t in leaves if torch.is_tensor(t)]
    generator = torch.Generator().manual_seed(0)
    grad_out = torch.randn(out.shape, generator=generator)
    # Rounded to the low precision first: all three get the same gradient.
    grad_out = grad_out.to(torch.bfloat16).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, grad_out)]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_op_samples(op, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    for sample in samples:
        leaves = [sample.input, *sample.args]
        ours = getattr(functional, op.name.rpartition(".")[2])
        actual = results(ours, leaves, sample.kwargs)
        stock = results(op.op, leaves, sample.kwargs)
        truth = results(op.op, leaves, sample.kwargs, double=True)
        for a, s, t in zip(actual, stock, truth, strict=True):
            assert a.dtype == s.dtype
            if dtype == torch.float64:
                torch.testing.assert_close(a, s)
            else:
                assert_as_accurate_as_stock(a, t, s, str(sample))
    print(f"{op.name} {dtype}: {len(samples)} samples")
    assert len(samples) >= 5


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_module_samples(info, dtype: torch.dtype) -> None:
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=True
    )
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        stock = info.module_cls(*args, **{**kwargs, "dtype": dtype})
        ours = getattr(fused, info.module_cls.__name__)(*args, **{**kwargs, "dtype": dtype})
        ours.load_state_dict(stock.state_dict())
        inputs = sample.forward_input.args
        out, expected = ours(*inputs), stock(*inputs)
        torch.testing.assert_close(out, expected)
        pairs = [(ours, out), (stock, expected)]
        grads = [
            torch.autograd.grad(o.sum(), [*inputs, *module.parameters()]) for module, o in pairs
        ]
        for a, e in zip(*grads, strict=True):
            torch.testing.assert_close(a, e)
    print(f"{info.name} {dtype}: {len(samples)} samples")
    assert len(samples) >= 4
