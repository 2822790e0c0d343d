"""Attention over DTensors whose heads or sequences are sharded, on two ranks."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fused
from fused.functional import (
    attention_with_kv_cache,
    scaled_dot_product_attention,
    varlen_attention,
)
from fused.testing.compare import assert_as_accurate_as_stock
from fused.testing.dispatch import OperatorLog

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


def assert_the_whole(
    actual: list[Tensor], expected: list[Tensor], exact: list[Tensor], own: int
) -> None:
    """The first `own` are of a rank's rows alone, the others summed over what the ranks have."""
    for i, (ours, one, reference) in enumerate(zip(actual, expected, exact, strict=True)):
        if i < own:
            assert torch.equal(whole(ours), one)
        else:
            assert_as_accurate_as_stock(whole(ours), reference, one)


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
    assert_the_whole(actual, expected, exact, own=5)


@pytest.mark.parametrize(("dim", "groups"), [(0, 2), (1, 2), (1, 1)])
def test_shards_mean_the_whole(dim: int, groups: int, tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_shards, dim, groups)


def check_mesh_of_two_dimensions() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    tensors = draw(groups=4)
    expected = attended(tensors)
    for placements in ([Shard(0), Shard(1)], [Shard(1), Shard(1)], [Shard(2), Shard(1)]):
        sharded = {
            name: distribute_tensor(t, mesh, placements if t.dim() == 4 else [Replicate()] * 2)
            for name, t in tensors.items()
        }
        actual = attended(sharded)
        rows = placements[0].is_shard(2)
        assert isinstance(actual[0], DTensor)
        assert list(actual[0].placements) == [Replicate() if rows else placements[0], Shard(1)]
        for ours, one in zip(actual, expected, strict=True):
            torch.testing.assert_close(whole(ours), one)

    # Groups of heads are not cut further than they go.
    tensors = draw(groups=2)
    cut = [distribute_tensor(tensors[name], mesh, [Shard(1)] * 2) for name in INPUTS[:3]]
    ours = scaled_dot_product_attention(*cut, enable_gqa=True)
    one = scaled_dot_product_attention(*(tensors[name] for name in INPUTS[:3]), enable_gqa=True)
    assert list(ours.placements) == [Shard(1), Replicate()] and torch.equal(whole(ours), one)
    # Masks of a batch or heads of one, an uneven batch; copies of a shard drop the same weights.
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(3, 4, 6, 8, generator=generator) for _ in range(3))
    for shape in ((3, 1, 6, 6), (1, 4, 6, 6), (3, 4, 1, 6), (6,)):
        mask = torch.randn(shape, generator=generator).requires_grad_()
        placed = distribute_tensor(mask.detach(), mesh, [Replicate()] * 2).requires_grad_()
        cut = [distribute_tensor(x, mesh, [Shard(0), Shard(1)]) for x in (q, k, v)]
        one = scaled_dot_product_attention(q, k, v, mask)
        ours = scaled_dot_product_attention(*cut, placed)
        assert torch.equal(whole(ours), one)
        assert ours.is_contiguous() and ours.to_local().is_contiguous()
        (one.square().sum() + ours.full_tensor().square().sum()).backward()
        assert mask.grad is not None and placed.grad is not None
        torch.testing.assert_close(whole(placed.grad), mask.grad)
    ones = distribute_tensor(torch.ones(1, 4, 8, 8), mesh, [Replicate(), Shard(1)])
    dropped = scaled_dot_product_attention(ones, ones, torch.eye(8).expand(1, 4, 8, 8), None, 0.5)
    of_ranks = [torch.empty_like(dropped.to_local()) for _ in range(4)]
    torch.distributed.all_gather(of_ranks, dropped.to_local())
    assert torch.equal(of_ranks[0], of_ranks[2]) and torch.equal(of_ranks[1], of_ranks[3])
    both = distribute_tensor(torch.ones(2, 4, 8, 8), mesh, [Shard(0), Shard(1)])
    dropped = scaled_dot_product_attention(both, both, torch.eye(8).expand(2, 4, 8, 8), None, 0.5)
    parts = whole(dropped).unfold(1, 2, 2).flatten(0, 1).unbind()
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(parts, 2))

    # A rank without a sequence takes a mask of any length, as the others do.
    line = init_device_mesh("cpu", (4,))
    options = {"cache_seqlens": torch.tensor([0, 1, 2], dtype=torch.int32)}
    options["attn_mask"] = torch.randn(6, 25, generator=generator)
    room = torch.randn(3, 4, 20, 8, generator=generator)
    cut = [distribute_tensor(x, line, [Shard(0)]) for x in (q, room, room, k, v)]
    ours = attention_with_kv_cache(*cut[:3], k=cut[3], v=cut[4], **options)
    one = attention_with_kv_cache(q, room.clone(), room.clone(), k=k, v=v, **options)
    assert torch.equal(whole(ours), one)


def test_four_ranks(tmp_path: Path) -> None:
    on_ranks(4, tmp_path, check_mesh_of_two_dimensions)


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
    # So are keys of other dimensions or of another batch than the queries.
    few = torch.randn(1, 4, 9, 8)
    for queries, keys, values in (
        (heads, k[0], v[0]), (heads, k[:1], v), (distribute_tensor(few, mesh, [Shard(0)]), k, v),
        (distribute_tensor(q[0], mesh, [Shard(0)]), k[0], v[0]),
        (distribute_tensor(q[None], mesh, [Shard(2)]), k, v),
    ):  # fmt: skip
        ours = scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
        one = scaled_dot_product_attention(whole(queries), keys, values, enable_gqa=True)
        assert ours.shape == one.shape and torch.equal(whole(ours), one)
    with pytest.raises(ValueError, match="k must have"):
        scaled_dot_product_attention(heads, k[0, 0, 0], v)
    for mask in (torch.zeros(2, 9, 12), torch.zeros(3, 1, 1, 12)):
        rule = re.escape("attn_mask must be broadcastable to [2, 4, 9, 12]")
        with pytest.raises(ValueError, match=rule):
            scaled_dot_product_attention(heads, k, v, mask, enable_gqa=True)
    # Heads that only enable_gqa groups are not made parts of one that would do for all.
    with pytest.raises(ValueError, match="heads that broadcast"):
        scaled_dot_product_attention(
            heads, *(distribute_tensor(x, mesh, [Shard(1)]) for x in (k, v))
        )
    # The mask has the batch of the result.
    first = distribute_tensor(q[:1], mesh, [Shard(1)])
    mask = torch.randn(2, 4, 9, 12, generator=torch.Generator().manual_seed(5))
    ours = scaled_dot_product_attention(first, k, v, mask, enable_gqa=True)
    one = scaled_dot_product_attention(q[:1], k, v, mask, enable_gqa=True)
    assert ours.shape == one.shape and torch.equal(whole(ours), one)
    # Autocast makes the dtypes one, before they are checked.
    with torch.autocast("cpu", torch.bfloat16):
        ours = scaled_dot_product_attention(heads, k.bfloat16(), v, enable_gqa=True)
        one = scaled_dot_product_attention(q, k.bfloat16(), v, enable_gqa=True)
    assert ours.dtype == torch.bfloat16 and torch.equal(whole(ours), one)
    # Each shard drops weights of its own.
    ones = torch.ones(1, 2, 8, 8)
    same = distribute_tensor(ones, mesh, [Shard(1)])
    identity = torch.eye(8).expand_as(ones)
    with OperatorLog() as log:
        dropped = scaled_dot_product_attention(same, same, identity, dropout_p=0.5)
    # For that no number comes from the host, which a CUDA graph would refuse to wait for.
    assert "fused.attention_forward.default" in log.names
    assert "aten.lift_fresh.default" not in log.names
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


CU_SEQLENS = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 3, 9], [0, 4, 6, 12])]


def packed(
    tensors: dict[str, Tensor], lengths: Sequence[Tensor] = CU_SEQLENS, **options: Any
) -> list[Tensor]:
    """Out, log-sum-exp and the gradient of every input."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out, lse = varlen_attention(
        *(leaves[name] for name in ("q", "k", "v")),
        *lengths,
        attn_mask=leaves["attn_mask"],
        sink=leaves["sink"],
        return_lse=True,
        **options,
    )
    (out.square().sum() + lse.sin().sum()).backward()
    return [out, lse, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def check_packed() -> None:
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "q": (9, 4, 8), "k": (12, 2, 8), "v": (12, 2, 5), "sink": (4,), "attn_mask": (4, 6, 6),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    expected = packed(tensors, window=(2, 1))
    exact = packed({name: tensor.double() for name, tensor in tensors.items()}, window=(2, 1))
    assert len(expected) == 7
    # By heads each rank attends its own; rows, which see each other, are gathered.
    for dim in (1, 0):
        sharded = {
            name: distribute_tensor(t, mesh, [Shard(dim) if name in "qkv" else Replicate()])
            for name, t in tensors.items()
        }
        lengths = [distribute_tensor(x, mesh, [Replicate()]) for x in CU_SEQLENS]
        actual = packed(sharded, lengths if dim == 1 else CU_SEQLENS, window=(2, 1))
        assert isinstance(actual[0], DTensor) and isinstance(actual[1], DTensor)
        assert actual[0].placements == ((Shard(1),) if dim == 1 else (Replicate(),))
        assert actual[1].placements == ((Shard(0),) if dim == 1 else (Replicate(),))
        assert actual[1].shape == (4, 9) and len(actual) == 7
        assert_the_whole(actual, expected, exact, own=6)


def test_packed_heads(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_packed)


def check_caches() -> None:
    torch.manual_seed(3)
    mesh = init_device_mesh("cpu", (2,))
    tensors = draw()
    q, new_k, new_v = (tensors[name] for name in INPUTS[:3])
    options: dict[str, Any] = {
        "cache_seqlens": torch.tensor([3, 7], dtype=torch.int32),
        "sink": tensors["sink"],
        "attn_mask": tensors["attn_mask"],
        "return_lse": True,
    }
    pages = [None, [[5, 0, 3, 7, 1], [2, 8, 4, 6, 9]], [[1], [0]]]
    for shape, table in zip([(2, 2, 20), (10, 2, 4), (2, 2, 20)], pages, strict=True):
        k_cache, v_cache = torch.randn(*shape, 8), torch.randn(*shape, 5)
        block_table = None if table is None else torch.tensor(table, dtype=torch.int32)
        attend = functools.partial(attention_with_kv_cache, block_table=block_table, **options)
        for dim in (1, 0):
            place = [Shard(dim) if table is None or dim == 1 else Replicate()]
            ours = [distribute_tensor(x.clone(), mesh, place) for x in (k_cache, v_cache)]
            mine = [x.clone() for x in (k_cache, v_cache)]
            new = [distribute_tensor(x, mesh, [Shard(dim)]) for x in (q, new_k, new_v)]
            actual = attend(new[0], *ours, k=new[1], v=new[2])
            expected = attend(q, *mine, k=new_k, v=new_v)
            assert all(list(x.placements) == place for x in actual)
            for a, b in zip((*actual, *ours), (*expected, *mine), strict=True):
                assert torch.equal(whole(a), b)
            assert not torch.equal(mine[0], k_cache)
            # What is only read may be placed in any way.
            rows = [distribute_tensor(x, mesh, [Shard(2)]) for x in (k_cache, v_cache)]
            a, b = attend(new[0], *rows)[0], attend(q, k_cache, v_cache)[0]
            assert torch.equal(whole(a), b)
            for wrong, name in (
                (rows, "k"), ([k_cache, v_cache], "k"), ([ours[0], rows[1]], "v"),
            ):  # fmt: skip
                with pytest.raises(ValueError, match=f"{name}_cache must be a DTensor placed as"):
                    attend(new[0], *wrong, k=new[1], v=new[2])
            assert all(torch.equal(whole(a), b) for a, b in zip(ours, mine, strict=True))


def check_refusals_of_caches() -> None:
    """Every rank refuses what an undivided call does, in its words, and has written nothing."""
    mesh = init_device_mesh("cpu", (2,))
    q, k, v = (draw()[name] for name in INPUTS[:3])
    caches = torch.zeros(2, 2, 20, 8), torch.zeros(2, 2, 20, 5)

    def refused(
        dim: int, q: Tensor, *caches: Tensor, error: type[Exception] = ValueError, **options: Any
    ) -> None:
        lengths = torch.tensor([3, 7], dtype=torch.int32)
        messages = []
        place = [Shard(dim)]
        sharded = [distribute_tensor(x, mesh, place) if x.dim() == 4 else x for x in (q, *caches)]
        for tensors in ((q, *caches), sharded):
            with pytest.raises(error) as raised:
                attention_with_kv_cache(*tensors, **{"cache_seqlens": lengths, **options})
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
        assert not any(whole(x).any() for x in sharded[1:])

    def ints(*values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    for dim in (0, 1):
        refused(dim, q, *(x[:1] for x in caches))
        refused(dim, q, *(x[:1] for x in caches), k=k, v=v)
        refused(dim, q, caches[0], caches[1][:, :1])
        refused(dim, q, caches[0][0], caches[1])
        refused(dim, q, *caches, k=k)
        refused(dim, q, *caches, k=k[:1], v=v)
        refused(dim, q, *caches, k=k, v=v[:, :1])
        refused(dim, q, *caches, k=k[0, 0, 0], v=v)
        refused(dim, q, *caches, k=k, v=v, cache_seqlens=ints(3))
        refused(dim, q, *caches, k=k, v=v, cache_seqlens=torch.tensor(3, dtype=torch.int32))
        refused(dim, q, *caches, k=k, v=v, cache_seqlens=ints(30, 3))
        refused(dim, q, *caches, k=k, v=v, cache_seqlens=ints(3, -1))
        refused(dim, q, *caches, k=k, v=v, block_table=ints([0], [2]))
        refused(dim, q, *caches, k=k, v=v, block_table=ints([0]))
        refused(dim, q, *caches, k=k, v=v, block_table=ints(0, 1))
        refused(dim, q[..., :7], *caches, k=k, v=v)
        refused(dim, q, *caches, cache_seqlens=torch.tensor([90, 3]), error=TypeError)
        refused(dim, q, *caches, k=k, v=v, attn_mask=torch.zeros(2, 1, 12))


def test_refusals_of_caches(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_refusals_of_caches)


def test_caches_of_shards(tmp_path: Path) -> None:
    """New keys are written into each rank's own part."""
    on_ranks(2, tmp_path, check_caches)


def check_one_sequence() -> None:
    mesh = init_device_mesh("cpu", (2,))
    q, k, v = (draw()[name][:1] for name in INPUTS[:3])
    grads = []
    for cut in (False, True):
        leaf = distribute_tensor(q, mesh, [Shard(0)]) if cut else q.clone()
        leaf.requires_grad_()
        out = scaled_dot_product_attention(leaf, k, v, enable_gqa=True)
        out.square().sum().backward()
        assert leaf.grad is not None
        assert not cut or list(out.placements) == [Replicate()]
        grads += [whole(out), whole(leaf.grad)]
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])


def test_one_sequence_for_two_ranks(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_one_sequence)


def check_compiled() -> None:
    mesh = init_device_mesh("cpu", (2,))
    packed_rows = draw()["query"].flatten(0, 1).transpose(0, 1)  # [9, 8, 8]
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32)

    def dense(x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x, is_causal=True)

    def varlen(x: Tensor) -> Tensor:
        return varlen_attention(x, x, x, lengths, lengths, is_causal=True)

    for function, x in ((dense, draw()["query"]), (varlen, packed_rows)):
        results = []
        for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaf = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
            out = f(leaf)
            out.square().sum().backward()
            assert isinstance(out, DTensor) and leaf.grad is not None
            results.append((whole(out), whole(leaf.grad)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_in_a_compiled_graph(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_compiled)
