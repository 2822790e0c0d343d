"""tf32 as stock PyTorch has it: products of float32 whose factors keep 10 bits behind the point."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm)


@contextlib.contextmanager
def tf32_allowed(allowed: bool = True) -> Iterator[None]:
    """Products of float32 on CUDA, emulated or not, may be in tf32, or must not."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def round_to_tf32(x: Tensor) -> Tensor:
    """The nearest numbers of 10 bits behind the point, halves away from zero, of float32 ``x``."""
    rounded = (x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)


class Tf32Products(TorchDispatchMode):
    """Rounds the factors of matrix products of float32, in backward passes too.

    The derivative of a softmax becomes that of a fused attention, which has no ``sum(p * dp)`` of a
    row but what its output says of it, and there the weights p were a factor.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float32:
            if func.overloadpacket in _PRODUCTS:
                args = [round_to_tf32(factor) for factor in args]
            elif func is torch.ops.aten._softmax_backward_data.default:
                grad, weights, dim, _ = args
                return weights * (grad - (grad * round_to_tf32(weights)).sum(dim, keepdim=True))
        return func(*args, **(kwargs or {}))
