"""fused.Attention against nn.MultiheadAttention: the same numbers from the same parameters."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

import fused

CONSTRUCTORS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "batch_first": True, "bias": False},
]
MASKS = ["none", "bool", "float", "bool 3d", "causal hint"]


def twins(**options: object) -> tuple[nn.MultiheadAttention, fused.Attention]:
    stock = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
    for bias in (stock.in_proj_bias, stock.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    ours = fused.Attention(8, 2, dtype=torch.float64, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def draw_mask(kind: str, batch: int) -> tuple[Tensor | None, bool]:
    if kind == "none":
        return None, False
    if kind == "causal hint":
        return torch.ones(4, 5, dtype=torch.bool).triu(1), True
    shape = (batch * 2, 4, 5) if kind.endswith("3d") else (4, 5)
    hidden = torch.rand(shape) < 0.3
    hidden[..., 0] = False
    return (hidden, False) if kind.startswith("bool") else (torch.randn(4, 5).double(), False)


@pytest.mark.parametrize("same", ["self", "key is value", "all different", "unbatched"])
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
def test_same_output_and_gradients(options: dict, mask_kind: str, padding: str, same: str) -> None:
    torch.manual_seed(0)
    stock, ours = twins(**options)
    batch_first, batch = options.get("batch_first", False), 3

    def draw(length: int, width: int) -> Tensor:
        if same == "unbatched":
            return torch.randn(length, width, dtype=torch.float64)
        x = torch.randn(batch, length, width, dtype=torch.float64)
        return x if batch_first else x.transpose(0, 1)

    query, key, value = draw(4, 8), draw(5, stock.kdim), draw(5, stock.vdim)
    if "kdim" not in options and same == "key is value":
        value = key
    if "kdim" not in options and same == "self":
        query = key = value = draw(5, 8)
    mask, hint = draw_mask(mask_kind, 1 if same == "unbatched" else batch)
    if mask is not None and query is key:
        mask = torch.cat([mask, mask[..., :1, :]], dim=-2)
        if hint:
            mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    pad = None
    if padding != "none":
        pad = torch.zeros(batch, 5, dtype=torch.bool)
        pad[0, 3:] = True
        pad = pad[0] if same == "unbatched" else pad
        if padding == "float" or (mask is not None and mask.is_floating_point()):
            pad = torch.where(pad, -1.5, 0.0).double()
    if pad is not None and mask is not None and pad.dtype != mask.dtype:
        mask = torch.where(mask, -torch.inf, 0.0).double()

    results = []
    for module in (stock, ours):
        module.zero_grad()
        inputs = (query, key, value)
        out, weights = module(
            *inputs, key_padding_mask=pad, need_weights=False, attn_mask=mask, is_causal=hint
        )
        assert weights is None
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        results.append((out, {name: p.grad for name, p in module.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert results[1][0].is_contiguous() or not results[0][0].is_contiguous()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, msg=name)


@pytest.mark.parametrize("average", [True, False])
def test_weights_when_asked_for(average: bool) -> None:
    stock, ours = twins(batch_first=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(
        ours(x, x, x, average_attn_weights=average), stock(x, x, x, average_attn_weights=average)
    )


def test_state_dict_repr_copies_and_pickles() -> None:
    stock, ours = twins(dropout=0.1, batch_first=True)
    stock.load_state_dict(ours.state_dict())
    assert list(stock.state_dict()) == list(ours.state_dict())
    assert "embed_dim=8, num_heads=2, dropout=0.1, batch_first=True" in repr(ours)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = ours.eval()(x, x, x, need_weights=False)[0]
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
        assert type(twin) is fused.Attention
        assert torch.equal(twin.eval()(x, x, x, need_weights=False)[0], expected)


def test_parametrized_and_cast_modules() -> None:
    from torch.nn.utils import parametrizations

    _, ours = twins(batch_first=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = ours(x, x, x, need_weights=False)[0]
    parametrizations.weight_norm(ours, "in_proj_weight")
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], expected)
    half = fused.Attention(8, 2).to(torch.bfloat16)
    x = x.to(torch.bfloat16)
    assert half(x, x, x, need_weights=False)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused.Attention(8, 2)(x.float(), x.float(), x.float(), need_weights=False)[0]
    assert out.dtype == torch.bfloat16


def test_rows_that_see_no_key_give_the_bias_and_no_nan() -> None:
    _, ours = twins(batch_first=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    pad = torch.zeros(2, 5, dtype=torch.bool)
    pad[1] = True
    out = ours(x, x, x, key_padding_mask=pad, need_weights=False)[0]
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(5, 8))
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad[1] == 0).all()


def test_dropout_only_in_training() -> None:
    ours = fused.Attention(8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(2, 9, 8)
    first, second = (ours(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    ours.eval()
    first, second = (ours(x, x, x, need_weights=False)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_bad_input_has_stock_errors() -> None:
    stock, ours = twins(batch_first=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    bad = [
        {"query": x[..., :7], "key": x, "value": x},
        {"query": x, "key": x, "value": x[:, :4]},
        {"query": x, "key": x, "value": x, "attn_mask": torch.zeros(4, 5, dtype=torch.bool)},
        {"query": x, "key": x, "value": x, "attn_mask": torch.zeros(5, 5, dtype=torch.int)},
        {"query": x, "key": x, "value": x, "is_causal": True},
        {"query": x[0], "key": x, "value": x},
        {"query": x, "key": x[:1], "value": x[:1]},
        {"query": x, "key": x, "value": x, "key_padding_mask": torch.zeros(2, 4).bool()},
        {"query": x, "key": x, "value": x, "key_padding_mask": torch.zeros(1, 5).bool()},
    ]
    for arguments, module in itertools.product(bad, (stock, ours)):
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            module(**arguments, need_weights=False)
        if module is stock:
            kind = caught.type
        else:
            assert caught.type is kind, arguments
