"""LSTM: the cell and one layer over all time steps; signature, routing and derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused import _route


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | list[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: gates, cell and hidden update in one kernel after the two products.

    Signature and meaning of :func:`torch.lstm_cell`.

    Args:
        input: ``[B, I]``, float32, float64, float16 or bfloat16.
        hx: the hidden and the cell state, each ``[B, H]``.
        w_ih: ``[4H, I]``, in the order of the input, forget, cell and output gate.
        w_hh: ``[4H, H]``.
        b_ih: ``[4H]``, or None for no bias.
        b_hh: ``[4H]``, or None for no bias.

    Returns:
        The next hidden and cell state, each ``[B, H]``.

    Raises:
        TypeError: dtypes that differ or that are not floating; a tensor as hx.
        ValueError: shapes or devices that do not go together.
        RuntimeError: hx is no pair.
    """
    h, c = pair_of_states("lstm_cell", hx)
    tensors: Any = (input, h, c, w_ih, w_hh, b_ih, b_hh)
    reason = _route.composite_reason(*tensors)
    if reason is None:
        tensors = _route.autocast(input.device.type, *tensors)
        reason = unsupported(*tensors)
    _route.report("lstm_cell", input.device, reason)
    if _route.is_transformed():  # stock's cell adds in place, which vmap over weights refuses
        return lstm_cell_composite(input, h, c, w_ih, w_hh, b_ih, b_hh)
    if reason is not None:
        return torch.lstm_cell(input, (h, c), w_ih, w_hh, b_ih, b_hh)
    if _route.is_traced(*tensors):
        h_next, c_next, _ = torch.ops.fused.lstm_cell_forward(*tensors)
    elif _route.needs_grad(*tensors):
        h_next, c_next = LSTMCellFunction.apply(*tensors)
    else:
        h_next, c_next, _ = _route.kernels().lstm_cell_forward(*tensors)
    if tensors[0] is not input or tensors[2] is not c:
        # On the CPU autocast reaches only the products in PyTorch's own cell, so that the state
        # keeps its precision; on other devices it casts the whole cell.
        state = state_dtype(c, tensors[2])
        h_next, c_next = h_next.to(state), c_next.to(state)
    return h_next, c_next


def pair_of_states(op: str, hx: Any) -> tuple[Tensor, Tensor]:
    """Both states; PyTorch's own errors for a lone one, whose rows would unpack, and for others."""
    if isinstance(hx, Tensor):
        raise TypeError(f"{op}(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
    if len(hx) != 2:
        raise RuntimeError(f"{op} expects two hidden states")
    return hx[0], hx[1]


def state_dtype(given: Tensor, cast: Tensor) -> torch.dtype:
    """The dtype of a state that PyTorch's own LSTM returns, for one given that autocast casts."""
    on_cpu = given.device.type == "cpu"
    return torch.promote_types(given.dtype, cast.dtype) if on_cpu else cast.dtype


def lstm_layer(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction over all time steps, for :class:`fused.LSTM`.

    Args:
        input: ``[T, B, D]``, or ``[N, D]`` with the ``batch_sizes`` of a PackedSequence.
        h0: ``[B, P]``; P is H where there is no projection.
        c0: ``[B, H]``.
        w_hr: ``[P, H]``, projects each hidden state, or None.
        reverse: begin at the last time step.

    Returns:
        output ``[T, B, P]`` or ``[N, P]``, and the last hidden and cell state.
    """
    tensors = (input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    options = (batch_sizes, reverse)
    reason = _route.composite_reason(*tensors)
    _route.report("lstm", input.device, reason)
    if reason is not None:
        return lstm_layer_composite(*tensors, *options)
    if _route.is_traced(*tensors):
        return _registered("lstm_layer_forward", batch_sizes)(*tensors, *options)[:3]
    if _route.needs_grad(*tensors):
        return LSTMLayerFunction.apply(*tensors, *options)
    return _route.kernels().lstm_layer_forward(*tensors, *options)[:3]


def unsupported(input: Tensor, h: Tensor, c: Tensor, *weights: Tensor | None) -> str | None:
    """Why no kernel takes these tensors, or None. PyTorch's own operators take what is left."""
    if c.dtype != input.dtype and all(t is None or t.dtype == input.dtype for t in (h, *weights)):
        return f"c is {c.dtype}, all else {input.dtype}"  # which PyTorch promotes
    return _route.unsupported(input, h, c, *weights)


def _registered(name: str, batch_sizes: Tensor | None) -> Any:
    """The registered op for padded input, or the one for packed input (csrc/bindings/library.cpp).

    Only the first may be part of a CUDA graph, which would go through the lengths of the batch that
    it was recorded with again and again.
    """
    op = getattr(torch.ops.fused, name)
    return op.default if batch_sizes is None else op.packed


class LSTMCellFunction(torch.autograd.Function):
    """The cell's kernels as one differentiable function of input, states and weights."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs = _route.kernels().lstm_cell_forward(*tensors)
        ctx.set_materialize_grads(False)
        _setup_cell(ctx, tensors, outputs)
        return outputs[:2]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        ops = torch.ops.fused if _route.is_traced(*grad_outputs) else _route.kernels()
        return _cell_gradients(ctx, ops, grad_outputs)


def _setup_cell(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # No output: RL loops write the states of ended episodes in place.
    ctx.save_for_backward(*inputs, output[2])


def _cell_gradients(
    ctx: Any, ops: Any, grad_outputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    *tensors, gates = ctx.saved_tensors
    if _route.needs_composite_gradients(*grad_outputs):
        return _route.composite_gradients(lstm_cell_composite, tensors, grad_outputs)
    wanted = ctx.needs_input_grad
    needs = [*wanted[:5], wanted[5] or wanted[6]]
    grads = ops.lstm_cell_backward(*grad_outputs, *tensors[:5], gates, needs)
    grads = (*grads[:5], grads[5], grads[5])
    return tuple(g if needed else None for g, needed in zip(grads, wanted, strict=True))


class LSTMLayerFunction(torch.autograd.Function):
    """The layer's kernels as one differentiable function of input, states and weights."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        outputs = _route.kernels().lstm_layer_forward(*arguments)
        ctx.set_materialize_grads(False)
        _setup_layer(ctx, arguments, outputs)
        return outputs[:3]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return _layer_gradients(ctx, grad_outputs, registered=_route.is_traced(*grad_outputs))


def _setup_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, output[0], *output[3:])


def _layer_gradients(
    ctx: Any, grad_outputs: tuple[Tensor | None, ...], *, registered: bool = True
) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors  # once: each time unpacks all of them, which a checkpoint refuses
    tensors, batch_sizes, saved = given[:8], given[8], given[9:]
    options = (batch_sizes, ctx.reverse)
    if _route.needs_composite_gradients(*grad_outputs):
        inputs = (*tensors, *options)
        return _route.composite_gradients(lstm_layer_composite, inputs, grad_outputs)
    wanted = ctx.needs_input_grad
    needs = [*wanted[:5], wanted[5] or wanted[6], wanted[7]]
    name = "lstm_layer_backward"
    backward = _registered(name, batch_sizes) if registered else getattr(_route.kernels(), name)
    grads = backward(*grad_outputs, *tensors[:5], tensors[7], *options, *saved, needs)
    grads = (*grads[:5], grads[5], grads[5], grads[6], None, None)
    return tuple(g if needed else None for g, needed in zip(grads, wanted, strict=True))


def lstm_cell_composite(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The cell in plain PyTorch operators, for derivatives of derivatives and torch.func."""
    linear = torch.nn.functional.linear
    i, f, g, o = (linear(input, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, dim=-1)
    c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c_next.tanh(), c_next


def lstm_layer_composite(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer in plain PyTorch operators, for derivatives of derivatives and torch.func."""
    steps = list(input.unbind(0) if batch_sizes is None else input.split(batch_sizes.tolist()))
    h, c, outputs = h0, c0, []
    for x in reversed(steps) if reverse else steps:
        rows = x.shape[0]
        h_next, c_next = lstm_cell_composite(x, h[:rows], c[:rows], w_ih, w_hh, b_ih, b_hh)
        if w_hr is not None:
            h_next = torch.nn.functional.linear(h_next, w_hr)
        outputs.append(h_next)
        h, c = torch.cat([h_next, h[rows:]]), torch.cat([c_next, c[rows:]])
    if reverse:
        outputs.reverse()
    return (torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)), h, c


def _empty_unless(needed: bool, like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape if needed else (0,))


@torch.library.register_fake("fused::lstm_cell_forward")
def _(input: Tensor, h: Tensor, c: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
    batch, hidden = c.shape
    return c.new_empty(c.shape), c.new_empty(c.shape), c.new_empty(batch, 4 * hidden)


@torch.library.register_fake("fused::lstm_cell_backward")
def _(grad_h_next: Tensor, grad_c_next: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *tensors, _, needs = inputs
    input, _, c, *_ = tensors
    grads = [_empty_unless(n, t, *t.shape) for t, n in zip(tensors, needs[:5], strict=True)]
    return (*grads, _empty_unless(needs[5], input, 4 * c.shape[1]))


@torch.library.register_fake("fused::lstm_layer_forward.packed")
@torch.library.register_fake("fused::lstm_layer_forward")
def _(input: Tensor, h0: Tensor, c0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, w_hr, _, _ = rest
    hidden_size = c0.shape[1]
    rows = input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[1]
    output = input.new_empty(*input.shape[:-1], h0.shape[1])
    gates, cells = input.new_empty(rows, 4 * hidden_size), input.new_empty(rows, hidden_size)
    hidden = input.new_empty((0, 0) if w_hr is None else (rows, hidden_size))
    return output, h0.new_empty(h0.shape), c0.new_empty(c0.shape), gates, cells, hidden


@torch.library.register_fake("fused::lstm_layer_backward.packed")
@torch.library.register_fake("fused::lstm_layer_backward")
def _(grad_output: Tensor, grad_h_n: Tensor, grad_c_n: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    tensors, (w_hr, *_, needs) = inputs[:5], inputs[5:]
    input, _, c0, *_ = tensors
    grads = [_empty_unless(n, t, *t.shape) for t, n in zip(tensors, needs[:5], strict=True)]
    bias = _empty_unless(needs[5], input, 4 * c0.shape[1])
    projection = (0,) if w_hr is None else w_hr.shape
    return (*grads, bias, _empty_unless(needs[6], input, *projection))


def _backward_cell(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    return _cell_gradients(ctx, torch.ops.fused, grad_outputs[:2])


def _backward_layer(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    return _layer_gradients(ctx, grad_outputs[:3])


torch.library.register_autograd(
    "fused::lstm_cell_forward", _backward_cell, setup_context=_setup_cell
)
for _name in ("fused::lstm_layer_forward", "fused::lstm_layer_forward.packed"):
    torch.library.register_autograd(_name, _backward_layer, setup_context=_setup_layer)
