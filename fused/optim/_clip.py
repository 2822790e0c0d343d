"""torch.nn.utils's get_total_norm and clip_grad_norm_: one launch for the norm, one to scale."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_ as stock_clip_grad_norm_
from torch.nn.utils import get_total_norm as stock_get_total_norm

from fused import _route
from fused.optim import _sharded


@torch.no_grad()
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.get_total_norm`, for the Euclidean norm in one launch per dtype and device.

    Squares are added up in float64, always in the same order. The host does not wait for the
    result.

    Args:
        tensors: any number, of any shapes, dtypes, layouts and devices. Of DTensors the norm is
            that of the whole tensors, over all ranks.
        norm_type: 2 has a kernel; of others, `inf` too, the norm is stock's.
        error_if_nonfinite: raises RuntimeError for a norm that is NaN or infinite. To know, the
            host waits.
        foreach: accepted, and chooses nothing where a kernel runs.

    Returns:
        A scalar on the first tensor's device, in the dtype that the tensors' dtypes promote to. A
        DTensor if one of `tensors` is, replicated over the mesh of the first.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if _composite_reason("get_total_norm", tensors, norm_type) is not None:
        return stock_get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    norm = _norm(tensors)
    if error_if_nonfinite:
        _refuse_nonfinite(norm, norm_type)
    return _as_stock_returns_it(norm, tensors)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, for the Euclidean norm in two launches.

    Multiplies all gradients in place by `min(1, max_norm / (norm + 1e-6))`; where that is 1 they
    are not written. Neither the norm nor the decision visits the host. The optimizers' own
    `max_norm` does the same inside the step, without this pass over the gradients.

    Args:
        parameters: those without a gradient do not count.
        max_norm: of all gradients together.
        norm_type, error_if_nonfinite, foreach: as `fused.get_total_norm` has them.

    Returns:
        The norm as it was, see `fused.get_total_norm`.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if is_generator and not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3
            )
    grads = [p.grad for p in parameters if p.grad is not None]
    if _composite_reason("clip_grad_norm_", grads, norm_type) is not None:
        return stock_clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    norm = _norm(grads)
    if error_if_nonfinite:
        _refuse_nonfinite(norm, norm_type)
    _scale(grads, norm, float(max_norm))
    return _as_stock_returns_it(norm, grads)


def _composite_reason(op: str, tensors: Sequence[Tensor], norm_type: float) -> str | None:
    """Why stock computes this norm, or None."""
    if not tensors:
        return "there are no tensors"
    if float(norm_type) != 2.0:
        reason: str | None = f"norm_type is {norm_type}"
    else:
        own = (t for t in tensors if not _route.is_sharded(t))  # of DTensors each rank has its part
        reason = _route.composite_reason(*own) or _route.unsupported(*tensors)
    _route.report(op, tensors[0].device, reason)
    return reason


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """In float64, of whole tensors."""
    if _sharded.any_sharded(tensors):
        return _sharded.total_norm(tensors, _local_norm)
    return _local_norm(tensors)


def _local_norm(tensors: Sequence[Tensor]) -> Tensor:
    if _route.is_traced(*tensors):
        return torch.ops.fused.total_norm(tensors)
    return _route.kernels().total_norm(tensors)


def _scale(tensors: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    sharded = []
    if _sharded.any_sharded(tensors):
        sharded = [t for t in tensors if _route.is_sharded(t)]
        tensors = [t.to_local() if _route.is_sharded(t) else t for t in tensors]
    if _route.is_traced(*tensors):
        torch.ops.fused.clip_by_norm_(tensors, norm, max_norm)
    else:
        _route.kernels().clip_by_norm_(tensors, norm, max_norm)
    if sharded:  # what was written were their local tensors
        torch.autograd.graph.increment_version(sharded)


def _refuse_nonfinite(norm: Tensor, norm_type: float) -> None:
    if not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from "
            "`parameters` is non-finite, so it cannot be clipped. To disable "
            "this error and scale the gradients by the non-finite norm anyway, "
            "set `error_if_nonfinite=False`"
        )


def _as_stock_returns_it(norm: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    dtype = functools.reduce(torch.promote_types, {t.dtype for t in tensors})
    norm = norm.to(dtype)
    whole = next(filter(_route.is_sharded, tensors), None)
    return norm if whole is None else _sharded.replicated(norm, whole)
