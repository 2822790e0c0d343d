"""A case of attention by the kernels, by the definition and by stock, and the judgement on it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fused import reference
from fused._attention_composite import Options, draw_rng, dropout_mask
from fused.functional import (
    attention_with_kv_cache,
    scaled_dot_product_attention,
    varlen_attention,
)
from fused.testing.cases.attention import AttentionCase
from fused.testing.cases.attention_cache import CacheCase
from fused.testing.compare import assert_as_accurate_as_stock
from fused.testing.tf32 import Tf32Products

# By name: the kernels', the definition's and stock's.
Results = dict[str, tuple[Tensor, Tensor, Tensor]]
Run = Callable[..., dict[str, Tensor]]
_DROPOUT_SEED = 3
_STOCK_OPTIONS = {"attn_mask", "is_causal", "scale", "enable_gqa"}


def _run(
    function: Callable, tensors: list[Tensor], options: dict, grads_out: list[Tensor]
) -> dict[str, Tensor]:
    """Everything that the function gives: results, and gradients of all that may have one."""
    operands = ("q", "k", "v") if "cu_seqlens_q" in options else ("query", "key", "value")
    inputs: dict[str, Tensor] = dict(zip(operands, tensors, strict=True))
    inputs |= {name: x for name, x in options.items() if isinstance(x, Tensor)}
    others = {name: x for name, x in options.items() if not isinstance(x, Tensor)}
    inputs = {name: x.detach() for name, x in inputs.items()}
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if x.is_floating_point()}
    results = function(**inputs, **others)
    results = list(results) if isinstance(results, tuple) else [results]
    # The gradient of a log-sum-exp of nothing is nothing in the definition as well.
    judged = [r.masked_fill(r == -torch.inf, 0.0) for r in results]
    grads_out = [g.to(r.dtype) for g, r in zip(grads_out, results)]
    grads = torch.autograd.grad(judged, list(leaves.values()), grads_out)
    names = [f"grad of {name}" for name in leaves]
    return dict(zip(["out", "lse"], results)) | dict(zip(names, grads, strict=True))


def run_tangents(
    function: Callable, tensors: list[Tensor], options: dict, tangents: list[Tensor]
) -> dict[str, Tensor]:
    """Results, and their tangents for those of all that may have one."""
    names = ("q", "k", "v") if "cu_seqlens_q" in options else ("query", "key", "value")
    inputs: dict[str, Any] = dict(zip(names, tensors, strict=True)) | options
    floating = [n for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    with forward_ad.dual_level():
        for name, tangent in zip(floating, tangents, strict=True):
            inputs[name] = forward_ad.make_dual(inputs[name], tangent.to(inputs[name]))
        results = function(**inputs)
        results = results if isinstance(results, tuple) else (results,)
        duals = [forward_ad.unpack_dual(result) for result in results]
    named: dict[str, Tensor] = {}
    for name, (result, tangent) in zip(("out", "lse"), duals):
        named |= {name: result, f"tangent of {name}": tangent}
    return named


def _cast(tensors: list[Tensor], options: dict, dtype: torch.dtype) -> tuple[list[Tensor], dict]:
    def convert(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return [convert(t) for t in tensors], {name: convert(x) for name, x in options.items()}


def run_reference(
    tensors: list[Tensor], options: dict, given: list[Tensor], run: Callable = _run
) -> dict[str, Tensor]:
    tensors, options = _cast(tensors, options, torch.float64)
    with _SumsInExtendedPrecision() if run is _run else contextlib.nullcontext():
        return _run_definition(tensors, options, given, run)


class _SumsInExtendedPrecision(TorchFunctionMode):
    """Sums the gradient of what is expanded, such as a sink, more exactly than float64 does.

    Its terms nearly cancel: in float64 the definition would err more than what it judges.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.expand:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return _Expand.apply(*args)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *shape: int) -> Tensor:
        ctx.shape = x.shape
        return x.expand(*shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded = (1,) * (grad.dim() - len(ctx.shape)) + tuple(ctx.shape)
        summed = tuple(d for d, size in enumerate(padded) if size != grad.shape[d])
        exact = np.sum(grad.cpu().numpy(), axis=summed, dtype=np.longdouble)
        result = torch.from_numpy(exact.astype(np.float64)).to(grad.device)
        return result.view(ctx.shape), *(None,) * (len(ctx.needs_input_grad) - 1)


def _run_definition(
    tensors: list[Tensor], options: dict, given: list[Tensor], run: Callable, **others: Any
) -> dict[str, Tensor]:
    packed = "cu_seqlens_q" in options
    function = reference.varlen_attention if packed else reference.scaled_dot_product_attention
    if options.get("dropout_p"):
        function = functools.partial(function, keep=_kept_by_fused(tensors, options))
    kept = {k: v for k, v in options.items() if k not in ("enable_gqa", "dropout_p")}
    return run(function, tensors, kept | others, given)


def _kept_by_fused(tensors: list[Tensor], options: dict) -> Tensor:
    """Dropout's factors in `run_fused`, [B, H, S, T]."""
    torch.manual_seed(_DROPOUT_SEED)
    q, k, _ = tensors
    drawn = Options(rng=draw_rng(q.device), dropout_p=options["dropout_p"])
    if "cu_seqlens_q" not in options:
        return dropout_mask(drawn, q.new_empty(*q.shape[:-1], k.shape[-2]))
    sequences = len(options["cu_seqlens_q"]) - 1
    return dropout_mask(drawn, q.new_empty(sequences, q.shape[1], q.shape[0], k.shape[0]))


def run_stock(
    tensors: list[Tensor], options: dict, given: list[Tensor], run: Callable = _run
) -> dict[str, Tensor]:
    """PyTorch's own operator in the tensors' dtype (float32 for float64).

    Where it lacks an option, refuses a mask of another dtype or gives NaN for it, the definition in
    that dtype.
    """
    dtype = torch.float32 if tensors[0].dtype == torch.float64 else tensors[0].dtype
    mask = options.get("attn_mask")
    tensors, options = _cast(tensors, options, dtype)
    of_stock = options.keys() - {"cu_seqlens_q", "cu_seqlens_k"} <= _STOCK_OPTIONS
    if of_stock and (mask is None or (mask.dtype == torch.bool and not options["is_causal"])):
        if "cu_seqlens_q" in options:
            options = options | {"attend": F.scaled_dot_product_attention}
            return run(reference.varlen_attention, tensors, options, given)
        return run(F.scaled_dot_product_attention, tensors, options, given)
    return _run_definition(tensors, options, given, run, dtype=dtype)


def run_stock_in_tf32(
    tensors: list[Tensor], options: dict, given: list[Tensor], run: Callable = _run
) -> dict[str, Tensor]:
    """The definition in float32, with the products that stock takes where tf32 is allowed."""
    with Tf32Products():
        return _run_definition(tensors, options, given, run, dtype=torch.float32)


def run_fused(
    tensors: list[Tensor], options: dict, given: list[Tensor], run: Callable = _run
) -> dict[str, Tensor]:
    """All results for some gradients of them; or, with `run_tangents`, for tangents of inputs."""
    packed = "cu_seqlens_q" in options
    function = varlen_attention if packed else scaled_dot_product_attention
    torch.manual_seed(_DROPOUT_SEED)
    return run(function, tensors, options, given)


def draw_grads(tensors: list[Tensor]) -> list[Tensor]:
    """Gradients of the output and of its log-sum-exp."""
    generator = torch.Generator().manual_seed(1)
    q, _, v = tensors
    rows = q.shape[:-1] if q.dim() == 4 else (q.shape[1], q.shape[0])
    shapes = [(*q.shape[:-1], v.shape[-1]), rows]
    return [torch.randn(shape, generator=generator).to(q) for shape in shapes]


def draw_tangents(tensors: list[Tensor], options: dict) -> list[Tensor]:
    """Tangents of all inputs that may have one, in their order."""
    generator = torch.Generator().manual_seed(2)
    inputs = [*tensors, *(x for x in options.values() if isinstance(x, Tensor))]
    floating = [x for x in inputs if x.is_floating_point()]
    return [torch.randn(x.shape, generator=generator).to(x) for x in floating]


def run_case(
    case: AttentionCase,
    dtype: torch.dtype,
    device: torch.device,
    run_stock: Run = run_stock,
    forward_mode: bool = False,
) -> Results:
    """Every result and gradient of a case, or tangent."""
    tensors, options = case.make(dtype, device)
    given = draw_tangents(tensors, options) if forward_mode else draw_grads(tensors)
    run = run_tangents if forward_mode else _run
    expected = run_reference(tensors, options, given, run)
    # Of PyTorch's own kernels none has a forward mode.
    with sdpa_kernel(SDPBackend.MATH) if forward_mode else contextlib.nullcontext():
        stock = run_stock(tensors, options, given, run)
    actual = run_fused(tensors, options, given, run)
    assert actual.keys() == expected.keys() == stock.keys()
    if dtype != torch.float64:  # the definition in float16 has no float32
        actual = {name: result.to(stock[name].dtype) for name, result in actual.items()}
    return {name: (actual[name], expected[name], stock[name]) for name in actual}


def run_cache_case(case: CacheCase, dtype: torch.dtype, device: torch.device) -> Results:
    """The results of a case over a cache, after a look at what is in the cache then."""
    (q, *caches), options = case.make(dtype, device)
    before = [q.clone(), *(cache.clone() for cache in caches)]
    stock_dtype = torch.float32 if dtype == torch.float64 else dtype
    expected = reference.attention_with_kv_cache(*before, **options)
    stock = reference.attention_with_kv_cache(*before, **options, dtype=stock_dtype)
    actual = attention_with_kv_cache(q, *caches, **options)
    assert torch.equal(q, before[0])
    news: list[Any] = [options.get("k"), options.get("v")]
    for cache, written, new in zip(caches, before[1:], news, strict=True):
        for b, length in enumerate(case.lengths):
            for j in range(0 if new is None else new.shape[2]):
                page, row = b, length + j
                if case.page_size is not None:
                    page = int(options["block_table"][b, row // case.page_size])
                    row %= case.page_size
                written[page, :, row] = new[b, :, j]
        assert torch.equal(cache.nan_to_num(nan=7e3), written.nan_to_num(nan=7e3))
    results = {}
    outputs = (x if isinstance(x, tuple) else (x,) for x in (actual, expected, stock))
    for name, ours, truth, theirs in zip(("out", "lse"), *outputs):
        # The definition in float16 has no float32.
        ours = ours if dtype == torch.float64 else ours.to(theirs.dtype)
        results[name] = (ours, truth, theirs)
    return results


def assert_case(
    case: AttentionCase, dtype: torch.dtype, device: torch.device, forward_mode: bool = False
) -> None:
    """Holds all results and gradients of a case, or tangents, to the definition."""
    for name, results in run_case(case, dtype, device, forward_mode=forward_mode).items():
        assert_as_accurate_as_stock(*results, name)


class Judgement:
    """One judgement over many cases, each to its own scale.

    In one small case the largest error of either side is luck.
    """

    def __init__(self) -> None:
        self._kept: dict[torch.dtype, list[list[Tensor]]] = {}

    def add(self, results: Results) -> None:
        truths = [truth[truth.isfinite()].abs() for _, truth, _ in results.values()]
        scale = max((x.max().item() for x in truths if x.numel() > 0), default=1.0) or 1.0
        for same_result in results.values():
            # By the result's own dtype: the gradient of a float32 mask is float32 in any case.
            lists = self._kept.setdefault(same_result[0].dtype, [[], [], []])
            for kept, result in zip(lists, same_result, strict=True):
                kept.append((result.detach().double() / scale).flatten().to(result.dtype))

    def assert_as_accurate_as_stock(self) -> None:
        for dtype, lists in self._kept.items():
            ours, truth, theirs = (torch.cat(kept) for kept in lists)
            assert_as_accurate_as_stock(ours, truth, theirs, f"all results in {dtype}")
