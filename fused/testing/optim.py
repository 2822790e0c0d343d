"""The optimizers' extras in plain PyTorch operators, at the precision of the kernels' storage.

What `fused.testing.assert_as_accurate_as_stock` measures a low-precision run by: the same maths,
the same ways of storing, no kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused.optim import _state
from fused.optim._options import StepOptions

Entry = dict[str, Any]


def plain_run(
    rule: str,
    start: list[Tensor],
    grads: list[list[Tensor]],
    options: dict[str, Any],
    extras: StepOptions,
) -> list[Entry]:
    """Parameters and states after a step of `rule` ("adam", "adamw" or "sgd") for each list of
    gradients, moments and averages as values in the dtype of the maths."""
    params = [p.detach().clone() for p in start]
    entries: list[Entry] = [{} for _ in params]
    for p, entry in zip(params, entries, strict=True):
        for name in moments_of(rule, options):
            entry |= _state.new_moment(p, name, extras.state_dtype_of(p))
        entry |= _state.new_extras(p, extras, {})
        entry["step"] = 0
    for step_grads in grads:
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in step_grads))
        if extras.nonfinite == "skip" and not math.isfinite(norm):
            continue
        factor = 1.0
        if extras.max_norm is not None:
            factor = min(1.0, extras.max_norm / (norm + 1e-6))
        for p, g, entry in zip(params, step_grads, entries, strict=True):
            _step(rule, p, g, entry, options, extras, factor)
    return [
        {"param": p, **{name: value_of(entry, name) for name in entry if not _is_hidden(name)}}
        for p, entry in zip(params, entries, strict=True)
    ]


def moments_of(rule: str, options: dict[str, Any]) -> list[str]:
    if rule == "sgd":
        return ["momentum_buffer"] if options.get("momentum", 0) else []
    return ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(options.get("amsgrad"))


def value_of(entry: Entry, name: str) -> Tensor:
    """A state's values: those of its codes where it has a scale."""
    scale = entry.get(_state.scale_name(name))
    return entry[name] if scale is None else _state.dequantize(entry[name], scale)


def _is_hidden(name: str) -> bool:
    return name in ("step", "master", "remainder") or name.endswith("_scale")


def _step(
    rule: str,
    param: Tensor,
    grad: Tensor,
    entry: Entry,
    options: dict[str, Any],
    extras: StepOptions,
    factor: float,
) -> None:
    maths = torch.float64 if param.dtype == torch.float64 else torch.float32
    p = _exact(param, entry).to(maths)
    g = grad.to(maths) * (-factor if options.get("maximize") else factor)
    states = {name: value_of(entry, name).to(maths) for name in moments_of(rule, options)}
    entry["step"] += 1
    p = (
        _sgd(p, g, states, entry["step"], options)
        if rule == "sgd"
        else _adam(p, g, states, entry["step"], options, decoupled=rule == "adamw")
    )
    for name, value in states.items():
        if _state.scale_name(name) in entry:
            codes, scale = _state.quantize(value.float(), unsigned=_state.is_unsigned(name))
            entry[name], entry[_state.scale_name(name)] = codes, scale
        else:
            entry[name] = value.to(entry[name].dtype)
    _store(param, p, entry, extras)
    if "ema" in entry:
        decay = extras.ema_decay or 0.0
        entry["ema"] = decay * entry["ema"] + (1 - decay) * _exact(param, entry).to(maths)


def _exact(param: Tensor, entry: Entry) -> Tensor:
    if "remainder" in entry:
        return _state.join_remainder(param, entry["remainder"])
    return entry.get("master", param)


def _store(param: Tensor, value: Tensor, entry: Entry, extras: StepOptions) -> None:
    if "master" in entry:
        entry["master"] = value
    if "remainder" in entry:
        bits = value.view(torch.int32)
        high = (bits + 0x8000) >> 16
        param.copy_(high.to(torch.int16).view(torch.bfloat16))
        entry["remainder"] = (bits - (high << 16)).to(torch.int16)
    elif extras.stochastic_rounding and param.dtype == torch.bfloat16:
        noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32)
        bits = (value.contiguous().view(torch.int32) + noise) >> 16 << 16
        param.copy_(bits.view(torch.float32))
    else:
        param.copy_(value)


def _adam(
    p: Tensor, g: Tensor, states: Entry, t: int, options: dict[str, Any], *, decoupled: bool
) -> Tensor:
    lr, decay = options.get("lr", 1e-3), options.get("weight_decay", 1e-2 if decoupled else 0.0)
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    if decoupled:
        p = p * (1 - lr * decay)
    elif decay:
        g = g + decay * p
    m = beta1 * states["exp_avg"] + (1 - beta1) * g
    v = beta2 * states["exp_avg_sq"] + (1 - beta2) * g * g
    states |= {"exp_avg": m, "exp_avg_sq": v}
    if "max_exp_avg_sq" in states:
        v = states["max_exp_avg_sq"] = torch.maximum(states["max_exp_avg_sq"], v)
    denominator = v.sqrt() / math.sqrt(1 - beta2**t) + options.get("eps", 1e-8)
    return p - lr / (1 - beta1**t) * m / denominator


def _sgd(p: Tensor, g: Tensor, states: Entry, t: int, options: dict[str, Any]) -> Tensor:
    momentum = options.get("momentum", 0.0)
    g = g + options.get("weight_decay", 0.0) * p
    if momentum:
        rest = 1 - options.get("dampening", 0.0)
        buffer = g if t == 1 else momentum * states["momentum_buffer"] + rest * g
        states["momentum_buffer"] = buffer
        g = g + momentum * buffer if options.get("nesterov") else buffer
    return p - options.get("lr", 1e-3) * g
