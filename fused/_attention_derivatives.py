"""What the attention kernels do not compute, a tile at a time: transforms, second derivatives.

Autograd over PyTorch's operators keeps every matrix that it computes. Here what one tile computes
is dropped before the next, so that no whole matrix of scores is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused import _route
from fused._attention_checks import check_inputs
from fused._attention_composite import (
    NUM_TENSORS,
    Attended,
    Options,
    Range,
    attention_composite,
    compute_dtype,
    dense_composite,
    draw_rng,
    rows_of_no_sequence,
)
from fused._attention_tiles import Problem, Tile, cut, packed, problems, tiles, unpacked

Results = tuple[Tensor, Tensor]  # out and log-sum-exp


def transformed_attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Attended:
    """[B, H, S, D], or packed [S, H, D], under torch.func's transforms or with tangents.

    A tile has its scores once for each example that vmap maps over.
    """
    check_inputs(q, k, v, options)
    if _route.is_traced(q, k, v):  # lengths may be symbols
        return attention_composite(q, k, v, options)
    if options.dropout_p > 0 and options.rng is None:
        # Not PyTorch's own dropout: what is computed a second time has to drop the same weights.
        options = options._replace(rng=draw_rng(q.device))
    is_packed = options.cu_seqlens_q is not None
    wide_q, wide_k, wide_v = (unpacked(x) if is_packed else x for x in (q, k, v))
    inputs = (wide_q, wide_k, wide_v, *options[:3])
    parts = problems(wide_q, wide_k, options)
    is_whole = len(parts) == 1 and all(len(ranges) == 1 for ranges in parts[0].cuts())
    again = not is_whole and _route.is_recorded_by_transform()

    def attend(part: Problem | None) -> Results:
        if part is None:
            rest = rows_of_no_sequence(q, v, sum(part.rows for part in parts))
            return unpacked(rest[0]), rest[1].unsqueeze(0)
        return _in_tiles(part, options, inputs, again)

    if not is_packed:
        return Attended(*attend(parts[0]), None)
    out, lse = _joined(2, attend, [*parts, None])
    return Attended(packed(out), packed(lse), None)


def _in_tiles(problem: Problem, options: Options, inputs: Sequence[Any], again: bool) -> Results:
    def attend(batch: Range, groups: Range, rows: Range) -> Results:
        tile = cut(problem, options, batch, groups, rows)
        run, arguments = _composite_of(tile, options), (*tile.of_inputs(inputs), options.rng)
        result: Results = _Again.apply(run, *arguments) if again else run(*arguments)
        return result

    def over_rows(batch: Range, groups: Range) -> Results:
        return _joined(2, lambda r: attend(batch, groups, r), rows)

    batches, heads, rows = problem.cuts()
    return _joined(0, lambda b: _joined(1, lambda g: over_rows(b, g), heads), batches)


def _joined(dim: int, attend: Callable[[Any], Results], parts: Sequence[Any]) -> Results:
    """The results of all parts along `dim`, by halves.

    So there are never many small results, between which freed memory would lie in pieces.
    """
    if len(parts) == 1:
        return attend(parts[0])
    half = len(parts) // 2
    outs, lses = zip(*(_joined(dim, attend, of) for of in (parts[:half], parts[half:])))
    return torch.cat(outs, dim), torch.cat(lses, dim)


def _composite_of(tile: Tile, options: Options) -> Callable[..., Results]:
    """The results of a tile as a function of nothing but tensors: its inputs, and `rng`."""
    mask, place = options.attn_mask, tile.place
    constants = options._replace(cu_seqlens_q=None, cu_seqlens_k=None)

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: Tensor | None,
        slopes: Tensor | None,
        sink: Tensor | None,
        rng: Tensor | None,
    ) -> Results:
        whole = None if mask is None or window is None else tile.completed(window, mask.shape)
        own = constants._replace(attn_mask=whole, alibi_slopes=slopes, sink=sink, rng=rng)
        out, lse, _ = dense_composite(q, k, v, own, place=place)
        assert lse is not None
        return out, lse

    return run


class _Again(torch.autograd.Function):
    """A function of tensors that is computed again for its derivatives, instead of kept.

    Its derivatives are such functions themselves: torch.func's `grad` keeps the graph of what it
    computes backward, whether or not someone wants a derivative of that.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(run: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None) -> Any:
        return run(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.run, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *pulled_back(ctx.run, ctx.saved_tensors, grads)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        run, inputs = ctx.run, ctx.saved_tensors

        def push(*inputs_and_tangents: Any) -> Any:
            inputs, tangents = inputs_and_tangents[:count], inputs_and_tangents[count:]
            function, *floating = _of_floating(run, inputs)
            return torch.func.jvp(function, tuple(floating), tangents)[1]

        count = len(inputs)
        given = [
            torch.zeros_like(x) if tangent is None else tangent
            for x, tangent in zip(inputs, tangents, strict=True)
            if _is_floating(x)
        ]
        return _Again.apply(push, *inputs, *given)


def pulled_back(
    run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Any], grads: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """The gradients of `run(*inputs)`, which is computed again, and again for theirs."""

    def pull(*inputs_and_grads: Any) -> tuple[Tensor, ...]:
        inputs, grads = inputs_and_grads[:count], inputs_and_grads[count:]
        result: tuple[Tensor, ...] = torch.func.vjp(*_of_floating(run, inputs))[1](grads)
        return result

    count = len(inputs)
    pulled = iter(_Again.apply(pull, *inputs, *grads))
    return tuple(next(pulled) if _is_floating(x) else None for x in inputs)


def _is_floating(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def _of_floating(run: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """`run` as a function of its floating inputs alone, and those."""

    def function(*floating: Tensor) -> Any:
        values = iter(floating)
        return run(*(next(values) if _is_floating(x) else x for x in inputs))

    return function, *(x for x in inputs if _is_floating(x))


def gradients(
    needs: list[bool], saved: Sequence[Tensor], options: Options, ops: Any,
    grad_out: Tensor | None, grad_lse: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Those of the op's inputs, options too, by `ops.attention_backward` where it can.

    `saved` are q, k, v, out and row_stats.
    """
    q, k, v, out, row_stats = saved
    constants = [None] * len(options[3:])
    differentiable = _route.needs_composite_gradients(grad_out, grad_lse)
    inputs = (q, k, v, *options[:3])
    if differentiable and not _route.is_plain(grad_out, grad_lse, *inputs):
        return (*gradients_by_composite(options, inputs, (grad_out, grad_lse)), *constants)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    given = (grad_out, grad_lse, q, k, v, *options)
    if differentiable:
        return (*AttentionBackward.apply(needs, out.detach(), row_stats, *given), *constants)
    return (*kernel_gradients(ops, needs, out, row_stats, *given), *constants)


def kernel_gradients(
    ops: Any, needs: list[bool], out: Tensor, row_stats: Tensor, grad_out: Tensor,
    grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *options: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What `ops.attention_backward` gives where it is needed, None elsewhere."""
    grads = ops.attention_backward(grad_out, grad_lse, q, k, v, out, row_stats, *options, needs)
    return tuple(grad if needed else None for grad, needed in zip(grads, needs))


class AttentionBackward(torch.autograd.Function):
    """The gradients of q, k, v, mask, slopes and sink by the kernels, differentiable again."""

    @staticmethod
    def forward(
        ctx: Any, needs: list[bool], out: Tensor, row_stats: Tensor, grad_out: Tensor,
        grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *options: Any,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_out, grad_lse, q, k, v, *options[:NUM_TENSORS])
        ctx.options = options[NUM_TENSORS:]
        given = (out, row_stats, grad_out, grad_lse, q, k, v, *options)
        return kernel_gradients(_route.kernels(), needs, *given)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse, q, k, v, *tensors = ctx.saved_tensors
        options = Options(*tensors, *ctx.options)
        inputs = (grad_out, grad_lse, q, k, v, *options[:3])
        if torch.is_grad_enabled() or not _route.is_plain(*inputs, *grad_grads):
            grads = _second_by_composite(options, inputs, grad_grads)
        else:
            needs = ctx.needs_input_grad[3 : 3 + len(inputs)]
            grads = _second_in_tiles(options, inputs, grad_grads, needs)
        return None, None, None, *grads, *[None] * len(options[3:])


def gradients_by_composite(
    options: Options, inputs: Sequence[Any], grad_outputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Those of q, k, v, mask, slopes and sink, of all scores at once and with every derivative."""

    def composite(*inputs: Any) -> tuple[Tensor | None, ...]:
        q, k, v, mask, slopes, sink = inputs
        own = options._replace(attn_mask=mask, alibi_slopes=slopes, sink=sink)
        return attention_composite(q, k, v, own)[:2]

    return _route.composite_gradients(composite, inputs, grad_outputs)


def _second_by_composite(
    options: Options, inputs: Sequence[Any], grad_grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of (grad_out, grad_lse, *inputs of the op)."""

    def gradients(grad_out: Tensor, grad_lse: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        return gradients_by_composite(options, inputs, (grad_out, grad_lse))

    return _route.composite_gradients(gradients, inputs, grad_grads)


def _second_in_tiles(
    options: Options,
    inputs: Sequence[Any],
    grad_grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """As above, by each tile's composite, added up in the order of the tiles."""
    given = inputs
    if options.cu_seqlens_q is not None:
        inputs = (*map(_unpacked_or_none, inputs[:5]), *inputs[5:])
        grad_grads = (*map(_unpacked_or_none, grad_grads[:3]), *grad_grads[3:])
    dtype = compute_dtype(given[0])
    sums = [torch.zeros_like(x, dtype=dtype) if need else None for x, need in zip(inputs, needs)]
    for problem in problems(inputs[2], inputs[3], options):
        for tile in tiles(problem, options):
            run = _composite_of(tile, options)
            own, own_grads = (
                [_constant(x, dtype) for x in views]
                for views in (_of_all(tile, inputs), tile.of_inputs(grad_grads))
            )
            grads = _second_of_tile(run, options.rng, own, own_grads, needs)
            for total, grad in zip(_of_all(tile, sums), grads, strict=True):
                if total is not None and grad is not None:
                    total += grad
    return tuple(
        None if total is None else (packed(total) if total.dim() > x.dim() else total).to(x.dtype)
        for total, x in zip(sums, given)
    )


def _unpacked_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else unpacked(tensor)


def _constant(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype == torch.bool else x.detach().to(dtype)


def _of_all(tile: Tile, inputs: Sequence[Any]) -> list[Any]:
    """The tile's views of (grad_out, grad_lse, *inputs of the op)."""
    grads = [None if x is None else tile.of_queries(x) for x in inputs[:2]]
    return grads + tile.of_inputs(inputs[2:])


def _second_of_tile(
    run: Callable[..., Results],
    rng: Tensor | None,
    inputs: Sequence[Any],
    grad_grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    first = [grad is not None for grad in grad_grads]
    for x, needed in zip(inputs, map(max, needs, (False, False, *first)), strict=True):
        if needed:
            x.requires_grad_()

    def gradients(grad_out: Tensor, grad_lse: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        function = lambda *inputs: run(*inputs, rng)  # noqa: E731
        return _route.composite_gradients(function, inputs, (grad_out, grad_lse), needs=first)

    with _route.without_autocast(inputs[0].device.type):
        return _route.composite_gradients(gradients, inputs, grad_grads, needs=needs)
