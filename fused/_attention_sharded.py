"""Attention over DTensors: heads and sequences do not see each other, so each rank attends its own.

Batch and heads may be sharded over any dimensions of the mesh (tensor and data parallelism); what
is sharded in another way is gathered first. A mask, slopes or a sink that shards share get
gradients that are sums over ranks still to be made (`Partial`); nothing else is communicated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused._attention_composite import Attended, Options, draw_rng

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_BATCH, _HEADS = 0, 1


def attend_sharded(
    attend: Callable[[Tensor, Tensor, Tensor, Options], Attended],
    query: DTensor, key: Tensor, value: Tensor, options: Options,
) -> Attended:  # fmt: skip
    """`attend` on each rank's part of [B, H, S, D]; what it gives is placed as the query was."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = query.device_mesh
    placements = _placements(query, key, value)

    def local(x: Tensor, dims: Sequence[int]) -> Tensor:
        """This rank's part, where dims of x are the batch and the heads; below 0 it has none."""
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
        own: list[Placement] = []
        for placement in placements:
            dim = dims[placement.dim] if isinstance(placement, Shard) else -1
            own.append(Shard(dim) if dim >= 0 and x.shape[dim] > 1 else Replicate())
        of_gradient = [
            Partial() if isinstance(whole, Shard) and isinstance(part, Replicate) else part
            for whole, part in zip(placements, own, strict=True)
        ]
        return x.redistribute(mesh, own).to_local(grad_placements=of_gradient)

    mask, slopes, sink = options[:3]
    mask_dims = () if mask is None else (mask.dim() - 4, mask.dim() - 3)
    if options.dropout_p > 0:
        options = options._replace(rng=_rng_of_shard(query.device.type, mesh, placements))
    own_options = options._replace(
        attn_mask=None if mask is None else local(mask, mask_dims),
        alibi_slopes=None if slopes is None else local(slopes, (-1, 0)),
        sink=None if sink is None else local(sink, (-1, 0)),
    )
    q, k, v = (local(x, (_BATCH, _HEADS)) for x in (query, key, value))
    out, lse, weights = attend(q, k, v, own_options)

    def whole(x: Tensor | None, *last: int) -> Tensor | None:
        if x is None:
            return None
        shape = torch.Size((*query.shape[:-1], *last))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            x.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
        )

    result = whole(out, value.shape[-1])
    assert result is not None
    return Attended(result, whole(lse), whole(weights, key.shape[-2]))


def _placements(query: DTensor, key: Tensor, value: Tensor) -> list[Placement]:
    """Those of the query, as far as sequences and groups of heads stay whole in them."""
    from torch.distributed.tensor import Replicate, Shard

    shapes = [x.shape for x in (query, key, value)]
    same_batch = query.dim() == 4 and len({shape[:1] for shape in shapes}) == 1
    placements: list[Placement] = []
    head_shards = 1
    for dim, placement in enumerate(query.placements):
        size = query.device_mesh.size(dim)
        kept = isinstance(placement, Shard) and same_batch and placement.dim in (_BATCH, _HEADS)
        if kept and placement.is_shard(_HEADS):
            head_shards *= size
            kept = all(shape[_HEADS] % head_shards == 0 for shape in shapes)
            head_shards = head_shards if kept else head_shards // size
        placements.append(placement if kept else Replicate())
    return placements


def _rng_of_shard(device: Any, mesh: Any, placements: Sequence[Placement]) -> Tensor:
    """What dropout draws its numbers from: others for each shard, the same for its copies."""
    shard, coordinate = 0, mesh.get_coordinate()
    for dim, placement in enumerate(placements):
        if placement.is_shard():
            shard = shard * mesh.size(dim) + coordinate[dim]
    rng = draw_rng(torch.device(device))
    return rng + torch.tensor([0, shard << 32], device=rng.device)
