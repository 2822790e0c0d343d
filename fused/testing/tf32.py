"""tf32 as stock PyTorch has it: products of float32 whose factors keep 10 bits behind the point."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# How many of the first arguments are factors.
_PRODUCTS = {
    torch.ops.aten.mm: 2,
    torch.ops.aten.bmm: 2,
    torch.ops.aten.convolution: 2,
    torch.ops.aten.convolution_backward: 3,
}


@contextlib.contextmanager
def tf32_allowed(allowed: bool = True) -> Iterator[None]:
    """Products of float32 on CUDA, emulated or not, may be in tf32, or must not."""
    cudnn: Any = torch.backends.cudnn  # makes its attributes as they are asked for
    settings = (torch.backends.cuda.matmul, cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def round_to_tf32(x: Tensor) -> Tensor:
    """The nearest numbers of 10 bits behind the point, halves away from zero, of float32 ``x``."""
    rounded = (x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)


class Tf32Products(TorchDispatchMode):
    """Rounds the factors of float32's matrix products and convolutions, in backward passes too.

    The derivative of a softmax becomes that of a fused attention, which has no ``sum(p * dp)`` of a
    row but what its output says of it, and there the weights p were a factor.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float32:
            if factors := _PRODUCTS.get(func.overloadpacket):
                args = [*map(round_to_tf32, args[:factors]), *args[factors:]]
            elif func is torch.ops.aten._softmax_backward_data.default:
                grad, weights, dim, _ = args
                return weights * (grad - (grad * round_to_tf32(weights)).sum(dim, keepdim=True))
        return func(*args, **(kwargs or {}))
