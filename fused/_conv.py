"""Convolution: signatures, routing and derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused import _route

_STOCK = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# Their derivative needs what went in; the others' is found from what came out.
_NEEDS_PRE = ("gelu", "silu")

_Ints = int | Sequence[int]

_DOC = """{axes}-d convolution with bias and activation in one kernel.

    Signature and meaning of :func:`torch.nn.functional.conv{axes}d`. An implicit matrix product: no
    tensor of patches is made, and contiguous and channels-last tensors are read and written as they
    lie. Deterministic, forward and backward. On CUDA from sm_80 on, tensor cores multiply float16
    and bfloat16, and float32 in tf32 unless ``torch.backends.cudnn.conv.fp32_precision`` (or the
    older ``torch.backends.cudnn.allow_tf32``) says otherwise: PyTorch allows it by default.

    Args:
        input: ``[N, C, {space}]`` or ``[C, {space}]``, float32, float64, float16 or bfloat16.
        weight: ``[K, C / groups, {kernel}]``.
        bias: ``[K]``.
        stride: an int or one for each axis; so are ``padding`` and ``dilation``.
        padding: zeros before and after each axis, or ``"valid"`` (none), or ``"same"`` (as many as
            keep the size; more of them after, where their number is odd).
        dilation: distance of neighbouring taps.
        groups: splits channels into groups that do not mix.
        activation: None, ``"relu"``, ``"gelu"``, ``"silu"``, ``"leaky_relu"``, ``"sigmoid"`` or
            ``"tanh"``, applied to the sum before it is rounded.

    Returns:
        ``[N, K, {space}]``, channels-last where the input or the weight is.

    Raises:
        TypeError: dtypes that differ.
        ValueError: shapes, options or devices that do not go together, or an unknown activation.
    """


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: str | _Ints = 0,
    dilation: _Ints = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    return _conv(1, input, weight, bias, stride, padding, dilation, groups, activation)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: str | _Ints = 0,
    dilation: _Ints = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    return _conv(2, input, weight, bias, stride, padding, dilation, groups, activation)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: str | _Ints = 0,
    dilation: _Ints = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    return _conv(3, input, weight, bias, stride, padding, dilation, groups, activation)


conv1d.__doc__ = _DOC.format(axes=1, space="L", kernel="k")
conv2d.__doc__ = _DOC.format(axes=2, space="H, W", kernel="kH, kW")
conv3d.__doc__ = _DOC.format(axes=3, space="D, H, W", kernel="kD, kH, kW")


def check_activation(op: str, activation: str | None) -> None:
    if activation is not None and activation not in _ACTIVATIONS:
        *names, last = map(repr, _ACTIVATIONS)
        raise ValueError(
            f"{op}: activation must be None, {', '.join(names)} or {last}, got {activation!r}"
        )


def _conv(
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Ints,
    padding: str | _Ints,
    dilation: _Ints,
    groups: int,
    activation: str | None,
) -> Tensor:
    op = f"conv{axes}d"
    check_activation(op, activation)
    input, weight, bias = _route.autocast(input.device.type, input, weight, bias)
    reason = _route.composite_reason(input, weight, bias) or _route.unsupported(input, weight, bias)
    _route.report(op, input.device, reason)
    if reason is not None:
        out = _STOCK[axes](input, weight, bias, stride, padding, dilation, groups)
        return out if activation is None else _ACTIVATIONS[activation](out)
    if input.dim() not in (axes + 1, axes + 2):
        raise ValueError(
            f"{op}: input must have {axes + 1} or {axes + 2} dimensions, got {list(input.shape)}"
        )
    stride = _per_axis(op, axes, "stride", stride)
    dilation = _per_axis(op, axes, "dilation", dilation)
    options = (stride, _pad(op, axes, weight, stride, padding, dilation), dilation, groups)
    if input.dim() == axes + 1:
        return _run(input.unsqueeze(0), weight, bias, *options, activation).squeeze(0)
    return _run(input, weight, bias, *options, activation)


def _per_axis(op: str, axes: int, argument: str, value: _Ints) -> list[int]:
    """One element per axis: an int and a single element stand for all, as in stock."""
    if isinstance(value, int | torch.SymInt):
        return [value] * axes
    values = list(value) if isinstance(value, Sequence) else []
    if len(values) not in (1, axes):
        raise ValueError(f"{op}: {argument} must be one int or {axes}, got {value}")
    return values * axes if len(values) == 1 else values


def _pad(
    op: str,
    axes: int,
    weight: Tensor,
    stride: list[int],
    padding: str | _Ints,
    dilation: list[int],
) -> list[int]:
    """What goes before each axis, then what goes after each."""
    if not isinstance(padding, str):
        return _per_axis(op, axes, "padding", padding) * 2
    if padding == "valid":
        return [0] * (2 * axes)
    if padding != "same":
        raise ValueError(f"{op}: padding must be numbers, 'valid' or 'same', got {padding!r}")
    if any(s != 1 for s in stride):
        raise ValueError(f"{op}: stride must be 1 with padding='same', got {stride}")
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=False)]
    return [total // 2 for total in totals] + [total - total // 2 for total in totals]


def _run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str | None,
) -> Tensor:
    """[N, C, space] in, [N, K, out space] out, by the kernels."""
    options = (stride, padding, dilation, groups, activation)
    needs_grad = _route.needs_grad(input, weight, bias)
    if _route.is_traced(input, weight, bias):
        save_pre = needs_grad and activation in _NEEDS_PRE
        return torch.ops.fused.conv_forward(input, weight, bias, *options, save_pre)[0]
    if needs_grad:
        return ConvFunction.apply(input, weight, bias, *options)
    return _route.kernels().conv_forward(input, weight, bias, *options, False)[0]


class ConvFunction(torch.autograd.Function):
    """The kernels as one differentiable function of input, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
    ) -> Tensor:
        activation = options[-1]
        save_pre = activation in _NEEDS_PRE
        out, pre = _route.kernels().conv_forward(input, weight, bias, *options, save_pre)
        saved = None if activation is None else pre if save_pre else out
        ctx.save_for_backward(input, weight, bias, saved)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        traced = _route.is_traced(grad_out)
        return _gradients(ctx, torch.ops.fused if traced else _route.kernels(), grad_out)


def _gradients(ctx: Any, ops: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the op's inputs, by `ops.conv_backward` where it can."""
    input, weight, bias, saved = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    if _route.needs_composite_gradients(grad_out):

        def composite(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return conv_composite(input, weight, bias, *ctx.options)

        grads = _route.composite_gradients(composite, (input, weight, bias), (grad_out,))
    else:
        grads = ops.conv_backward(grad_out, input, weight, saved, *ctx.options, *wanted)
    kept = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return (*kept, *[None] * len(ctx.options))


def conv_composite(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str | None,
) -> Tensor:
    """What the kernels compute in plain PyTorch operators, for derivatives of derivatives."""
    axes = len(stride)
    before, after = padding[:axes], padding[axes:]
    if before != after:
        around = [n for pair in zip(before, after, strict=True) for n in reversed(pair)]
        input, before = F.pad(input, around[::-1]), [0] * axes
    # What autocast casts is cast already.
    with _route.without_autocast(input.device.type):
        out = _STOCK[axes](input, weight, bias, stride, before, dilation, groups)
        return out if activation is None else _ACTIVATIONS[activation](out)


def _memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """As stock: channels-last if the input or the weight is."""
    if input.dim() < 4:
        return torch.contiguous_format
    wanted = torch._prims_common.suggest_memory_format(input)
    if wanted != torch.contiguous_format:
        return wanted
    return torch._prims_common.suggest_memory_format(weight)


@torch.library.register_fake("fused::conv_forward")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, *_, save_pre = options
    axes = len(stride)
    shape = [input.shape[0], weight.shape[0]]
    for axis in range(axes):
        padded = input.shape[2 + axis] + padding[axis] + padding[axes + axis]
        reach = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        shape.append((padded - reach) // stride[axis] + 1)
    layout = _memory_format(input, weight)
    out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    return out, torch.empty_like(out) if save_pre else input.new_empty([0])


@torch.library.register_fake("fused::conv_backward")
def _(grad_output: Tensor, input: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, want_input, want_weight, want_bias = options
    layout = _memory_format(input, weight)

    def like(tensor: Tensor, want: bool) -> Tensor:
        if not want:
            return tensor.new_empty([0])
        return torch.empty(
            tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout
        )

    grad_bias = weight.new_empty([weight.shape[0] if want_bias else 0])
    return like(input, want_input), like(weight, want_weight), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, bias, *options, _ = inputs
    out, pre = output
    activation = options[-1]
    saved = None if activation is None else pre if activation in _NEEDS_PRE else out
    ctx.save_for_backward(input, weight, bias, saved)
    ctx.options = tuple(options)


def _traced_backward(ctx: Any, grad_out: Tensor, grad_pre: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, torch.ops.fused, grad_out), None)


torch.library.register_autograd(
    "fused::conv_forward", _traced_backward, setup_context=_setup_context
)
