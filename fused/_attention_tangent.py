"""Forward-mode attention: the results and their tangents from one pass of the kernels.

The tangents are arguments of the function that is differentiated further, so that what lies around
forward mode (a reverse derivative of a loss with a `jvp` in it, vmap) finds an ordinary function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused import _route
from fused._attention_composite import NUM_TENSORS, Options
from fused._attention_derivatives import gradients, pulled_back, transformed_attention

_INPUTS = 6  # q, k, v, mask, slopes and sink
_Results = tuple[Tensor, ...]  # out, log-sum-exp, row_stats, the tangents of the first two


def attention_with_tangents(
    q: Tensor, k: Tensor, v: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp, with tangents, of inputs that `_route.is_forward_mode`."""
    pairs = [
        (None, None) if x is None else forward_ad.unpack_dual(x) for x in (q, k, v, *options[:3])
    ]
    primals, tangents = zip(*pairs)
    run = AttentionTangent.apply if _route.is_transformed() else AttentionTangent.forward
    out, lse, _, out_tangent, lse_tangent = run(*primals, *options[3:], *tangents)
    return forward_ad.make_dual(out, out_tangent), forward_ad.make_dual(lse, lse_tangent)


class AttentionTangent(torch.autograd.Function):
    """The kernel `attention_tangent`, to be differentiated in reverse.

    By the kernels' backward pass where nobody makes use of its tangents, else in tiles.
    """

    @staticmethod
    def forward(*arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if _route.has_subclass(*tensors):  # which a transform had covered
            return _by_tiles(*arguments)
        ops = torch.ops.fused if _route.is_traced(*tensors) else _route.kernels()
        return ops.attention_tangent(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
        out, _, row_stats, *_ = output
        q, k, v, *options = inputs[:-_INPUTS]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(row_stats)
        tensors, ctx.constants = options[:NUM_TENSORS], options[NUM_TENSORS:]
        ctx.save_for_backward(out, row_stats, q, k, v, *tensors, *inputs[-_INPUTS:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        out, row_stats, *tensors = ctx.saved_tensors
        inputs, tangents = tensors[:-_INPUTS], tensors[-_INPUTS:]
        used = [i for i, grad in enumerate(grads) if grad is not None]
        if {3, 4}.isdisjoint(used) and _route.is_plain(*grads, *inputs[:_INPUTS]):
            needs = list(ctx.needs_input_grad[:_INPUTS])
            saved, options = (*inputs[:3], out, row_stats), Options(*inputs[3:], *ctx.constants)
            given = gradients(needs, saved, options, _route.kernels(), grads[0], grads[1])
            return *given, *[None] * _INPUTS

        def run(*tensors: Any) -> _Results:
            results = _by_tiles(*tensors[:-_INPUTS], *ctx.constants, *tensors[-_INPUTS:])
            return tuple(results[i] for i in used)

        given = pulled_back(run, (*inputs, *tangents), [grads[i] for i in used])
        of_constants = [None] * len(ctx.constants)
        return *given[:-_INPUTS], *of_constants, *given[-_INPUTS:]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[_Results, Any]:
        rng, cu_seqlens_q = arguments[6:8]
        heads_are_mapped = any(in_dims[i] is not None for i in (4, 5, -2, -1))
        if rng is not None or cu_seqlens_q is not None or heads_are_mapped:
            by_tiles = torch.vmap(_by_tiles, in_dims, randomness=info.randomness)
            return by_tiles(*arguments), (0,) * 5
        # The examples are one batch.
        examples, folded = info.batch_size, list(arguments)
        for i in (0, 1, 2, -6, -5, -4):
            if arguments[i] is not None:
                folded[i] = _in_front(arguments[i], in_dims[i], examples).flatten(0, 1)
        batch = folded[0].shape[0] // examples
        masks = {
            i: _five_dims(arguments[i], in_dims[i]) for i in (3, -3) if arguments[i] is not None
        }
        broadcast = all(mask.shape[:2] == (1, 1) for mask in masks.values())
        for i, mask in masks.items():
            whole = mask if broadcast else mask.expand(examples, batch, -1, -1, -1)
            folded[i] = whole.flatten(0, 1)
        results, dims = AttentionTangent.apply(*folded), (0, 0, 1, 0, 0)
        return tuple(x.unflatten(d, (examples, batch)) for x, d in zip(results, dims)), dims


def _in_front(x: Tensor, dim: int | None, examples: int) -> Tensor:
    """[examples, ...], of something mapped over `dim` or the same for all."""
    return x.expand(examples, *x.shape) if dim is None else x.movedim(dim, 0)


def _five_dims(mask: Tensor, dim: int | None) -> Tensor:
    """A mask as [examples, B, H, S, T], any of which may be 1."""
    mask = _in_front(mask, dim, 1)
    return mask.reshape(mask.shape[0], *[1] * (5 - mask.dim()), *mask.shape[1:])


def _by_tiles(*arguments: Any) -> _Results:
    """The same by PyTorch's operators, with every derivative; row_stats has no elements."""
    inputs, tangents = list(arguments[:_INPUTS]), arguments[-_INPUTS:]
    options = Options(*arguments[3:-_INPUTS])
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def attend(*primals: Tensor) -> tuple[Tensor, Tensor]:
        for i, primal in zip(moving, primals, strict=True):
            inputs[i] = primal
        q, k, v, mask, slopes, sink = inputs
        own = options._replace(attn_mask=mask, alibi_slopes=slopes, sink=sink)
        attended = transformed_attention(q, k, v, own)
        assert attended.lse is not None
        return attended.out, attended.lse

    # Contiguous, because there is no dual of what was expanded.
    primals = tuple(inputs[i].contiguous() for i in moving)
    pushed = torch.func.jvp(attend, primals, tuple(tangents[i] for i in moving))
    (out, lse), of_results = pushed[0], pushed[1]
    return out, lse, lse.new_empty(0), *of_results
