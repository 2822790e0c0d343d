"""Attention over DTensors: heads and sequences do not see each other, so each rank attends its own.

Batch and heads may be sharded over any dimensions of the mesh (tensor and data parallelism); what
is sharded in another way is gathered first. A mask, slopes or a sink that shards share get
gradients that are sums over ranks still to be made (`Partial`); nothing else is communicated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fused._attention_checks import check_cache, check_inputs
from fused._attention_composite import Attended, Options, draw_rng
from fused._route import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_BATCH, _HEADS = 0, 1  # of [B, H, S, D]; packed [S, H, D] and pages have no batch to cut
_NOWHERE = -1

_Given = TypeVar("_Given", Tensor, "Tensor | None")


def attend_sharded(
    attend: Callable[[Tensor, Tensor, Tensor, Options], Attended],
    query: DTensor, key: Tensor, value: Tensor, options: Options, enable_gqa: bool = True,
) -> Attended:  # fmt: skip
    """`attend` on each rank's part of [B, H, S, D] or of packed [S, H, D]; results as the query."""
    packed = options.cu_seqlens_q is not None
    batch = heads = _NOWHERE
    if {x.dim() for x in (query, key, value)} == {3 if packed else 4}:
        # All ranks refuse what one has to, and parts of size 1 are not broadcast.
        check_inputs(query, key, value, options, enable_gqa)
        batch = _NOWHERE if packed else _BATCH
        if enable_gqa or query.shape[_HEADS] == key.shape[_HEADS] == value.shape[_HEADS]:
            heads = _HEADS
    cut = _Cut((query, key, value), batch, heads)
    if options.dropout_p > 0:
        options = options._replace(rng=cut.draw_rng())
    q, k, v = (cut.local(x, batch, heads) for x in (query, key, value))
    out, lse, weights = attend(q, k, v, cut.local_options(options))
    return Attended(
        cut.whole(out, batch, heads),
        cut.whole(lse, batch, 0 if packed else heads),
        cut.whole(weights, batch, heads),
    )


def attend_cache_sharded(
    attend: Callable[..., Attended],
    query: DTensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    k: Tensor | None, v: Tensor | None, block_table: Tensor | None, options: Options,
) -> Attended:  # fmt: skip
    """`attend` on each rank's part. Of pages, which sequences share, only the heads are cut."""
    lengths, table = _gathered(cache_seqlens), _gathered(block_table)
    # All ranks refuse what one has to, before any has written.
    check_cache(query, k_cache, v_cache, lengths, k, v, table, options.attn_mask)
    batch = _BATCH if table is None else _NOWHERE
    cut = _Cut((query, k_cache, v_cache), batch, _HEADS)
    if k is not None:
        cut.check_in_place("k_cache", k_cache, batch)
        cut.check_in_place("v_cache", v_cache, batch)
    out, lse, _ = attend(
        cut.local(query, batch, _HEADS),
        cut.local(k_cache, batch, _HEADS),
        cut.local(v_cache, batch, _HEADS),
        cut.local(lengths, batch),
        cut.local(k, batch, _HEADS),
        cut.local(v, batch, _HEADS),
        table,
        cut.local_options(options),
    )
    return Attended(cut.whole(out, batch, _HEADS), cut.whole(lse, batch, _HEADS), None)


def _gathered(x: _Given) -> _Given:
    return x.full_tensor() if is_sharded(x) else x


class _Cut:
    """How a call's batch and heads are cut over the ranks of a mesh.

    As the query's, as far as sequences and groups of heads stay whole. A tensor's own batch and
    heads are named where its part is taken: at `_NOWHERE`, or of size 1, they are not cut.
    """

    def __init__(self, tensors: tuple[DTensor, Tensor, Tensor], batch: int, heads: int) -> None:
        """Of query, key and value, and which of their dimensions are the batch and the heads."""
        from torch.distributed.tensor import Replicate

        query = tensors[0]
        self._mesh = query.device_mesh
        self._sizes = query.shape[:2]  # of whole batch and heads, where they are cut
        self._placements: list[Placement] = []
        one_batch = batch >= 0 and len({x.shape[batch] for x in tensors}) == 1
        head_shards = 1
        for dim, placement in enumerate(query.placements):
            kept = one_batch and placement.is_shard(batch) and query.shape[batch] > 1
            if heads >= 0 and placement.is_shard(heads):
                shards = head_shards * self._mesh.size(dim)
                kept = all(x.shape[heads] % shards == 0 for x in tensors)
                head_shards = shards if kept else head_shards
            self._placements.append(placement if kept else Replicate())

    def _dims(self, batch: int, heads: int) -> list[int]:
        """Which of a tensor's dimensions each dimension of the mesh cuts."""
        from torch.distributed.tensor import Shard

        return [
            (batch, heads)[placement.dim] if isinstance(placement, Shard) else _NOWHERE
            for placement in self._placements
        ]

    def _own(self, x: Tensor, batch: int, heads: int) -> list[Placement]:
        """How a tensor is placed of which each rank has its part."""
        from torch.distributed.tensor import Replicate, Shard

        dims = self._dims(batch, heads)
        return [Shard(dim) if dim >= 0 and x.shape[dim] > 1 else Replicate() for dim in dims]

    def local(self, x: _Given, batch: int = _NOWHERE, heads: int = _NOWHERE) -> _Given:
        """This rank's part, where these dimensions of x are the batch and the heads."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if x is None:
            return None
        if not isinstance(x, DTensor):
            replicas = [Replicate()] * self._mesh.ndim
            x = DTensor.from_local(x, self._mesh, replicas, run_check=False)
        own = self._own(x, batch, heads)
        of_gradient = [
            Partial() if whole.is_shard() and part.is_replicate() else part
            for whole, part in zip(self._placements, own, strict=True)
        ]
        return x.redistribute(self._mesh, own).to_local(grad_placements=of_gradient)

    def local_options(self, options: Options) -> Options:
        mask = options.attn_mask
        mask_dims = (_NOWHERE, _NOWHERE) if mask is None else (mask.dim() - 4, mask.dim() - 3)
        return options._replace(
            attn_mask=self.local(mask, *mask_dims),
            alibi_slopes=self.local(options.alibi_slopes, heads=0),
            sink=self.local(options.sink, heads=0),
            cu_seqlens_q=_gathered(options.cu_seqlens_q),
            cu_seqlens_k=_gathered(options.cu_seqlens_k),
        )

    def check_in_place(self, argument: str, cache: Tensor, batch: int) -> None:
        """A cache that is written must not be one that is gathered or cut first."""
        own = self._own(cache, batch, _HEADS)
        placed = list(cache.placements) if is_sharded(cache) else [None] * len(own)
        if any(a != b and n > 1 for a, b, n in zip(placed, own, self._mesh.shape, strict=True)):
            raise ValueError(
                f"attention: {argument} must be a DTensor placed as the call is cut, {own}, where "
                f"it is written, got {placed if is_sharded(cache) else 'a plain tensor'}"
            )

    def whole(self, x: _Given, batch: int, heads: int) -> _Given:
        """The DTensor of all ranks' parts, where these dimensions of x are batch and heads."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if x is None:
            return None
        dims, shape = self._dims(batch, heads), list(x.shape)
        for placement, dim in zip(self._placements, dims, strict=True):
            if isinstance(placement, Shard):
                shape[dim] = self._sizes[placement.dim]
        return DTensor.from_local(
            x.contiguous(),
            self._mesh,
            [Shard(dim) if dim >= 0 else Replicate() for dim in dims],
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )

    def draw_rng(self) -> Tensor:
        """What dropout draws its numbers from: others for each shard, the same for its copies."""
        shard, coordinate = 0, self._mesh.get_coordinate()
        assert coordinate is not None
        for dim, placement in enumerate(self._placements):
            if placement.is_shard():
                shard = shard * self._mesh.size(dim) + coordinate[dim]
        rng = draw_rng(torch.device(self._mesh.device_type))
        # Without a number from the host, which a CUDA graph refuses to wait for.
        return rng + torch.arange(2, device=rng.device) * (shard << 32)
