"""The definition of convolution in one, two and three dimensions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
}


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """act(bias[k] + sum over c, t of weight[k, c, t] input[n, c, o s - p + t d]) in float64.

    input ``[N, C, space]``, weight ``[K, C / groups, kernel]``; the input is zero outside.
    """
    kernel = weight.shape[2:]
    stride, dilation = _per_axis(stride, kernel), _per_axis(dilation, kernel)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        around = [n for total in reversed(reach) for n in (total // 2, total - total // 2)]
    else:
        before = _per_axis(0 if isinstance(padding, str) else padding, kernel)
        around = [n for p in reversed(before) for n in (p, p)]
    x, w = torch.nn.functional.pad(input.double(), around), weight.double()
    sizes = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    x = x.unflatten(1, (groups, x.shape[1] // groups))
    w = w.unflatten(0, (groups, w.shape[0] // groups))
    out = torch.zeros((), dtype=torch.float64, device=x.device)
    for tap in itertools.product(*map(range, kernel)):
        axes = zip(tap, dilation, stride, sizes, strict=True)
        at = [slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in axes]
        out = out + torch.einsum("ngc...,gkc->ngk...", x[(..., *at)], w[(..., *tap)])
    out = out.flatten(1, 2)
    if bias is not None:
        out = out + bias.double().view(-1, *[1] * len(sizes))
    return _ACTIVATIONS[activation](out)


def _per_axis(value: int | Sequence[int], kernel: Sequence[int]) -> Sequence[int]:
    return [value] * len(kernel) if isinstance(value, int) else value


conv1d = conv2d = conv3d = conv
