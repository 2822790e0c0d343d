"""The definitions of Adam, AdamW and SGD: whole trajectories of one parameter.

What the optimizers have beyond stock is no other maths but for the moving average: clipping is
`clipped` applied to the gradients first, a skipped step is a step that is left out.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def clipped(grads: Iterable[Tensor], max_norm: float) -> list[Tensor]:
    """The gradients of one step, in float64, clipped to the norm of all of them together."""
    exact = [grad.double() for grad in grads]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in exact]))
    return [grad * torch.clamp(max_norm / (norm + 1e-6), max=1.0) for grad in exact]


def adam(
    param: Tensor,
    grads: Iterable[Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    ema_decay: float | None = None,
) -> dict[str, Tensor]:
    """One step of Adam for each gradient, in float64: parameter and moments at the end."""
    p = average = param.detach().double()
    m, v, v_max = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for t, grad in enumerate(grads, start=1):
        g = -grad.double() if maximize else grad.double()
        if decoupled_weight_decay:
            p = p * (1 - lr * weight_decay)
        elif weight_decay != 0:
            g = g + weight_decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        v_max = torch.maximum(v_max, v)
        second = (v_max if amsgrad else v) / (1 - betas[1] ** t)
        p = p - lr * (m / (1 - betas[0] ** t)) / (second.sqrt() + eps)
        if ema_decay is not None:
            average = ema_decay * average + (1 - ema_decay) * p
    state = {"param": p, "exp_avg": m, "exp_avg_sq": v}
    state |= {"max_exp_avg_sq": v_max} if amsgrad else {}
    return state if ema_decay is None else state | {"ema": average}


def sgd(
    param: Tensor,
    grads: Iterable[Tensor],
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    ema_decay: float | None = None,
) -> dict[str, Tensor]:
    """One step of SGD for each gradient, in float64: parameter and momentum at the end."""
    p = average = param.detach().double()
    buffer = None
    for grad in grads:
        g = -grad.double() if maximize else grad.double()
        if weight_decay != 0:
            g = g + weight_decay * p
        if momentum != 0:
            buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
            g = g + momentum * buffer if nesterov else buffer
        p = p - lr * g
        if ema_decay is not None:
            average = ema_decay * average + (1 - ema_decay) * p
    state = {"param": p} if buffer is None else {"param": p, "momentum_buffer": buffer}
    return state if ema_decay is None else state | {"ema": average}
