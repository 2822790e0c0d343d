"""Attention over DTensors: heads and sequences do not see each other, so each rank attends its own.

Batch and heads may be sharded over any dimensions of the mesh (tensor and data parallelism); what
is sharded in another way is gathered first. A mask, slopes or a sink that shards share get
gradients that are sums over ranks still to be made (`Partial`); nothing else is communicated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fused._attention_composite import Attended, Options, draw_rng

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_BATCH, _HEADS = 0, 1  # of [B, H, S, D]; packed [S, H, D] and pages have no batch to cut
_NOWHERE = -1

_Given = TypeVar("_Given", Tensor, "Tensor | None")


def attend_sharded(
    attend: Callable[[Tensor, Tensor, Tensor, Options], Attended],
    query: DTensor, key: Tensor, value: Tensor, options: Options,
) -> Attended:  # fmt: skip
    """`attend` on each rank's part of [B, H, S, D] or of packed [S, H, D]; results as the query."""
    packed = options.cu_seqlens_q is not None
    batch = _NOWHERE if packed or query.dim() != 4 else _BATCH
    heads = _HEADS if packed or query.dim() == 4 else _NOWHERE
    cut = _Cut((query, key, value), batch, heads)
    if options.dropout_p > 0:
        options = options._replace(rng=cut.draw_rng(query.device))
    q, k, v = (cut.local(x, batch, heads) for x in (query, key, value))
    out, lse, weights = attend(q, k, v, cut.local_options(options))
    shape = query.shape[:-1]
    whole_weights = None if weights is None else cut.whole(weights, (*shape, key.shape[-2]))
    if lse is not None and packed:
        lse = cut.whole(lse, (shape[1], shape[0]), heads=0)
    elif lse is not None:
        lse = cut.whole(lse, shape)
    return Attended(cut.whole(out, (*shape, value.shape[-1])), lse, whole_weights)


def attend_cache_sharded(
    attend: Callable[..., Attended],
    query: DTensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    k: Tensor | None, v: Tensor | None, block_table: Tensor | None, options: Options,
) -> Attended:  # fmt: skip
    """`attend` on each rank's part. Of pages, which sequences share, only the heads are cut."""
    batch = _BATCH if block_table is None else _NOWHERE
    cut = _Cut((query, k_cache, v_cache), batch, _HEADS)
    if k is not None or v is not None:
        cut.check_in_place("k_cache", k_cache)
        cut.check_in_place("v_cache", v_cache)
    out, lse, _ = attend(
        cut.local(query, batch, _HEADS),
        cut.local(k_cache, batch, _HEADS),
        cut.local(v_cache, batch, _HEADS),
        cut.local(cache_seqlens, batch),
        cut.local(k, batch, _HEADS),
        cut.local(v, batch, _HEADS),
        cut.local(block_table),
        cut.local_options(options),
    )
    assert lse is not None
    shape = query.shape[:-1]
    return Attended(cut.whole(out, (*shape, v_cache.shape[-1])), cut.whole(lse, shape), None)


class _Cut:
    """How a call's batch and heads are cut over the ranks of a mesh.

    As the query's, as far as sequences and groups of heads stay whole. A tensor's own dimensions
    are named where its part is taken; those at `_NOWHERE`, or of size 1, are not cut.
    """

    def __init__(self, tensors: tuple[DTensor, Tensor, Tensor], batch: int, heads: int) -> None:
        """Of query, key and value, and which of their dimensions are the batch and the heads."""
        from torch.distributed.tensor import Replicate

        query = tensors[0]
        self._mesh = query.device_mesh
        self._placements: list[Placement] = []
        same_batch = batch >= 0 and len({1, *(x.shape[batch] for x in tensors)}) == 2
        head_shards = 1
        for dim, placement in enumerate(query.placements):
            kept = same_batch and placement.is_shard(batch)
            if heads >= 0 and placement.is_shard(heads):
                shards = head_shards * self._mesh.size(dim)
                kept = all(x.shape[heads] % shards == 0 for x in tensors)
                head_shards = shards if kept else head_shards
            self._placements.append(placement if kept else Replicate())

    def _own(self, x: Tensor, batch: int, heads: int) -> list[Placement]:
        from torch.distributed.tensor import Replicate, Shard

        own: list[Placement] = []
        for placement in self._placements:
            dim = _NOWHERE
            if isinstance(placement, Shard):
                dim = batch if placement.dim == _BATCH else heads
            own.append(Shard(dim) if dim >= 0 and x.shape[dim] > 1 else Replicate())
        return own

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
            Partial() if cut.is_shard() and part.is_replicate() else part
            for cut, part in zip(self._placements, own, strict=True)
        ]
        return x.redistribute(self._mesh, own).to_local(grad_placements=of_gradient)

    def local_options(self, options: Options) -> Options:
        mask = options.attn_mask
        mask_dims = (_NOWHERE, _NOWHERE) if mask is None else (mask.dim() - 4, mask.dim() - 3)
        return options._replace(
            attn_mask=self.local(mask, *mask_dims),
            alibi_slopes=self.local(options.alibi_slopes, heads=0),
            sink=self.local(options.sink, heads=0),
            cu_seqlens_q=self.local(options.cu_seqlens_q),
            cu_seqlens_k=self.local(options.cu_seqlens_k),
        )

    def check_in_place(self, argument: str, cache: Tensor) -> None:
        """A cache that is written must not be one that is gathered or cut first."""
        from torch.distributed.tensor import DTensor

        own = self._own(cache, _BATCH, _HEADS)
        placed = list(cache.placements) if isinstance(cache, DTensor) else None
        if placed != own:
            raise ValueError(
                f"attention: {argument} must be a DTensor placed as {own}, as q is, where it is "
                f"written, got {placed or 'a plain tensor'}"
            )

    def whole(
        self, x: Tensor, shape: Sequence[int], batch: int = _BATCH, heads: int = _HEADS
    ) -> Tensor:
        """The DTensor of all ranks' parts."""
        from torch.distributed.tensor import DTensor

        size = torch.Size(shape)
        placements = self._own(torch.empty(size, device="meta"), batch, heads)
        strides = torch.empty(size, device="meta").stride()
        return DTensor.from_local(
            x.contiguous(), self._mesh, placements, run_check=False, shape=size, stride=strides
        )

    def draw_rng(self, device: torch.device) -> Tensor:
        """What dropout draws its numbers from: others for each shard, the same for its copies."""
        shard, coordinate = 0, self._mesh.get_coordinate()
        assert coordinate is not None
        for dim, placement in enumerate(self._placements):
            if placement.is_shard():
                shard = shard * self._mesh.size(dim) + coordinate[dim]
        rng = draw_rng(torch.device(device.type))
        return rng + torch.tensor([0, shard << 32], device=rng.device)
