"""DTensor parameters (FSDP2, tensor parallelism): the step on each rank's own shards.

A DTensor is a tensor subclass, which no kernel can read, but what it holds on this rank is a plain
tensor. Adam and SGD work element by element, so the step on the local tensors is the step on the
whole. This is the one place that knows the way there and back.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused._route import is_sharded
from fused.optim._options import StepOptions

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Entry = dict[str, Any]  # the state of one parameter

# A plain number beside every parameter, as in stock; never a shard of anything.
_STEP = "step"


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(map(is_sharded, tensors))


@contextlib.contextmanager
def local_tensors(optimizer: Optimizer) -> Iterator[None]:
    """Puts local tensors in the place of the DTensors among an optimizer's parameters and states.

    Within, `optimizer.param_groups` and `optimizer.state` hold plain tensors that share memory with
    the DTensors, gradients included. A state that begins within becomes a DTensor placed as its
    parameter, so that a checkpoint knows of what it is a shard.
    """
    groups, state = optimizer.param_groups, optimizer.state
    params = [p for group in groups for p in group["params"]]
    shards: dict[Tensor, _Shard] = {p: _Shard(p, state.get(p, {})) for p in params if is_sharded(p)}
    by_local = {shard.local: shard for shard in shards.values()}
    local_state: defaultdict[Any, Entry] = defaultdict(dict)
    for p, entry in state.items():
        if p in shards:
            local_state[shards[p].local] = shards[p].entry
        else:
            local_state[p] = entry
    optimizer.state = local_state
    optimizer.param_groups = [
        {**group, "params": [shards[p].local if p in shards else p for p in group["params"]]}
        for group in groups
    ]
    try:
        yield
    finally:
        optimizer.param_groups, optimizer.state = groups, state
        for p, entry in local_state.items():
            if p in by_local:
                by_local[p].close(state, entry)
            else:
                state[p] = entry
        for shard in shards.values():
            shard.finish()


class _Shard:
    """A DTensor parameter and what belongs to it, as plain tensors of this rank."""

    def __init__(self, whole: DTensor, entry: Entry) -> None:
        self._whole = whole
        self._opened: list[tuple[DTensor, Tensor, int]] = []  # with the local tensor's version
        self.local = self._open(whole).detach()  # an object whose gradient nobody else sees
        if is_sharded(whole.grad):
            if whole.grad.placements != whole.placements:
                whole.grad = self._placed(whole.grad)
            if hasattr(self.local, "grad_dtype"):
                self.local.grad_dtype = None  # the step itself says which it takes
            self.local.grad = self._open(whole.grad)
        for name, value in entry.items():
            if is_sharded(value) and value.placements != whole.placements:
                entry[name] = self._placed(value)
        self.entry = {n: self._open(v) if is_sharded(v) else v for n, v in entry.items()}
        self._given = dict(self.entry)

    def _placed(self, other: DTensor) -> DTensor:
        mesh, placements = self._whole.device_mesh, self._whole.placements
        if other.dtype != torch.int16:
            return other.redistribute(mesh, placements)
        # Collectives know no int16: remainders go as the bits of a type that they know.
        bits = _of_shards(other.to_local().view(torch.bfloat16), other)
        moved = bits.redistribute(mesh, placements)
        return _of_shards(moved.to_local().view(torch.int16), moved)

    def _open(self, whole: DTensor) -> Tensor:
        local = whole.to_local()
        self._opened.append((whole, local, local._version))
        return local

    def close(self, state: dict[Any, Entry], local_entry: Entry) -> None:
        """Takes over the states that the step has begun, replaced or put others in place of."""
        for name in self._given.keys() - local_entry.keys():
            del state[self._whole][name]
        for name, value in local_entry.items():
            if value is not self._given.get(name):
                entry = state.setdefault(self._whole, {})
                entry[name] = self._closed(value) if name != _STEP else value

    def _closed(self, value: object) -> object:
        if not isinstance(value, Tensor) or value.shape != self.local.shape:
            return value
        return _of_shards(value, self._whole)

    def finish(self) -> None:
        # Who writes to a local tensor marks that one; the DTensor has a version of its own.
        written = [whole for whole, local, version in self._opened if local._version > version]
        torch.autograd.graph.increment_version(written)


def _of_shards(local: Tensor, like: DTensor) -> DTensor:
    """A DTensor of what every rank holds, placed as another."""
    from torch.distributed.tensor import DTensor

    # The shape is told, for from_local would take uneven shards for even ones.
    return DTensor.from_local(
        local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def total_norm(tensors: Iterable[Tensor], local_norm: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """The Euclidean norm over all ranks, on each of them. The host does not wait for it.

    A shard counts for the ranks that hold the others; what is replicated counts once.
    """
    parts: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if not is_sharded(tensor):
            parts[None, ()].append(tensor)
            continue
        tensor = _summed(tensor)
        split = [d for d, placement in enumerate(tensor.placements) if not placement.is_replicate()]
        parts[tensor.device_mesh, tuple(split)].append(tensor.to_local())
    squares = []
    for (mesh, dimensions), local in parts.items():
        square = local_norm(local).square()
        if mesh is not None:
            for dimension in dimensions:
                torch.distributed.all_reduce(square, group=mesh.get_group(dimension))
        squares.append(square)
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def _summed(tensor: DTensor) -> DTensor:
    """With no placement that leaves a sum to be done."""
    from torch.distributed.tensor import Replicate

    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(tensor.device_mesh, placements)


def replicated(scalar: Tensor, like: DTensor) -> Tensor:
    """A tensor that every rank of the mesh of `like` holds."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(scalar, mesh, [Replicate()] * mesh.ndim)


def check_zero_redundancy_optimizer(op: str, options: StepOptions) -> None:
    """Raises ValueError for what concerns all gradients, inside a ZeroRedundancyOptimizer.

    That makes an optimizer of this rank's share of the parameters, and hands over nothing by which
    to tell: it can only be seen on the stack.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    given = options.given()
    concerned = [name for name in ("max_norm", "nonfinite", "zero_grad") if name in given]
    if module is None or not concerned:
        return
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            raise ValueError(
                f"{op}: {concerned[0]} must be left out inside ZeroRedundancyOptimizer, where a "
                f"rank sees its own gradients only, got {given[concerned[0]]!r}"
            )
