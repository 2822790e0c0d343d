"""Attention over DTensors whose heads or sequences are sharded, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optim_ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fused
from fused.functional import scaled_dot_product_attention
from fused.testing.compare import assert_as_accurate_as_stock

INPUTS = ("query", "key", "value", "attn_mask", "alibi_slopes", "sink")


def draw(groups: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "query": (2, 4, 9, 8), "key": (2, groups, 12, 8), "value": (2, groups, 12, 5),
        "attn_mask": (4, 1, 12), "alibi_slopes": (4,), "sink": (4,),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def attended(tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Out, log-sum-exp and the gradient of every input."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out, lse = scaled_dot_product_attention(
        **leaves, enable_gqa=True, softcap=3.0, window=(5, 2), return_lse=True, **options
    )
    (out.square().sum() + lse.sin().sum()).backward()
    grads = [leaf.grad for leaf in leaves.values()]
    assert all(grad is not None for grad in grads)
    return [out, lse, *(grad for grad in grads if grad is not None)]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_shards(dim: int, groups: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    tensors = draw(groups)
    expected = attended(tensors)
    exact = attended({name: tensor.double() for name, tensor in tensors.items()})
    # One head of keys cannot be cut, and keeps those of the queries together.
    can_cut = dim == 0 or groups == 2
    placed = {
        name: [Shard(dim) if name == "query" or (tensor.dim() == 4 and can_cut) else Replicate()]
        for name, tensor in tensors.items()
    }
    sharded = {name: distribute_tensor(t, mesh, placed[name]) for name, t in tensors.items()}
    actual = attended(sharded)
    assert isinstance(actual[0], DTensor) and list(actual[0].placements) == placed["value"]
    for i, (ours, one, reference) in enumerate(zip(actual, expected, exact, strict=True)):
        if i < 5:  # of their own rows alone
            assert torch.equal(whole(ours), one)
        else:  # summed over what the ranks have
            assert_as_accurate_as_stock(whole(ours), reference, one)


@pytest.mark.parametrize(("dim", "groups"), [(0, 2), (1, 2), (1, 1)])
def test_shards_mean_the_whole(dim: int, groups: int, tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_shards, dim, groups)


def check_what_else() -> None:
    mesh = init_device_mesh("cpu", (2,))
    q, k, v = (draw()[name] for name in INPUTS[:3])
    # Sharded in the rows, which see each other's keys: gathered.
    rows = [distribute_tensor(x, mesh, [Shard(2)]) for x in (q, k, v)]
    out = scaled_dot_product_attention(*rows, enable_gqa=True)
    assert torch.equal(whole(out), scaled_dot_product_attention(q, k, v, enable_gqa=True))
    # Plain keys and values are the same on every rank.
    heads = distribute_tensor(q, mesh, [Shard(1)])
    mixed = scaled_dot_product_attention(heads, k, v, enable_gqa=True)
    assert torch.equal(whole(mixed), whole(out))
    # Each shard drops weights of its own.
    ones = torch.ones(1, 2, 8, 8)
    same = distribute_tensor(ones, mesh, [Shard(1)])
    identity = torch.eye(8).expand_as(ones)
    dropped = scaled_dot_product_attention(same, same, identity, dropout_p=0.5)
    first, second = whole(dropped)[0]
    assert not torch.equal(first, second)
    # What all sequences share has its gradient from every rank.
    sink = torch.zeros(4, requires_grad=True)
    placed = distribute_tensor(sink.detach(), mesh, [Replicate()]).requires_grad_()
    batch = [distribute_tensor(x, mesh, [Shard(0)]) for x in (q, k, v)]
    for inputs, leaf in (((q, k, v), sink), (batch, placed)):
        scaled_dot_product_attention(*inputs, enable_gqa=True, sink=leaf).sum().backward()
    assert sink.grad is not None and placed.grad is not None
    torch.testing.assert_close(whole(placed.grad), sink.grad)
    said = fused.explain(scaled_dot_product_attention, heads, k, v, enable_gqa=True)
    assert "CPU kernel" in str(said)


def test_what_else_may_be_sharded(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_what_else)
