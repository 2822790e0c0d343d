"""The benchmark cases of attention: the function with its masks and lengths, and the module."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused
from fused.bench.case import Case, Runnable, Workbench, direction, forward_backward, forward_only

Mask = Literal["full", "causal", "boolean", "documents", "additive", "window"]

F32, BF16 = torch.float32, torch.bfloat16

_WINDOW = 128  # keys that a row sees: its own and those before it
_DOCUMENTS = 4  # side by side in a sequence, each of which sees itself alone


def attention_cases() -> Iterator[Case]:
    for dtype, backward in itertools.product((F32, BF16), (False, True)):
        yield _attention(4, 512, dtype=dtype, mask="causal", backward=backward, quick=True)
        yield _attention(1, 2048, dtype=dtype, mask="full", backward=backward)
        yield _attention(1, 2048, dtype=dtype, mask="causal", backward=backward)
    yield _attention(2, 1024, mask="causal")
    for backward in (False, True):
        yield _attention(4, 512, mask="boolean", backward=backward)
        yield _attention(1, 1024, mask="documents", backward=backward)
        yield _attention(1, 1024, mask="additive", backward=backward)
        yield _attention(1, 4096, mask="window", heads=4, heads_kv=4, backward=backward)
        yield _attention(8, 197, mask="full", heads=4, heads_kv=4, head_dim=96, backward=backward)
        yield _attention(2, 1024, mask="causal", heads_kv=2, backward=backward)
        yield _attention(
            2, 1024, mask="causal", heads=4, heads_kv=4, head_dim=128, backward=backward
        )
    for dtype in (F32, BF16):
        yield _attention(1, 1, dtype=dtype, mask="full", keys=2048, quick=dtype is F32)
        yield _attention(1, 8, dtype=dtype, mask="full", keys=2048)
        yield _forward_mode(1, 1024, dtype=dtype, quick=dtype is F32)
    yield _module(8, 256, 512, backward=True)
    for interleaved, backward in itertools.product((False, True), (False, True)):
        yield _rotary(8, 256, interleaved=interleaved, backward=backward)


def _attention(
    batch: int,
    length: int,
    *,
    dtype: torch.dtype = F32,
    mask: Mask = "full",
    backward: bool = False,
    heads: int = 8,
    heads_kv: int = 8,
    head_dim: int = 64,
    keys: int | None = None,
    quick: bool = False,
) -> Case:
    seqlen_k = length if keys is None else keys

    def build(bench: Workbench) -> Runnable:
        # As a model has them: [B, S, H, D] in memory, seen as [B, H, S, D].
        q, k, v, grad = (
            bench.tensor(batch, rows, h, head_dim).transpose(1, 2).requires_grad_(backward)
            for rows, h in (
                (length, heads),
                (seqlen_k, heads_kv),
                (seqlen_k, heads_kv),
                (length, heads),
            )
        )
        options = _mask_options(bench, mask, batch, length)
        if heads != heads_kv:
            options["enable_gqa"] = True
        functions = F if bench.layers == "stock" else fused.functional
        attention = bench.function(functions.scaled_dot_product_attention)

        def attend() -> torch.Tensor:
            return attention(q, k, v, **options)

        return forward_backward(attend, (q, k, v), grad) if backward else forward_only(attend)

    lengths = f"{length}x" if keys is None else f"{length}/{keys}x"
    shape = f"{batch}x{heads}{'' if heads == heads_kv else f'/{heads_kv}'}x{lengths}{head_dim}"
    # Two products forward, five more backward, for each score that is not hidden by its place.
    scores = {
        "causal": length**2 / 2,
        "window": length * _WINDOW,
        "documents": length**2 / _DOCUMENTS,
    }.get(mask, length * seqlen_k)
    work = (7 if backward else 2) * 2 * batch * heads * scores * head_dim
    name = f"attention {shape} {mask} {direction(backward)}"
    return Case("attention", name, dtype, build, work, "GFLOP/s", quick)


def _forward_mode(batch: int, length: int, *, dtype: torch.dtype, quick: bool) -> Case:
    """The output and its tangent, of inputs that all have one."""
    heads, head_dim = 8, 64

    def build(bench: Workbench) -> Runnable:
        shape = (batch, heads, length, head_dim)
        inputs, tangents = (tuple(bench.tensor(*shape) for _ in range(3)) for _ in range(2))
        functions = F if bench.layers == "stock" else fused.functional

        def push(*inputs_and_tangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
            primals, moves = inputs_and_tangents[:3], inputs_and_tangents[3:]
            pushed = torch.func.jvp(functions.scaled_dot_product_attention, primals, moves)
            return pushed[0], pushed[1]

        run_push = bench.function(push)

        def run() -> Sequence[torch.Tensor]:
            # Of stock's kernels the only one that has a forward mode.
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                results: Sequence[torch.Tensor] = run_push(*inputs, *tangents)
            return results

        return run

    # Of the scores one product and of their tangents two; of the output one, of its tangent two.
    work = 6 * 2 * batch * heads * length**2 * head_dim
    name = f"attention {batch}x{heads}x{length}x{head_dim} full fwd with tangent"
    return Case("attention", name, dtype, build, work, "GFLOP/s", quick)


def _mask_options(bench: Workbench, mask: Mask, batch: int, length: int) -> dict[str, Any]:
    """What says ``mask`` to the contender; stock has no window and takes a boolean mask for it."""
    if mask == "boolean":
        return {"attn_mask": _padding_mask(batch, length, bench.device)}
    if mask == "documents":
        document = torch.arange(length, device=bench.device) * _DOCUMENTS // length
        return {"attn_mask": document[:, None] == document}
    if mask == "additive":
        return {"attn_mask": bench.tensor(length, length)}
    if mask == "window":
        if bench.layers == "fused":
            return {"window": (_WINDOW - 1, 0)}
        row = torch.arange(length, device=bench.device)
        distance = row[:, None] - row
        return {"attn_mask": (distance >= 0) & (distance < _WINDOW)}
    return {"is_causal": mask == "causal"}


def _padding_mask(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """True where a query may look: every row of the batch ends at another place."""
    ends = torch.linspace(length // 2, length, batch, device=device).long()
    return (torch.arange(length, device=device) < ends[:, None])[:, None, None, :]


def _module(batch: int, length: int, width: int, *, backward: bool) -> Case:
    heads = 8

    def build(bench: Workbench) -> Runnable:
        x = bench.tensor(batch, length, width, requires_grad=backward)
        grad = bench.tensor(batch, length, width)
        make = nn.MultiheadAttention if bench.layers == "stock" else fused.Attention
        module = bench.module(lambda: make(width, heads, batch_first=True))
        run_module = bench.function(module)

        def attend() -> torch.Tensor:
            return run_module(x, x, x, need_weights=False)[0]

        if not backward:
            return forward_only(attend)
        return forward_backward(attend, (x, *module.parameters()), grad)

    # Four products by the weights, and attention's own.
    products = 4 * batch * length * width**2 * (3 if backward else 1)
    scores = batch * length**2 * width * (7 if backward else 2)
    name = f"Attention {batch}x{length}x{width}, {heads} heads {direction(backward)}"
    return Case("attention", name, F32, build, 2 * (products + scores), "GFLOP/s")


def _rotary(batch: int, length: int, *, interleaved: bool, backward: bool) -> Case:
    heads, head_dim = 8, 64

    def build(bench: Workbench) -> Runnable:
        # Queries and keys where one product has left them, the values beside them.
        packed = bench.tensor(batch, length, 3, heads, head_dim).transpose(1, 3)
        q, k = (packed[:, :, i].requires_grad_(backward) for i in range(2))
        cos, sin = bench.tensor(2, length, head_dim // 2)
        grads = bench.tensor(2, batch, length, heads, head_dim).transpose(2, 3).unbind()
        stock = bench.layers == "stock"
        turn = bench.function(_stock_rotary if stock else fused.functional.rotary_embedding)

        def run() -> Sequence[torch.Tensor]:
            with torch.set_grad_enabled(backward):
                turned = turn(q, k, cos, sin, interleaved=interleaved)
            if not backward:
                return turned
            return [*(t.detach() for t in turned), *torch.autograd.grad(turned, (q, k), grads)]

        return run

    # Queries and keys are read and written, and so are their gradients.
    moved = (8 if backward else 4) * batch * length * heads * head_dim * F32.itemsize
    pairs = "interleaved" if interleaved else "halves"
    name = f"rotary {batch}x{heads}x{length}x{head_dim} {pairs} {direction(backward)}"
    return Case("attention", name, F32, build, moved, "GB/s")


def _stock_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As models write it."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        if interleaved:
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    return turn(q), turn(k)
