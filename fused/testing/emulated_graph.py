"""CUDA graphs of emulated kernels: a call captured once, and replayed on what memory holds by then.

    with emulated_cuda():
        call()                            # what a first call makes is no part of the graph
        graph = EmulatedGraph()
        with graph.capture():
            results = call()              # runs nothing
        x.copy_(new_x)
        graph.replay()                    # results hold what call() would give now

What it models, and what not, is in docs/emulator.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused import _route
from fused.testing import emulator

_CUDA = torch.device("cuda")
_NEEDS_THE_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class EmulatedGraph:
    """What `torch.cuda.CUDAGraph` is to a GPU.

    Kernels are kept with their arguments, PyTorch's operators are written down between them, and a
    replay runs all of it again, in the order of the capture, on the same memory: what the host
    computed meanwhile stays as it was. Nothing that a capture does is seen in memory that was
    there before. What the host would have to wait for is refused, as on a GPU.

    Launches of each replay run in another order of their threads.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._launches: Any = None
        self._num_replays = 0
        self.num_launches = 0

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        if self._launches is not None:
            raise RuntimeError("EmulatedGraph: holds a graph already")
        control = emulator.module().emulator
        control.begin_capture()
        try:
            with _on_a_capturing_stream(), _HostWaitsForNothing(), _Recorder(self._calls):
                yield
        finally:
            self.num_launches = control.num_captured()
            self._launches = control.end_capture()

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def replay(self) -> None:
        emulator.set_order(emulator.ORDERS[self._num_replays % len(emulator.ORDERS)])
        self._num_replays += 1
        done = 0
        for call in self._calls:
            self._launches.run(done, call.num_launches_before)
            done = call.num_launches_before
            call.repeat()
        self._launches.run(done, self.num_launches)


@contextlib.contextmanager
def _on_a_capturing_stream() -> Iterator[None]:
    """What fused and PyTorch ask, while a GPU's stream is captured, is answered as there."""
    stream = mock.Mock(is_capturing=lambda: True)
    with (
        mock.patch.object(torch.accelerator, "current_accelerator", return_value=_CUDA),
        mock.patch.object(torch.accelerator, "current_stream", return_value=stream),
        _route.use_capture(),
    ):
        yield


class _HostWaitsForNothing(TorchFunctionMode):
    """Refuses the methods by which the host reads a tensor without an operator."""

    _READ = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._READ:
            raise _refusal(func.__name__)
        return func(*args, **(kwargs or {}))


def _refusal(name: str) -> RuntimeError:
    return RuntimeError(f"{name}: the host cannot wait for it while a graph is captured")


@dataclass(frozen=True)
class _Call:
    """An operator's call, with the memory that it was given and gave."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: list[Tensor]  # empty where it writes to its arguments
    num_launches_before: int

    def repeat(self) -> None:
        again = _tensors_in(self.function(*self.args, **self.kwargs))
        for result, new in zip(self.results, again if self.results else [], strict=True):
            result.copy_(new)


class _Recorder(TorchDispatchMode):
    """Writes down what operators are called, below autograd."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(t not in (Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented  # a subclass comes first, and calls operators in its turn
        kwargs = kwargs or {}
        with self:  # into the operators that it is made of, if it is: a `to` is a view or a copy
            results = func.decompose(*args, **kwargs)
        if results is not NotImplemented:
            return results
        if func.namespace == "fused":
            raise RuntimeError(f"{func}: a registered op would run the CPU's kernel")
        if _NEEDS_THE_HOST & set(func.tags) and not _has_indices_alone(func, args):
            raise _refusal(str(func))
        returned = [value.alias_info for value in func._schema.returns]
        if returned and all(alias is not None and not alias.is_write for alias in returned):
            return func(*args, **kwargs)  # views compute nothing
        if torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)  # nor do those that change a tensor's shape
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        results = None
        if writes:
            results = _written(func, args, kwargs)
        elif returned:
            results = func(*args, **kwargs)
        before = emulator.module().emulator.num_captured()
        # As they are now: their shapes may be changed in place.
        new = [] if writes else [result.detach() for result in _tensors_in(results)]
        self._calls.append(_Call(func, args, kwargs, new, before))
        return results


def _has_indices_alone(func: Any, args: Any) -> bool:
    """Whether this is an indexing whose result's shape does not depend on what a mask holds."""
    masks = (torch.bool, torch.uint8)
    return func is torch.ops.aten.index.Tensor and all(
        index is None or index.dtype not in masks for index in args[1]
    )


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a call returns that writes to its arguments: these, as no call is made."""
    given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
    by_alias = {
        frozenset(a.alias_info.before_set): given[a.name]
        for a in func._schema.arguments
        if a.alias_info is not None and a.name in given
    }
    returned = [value.alias_info for value in func._schema.returns]
    if any(alias is None for alias in returned):
        raise NotImplementedError(f"{func}: writes to its arguments and returns new tensors")
    results = tuple(by_alias[frozenset(alias.before_set)] for alias in returned)
    return results[0] if len(results) == 1 else results or None


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
