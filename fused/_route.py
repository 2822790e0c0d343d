"""Decides, once for all ops, how a call reaches the kernels.

There are three ways, and every op takes one of them through this module:

- *kernel*: the op's `autograd.Function` over the pybind11 function, the shortest way in eager mode;
- *traced*: the same C++ function as `torch.ops.fused.<op>`, with the same derivative, where someone
  must see the op itself: torch.compile and torch.export, fake and meta tensors and dispatch modes;
- *composite*: plain PyTorch operators, for what no kernel covers. `torch.func` transforms and
  forward-mode derivatives take it (but for attention's), and so do derivatives beyond the first,
  because every PyTorch operator has its rules for them, and DTensors and their like, which have
  rules for PyTorch's operators alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from fused import _load

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeVarTuple, Unpack

    _Tensors = TypeVarTuple("_Tensors")

_kernels: ModuleType = _load.load()
_is_captured = False
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)

# What kernels there are for, whatever the op.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DEVICES = ("cpu", "cuda", "meta")

# What fused.explain listens to: called with (op, device, why no kernel runs or None).
Listener = Callable[[str, torch.device, str | None], None]
_listener: Listener | None = None


def kernels() -> ModuleType:
    """The pybind11 module that eager calls run: `fused._C`, or the emulated one under test."""
    return _kernels


@contextlib.contextmanager
def use_kernels(module: ModuleType) -> Iterator[None]:
    """Runs eager calls on another build of the same functions. For tests."""
    global _kernels
    previous, _kernels = _kernels, module
    try:
        yield
    finally:
        _kernels = previous


@contextlib.contextmanager
def use_capture() -> Iterator[None]:
    """Kernels run although a dispatch mode looks on, which captures a graph of them. For tests."""
    global _is_captured
    previous, _is_captured = _is_captured, True
    try:
        yield
    finally:
        _is_captured = previous


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether someone must see the registered op instead of the function behind it."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > int(_is_captured):
        return True
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace, which knows operators alone
        return True
    return any(t is not None and (type(t) not in _PLAIN_TYPES or t.is_meta) for t in tensors)


def is_readable(*tensors: Tensor | None, waits: bool = False) -> bool:
    """Whether the host can look at what these hold. `waits`: also on a device, once it is there."""
    if is_traced(*tensors) or _is_captured:
        return False
    if all(t is None or t.is_cpu for t in tensors):
        return True
    on_cuda = any(t is not None and t.is_cuda for t in tensors)
    return waits and not (on_cuda and torch.cuda.is_current_stream_capturing())


def is_transformed() -> bool:
    """Whether a torch.func transform is active: tensors may have no data of their own."""
    return torch._C._functorch.maybe_current_level() is not None


# torch.compile cannot trace that call, and need not: it enters a transform while it traces, and
# guards what is active outside. The decorator, torch.compiler.assume_constant_result, would import
# the compiler here.
vars(is_transformed)["_dynamo_marked_constant"] = True


def composite_reason(*tensors: Tensor | None, forward_mode: bool = False) -> str | None:
    """Why a call cannot run a kernel whatever its shapes, or None.

    `forward_mode`: the op asks `is_forward_mode` and has a kernel for that.
    """
    if forward_mode and is_forward_mode(*tensors):
        return None
    if is_transformed():
        return "a torch.func transform is active"
    if has_subclass(*tensors):
        return "a tensor is of a subclass that may not know of fused's ops"
    if torch.compiler.is_compiling():
        return None
    # The public forward_ad has no cheap way to ask whether a level is open.
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        return "an input carries a forward-mode tangent"
    return None


def is_forward_mode(*tensors: Tensor | None) -> bool:
    """Whether these carry tangents which a kernel can take with them, as inputs beside the others.

    That is so where forward mode is what comes first: `torch.func.jvp`, with vmap and reverse
    derivatives around it, or `torch.autograd.forward_ad` where nothing is recorded for a reverse
    derivative, which would have to carry tangents itself.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    kind = torch._C._functorch.TransformType
    if kinds and (kinds[-1] != kind.Jvp or not {*kinds[:-1]} <= {kind.Vmap, kind.Grad}):
        return False
    duals = [forward_ad.unpack_dual(t) for t in tensors if t is not None]
    if all(dual.tangent is None for dual in duals) or not torch._C._is_fwd_grad_enabled():
        return False
    parts = [part for dual in duals for part in dual]
    if has_subclass(*parts) or _is_batched(*parts):
        return False
    return bool(kinds) or not needs_grad(*parts)


def is_sharded(value: object) -> TypeGuard[DTensor]:
    """Whether this is a DTensor. Does not import its package, which takes a while."""
    if type(value) in _PLAIN_TYPES:  # all that torch.compile need look at
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def has_subclass(*tensors: Tensor | None) -> bool:
    """Whether any is of a class that answers for each operator, and may not know of fused's ops."""
    for t in tensors:  # a generator would take as long again, at every eager call
        if t is not None and type(t) not in _PLAIN_TYPES and _may_refuse_ops(type(t)):
            return True
    return False


def _may_refuse_ops(cls: type[Tensor]) -> bool:
    # Those of the tracers pass every operator on, and so does the result of a collective.
    module = sys.modules.get("torch.distributed._functional_collectives")
    passing = () if module is None else (module.AsyncCollectiveTensor,)
    if issubclass(cls, (FakeTensor, FunctionalTensor, *passing)):
        return False
    return cls.__torch_dispatch__ is not Tensor.__torch_dispatch__


vars(_may_refuse_ops)["_dynamo_marked_constant"] = True  # as is_transformed


def unsupported(*tensors: Tensor | None, bool_too: bool = False) -> str | None:
    """Why no kernel of any op takes one of these tensors, or None. `bool_too`: they are masks."""
    for t in tensors:
        if t is None:
            continue
        if t.is_nested or t.layout != torch.strided:
            return "a tensor is nested, sparse or of another layout"
        if t.device.type not in _DEVICES:
            return f"no kernel for device {t.device.type}"
        if t.dtype not in _DTYPES and not (bool_too and t.dtype == torch.bool):
            return f"no kernel for dtype {t.dtype}"
    return None


def report(op: str, device: torch.device, reason: str | None) -> None:
    """Tells fused.explain, if it listens, that `op` runs a kernel, or why the composite path."""
    if _listener is not None and not torch.compiler.is_compiling():
        _listener(op, device, reason)


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    global _listener
    previous, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = previous


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def needs_composite_gradients(*grad_outputs: Tensor | None) -> bool:
    """Whether a backward pass has to call `composite_gradients` instead of a kernel.

    With gradients enabled someone asked for `create_graph=True`; `is_grads_batched=True` hands over
    many gradients in one tensor, by a transform older than torch.func; and a gradient may carry a
    forward-mode tangent.
    """
    if torch.is_grad_enabled() or _is_batched(*grad_outputs):
        return True
    return composite_reason(*grad_outputs) is not None


def _is_batched(*tensors: Tensor | None) -> bool:
    batched = torch._C._functorch.is_legacy_batchedtensor
    return not torch.compiler.is_compiling() and any(t is not None and batched(t) for t in tensors)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are eager tensors with data of their own, and nothing but reverse mode."""
    return (
        not is_traced(*tensors) and composite_reason(*tensors) is None and not _is_batched(*tensors)
    )


def is_recorded_by_transform() -> bool:
    """Whether a reverse derivative of torch.func will keep what is computed now.

    And whether that may be computed again under `torch.func.jvp` for its derivatives, which cannot
    be inside of forward-mode AD that is not torch.func's.
    """
    kinds = {level.key() for level in torch._C._functorch.get_interpreter_stack() or ()}
    kind = torch._C._functorch.TransformType
    return kind.Grad in kinds and (kind.Jvp in kinds or forward_ad._current_level < 0)


def composite_gradients(
    function: Callable[..., Tensor | tuple[Tensor | None, ...]],
    inputs: Sequence[Any],
    grad_outputs: Sequence[Tensor | None],
    *,
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of `function(*inputs)`, with `create_graph=True` differentiable to any order.

    For a backward pass that finds `needs_composite_gradients()`. Computes `function`, made of plain
    PyTorch operators, a second time. Returns a gradient, or None, for each input; `needs` says
    which ones are wanted of those that require one.
    """
    create_graph = torch.is_grad_enabled()  # how the engine passes it on to a backward pass
    with torch.enable_grad():
        # Views, so that inputs which are one and the same tensor get gradients of their own.
        views = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
        outputs = function(*views)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, grad_outputs, strict=True)
            if grad is not None and out is not None and out.requires_grad
        ]
        wanted = [
            isinstance(x, Tensor) and x.requires_grad and (needs is None or needs[i])
            for i, x in enumerate(views)
        ]
        if not pairs or not any(wanted):
            return (None,) * len(views)
        grads = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                [x for x, is_wanted in zip(views, wanted) if is_wanted],
                [grad for _, grad in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return tuple(next(grads) if is_wanted else None for is_wanted in wanted)


def autocast(device_type: str, *tensors: Unpack[_Tensors]) -> tuple[Unpack[_Tensors]]:
    """Casts to autocast's low-precision dtype where it is on, as PyTorch's own ops do.

    Float64 tensors and those that are not floating stay as they are. Eager casts of parameters come
    from autocast's cache, so that a cell that runs at every step casts its weights once. Any of
    `tensors` may be None.
    """
    if not (
        torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    ):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    given = cast("tuple[Tensor | None, ...]", tensors)
    traced = is_traced(*given)
    result = tuple(t if t is None else _cast(t, dtype, traced) for t in given)
    return cast("tuple[Unpack[_Tensors]]", result)


def _cast(tensor: Tensor, dtype: torch.dtype, traced: bool) -> Tensor:
    if not traced:
        result: Tensor = _kernels.autocast_cast(tensor, dtype)
        return result
    castable = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable else tensor


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which PyTorch's operators compute in the dtype that they are given."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
