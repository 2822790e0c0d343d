"""Runs the CUDA kernels on CPU tensors, by the emulator in csrc/emulator (docs/emulator.md).

    with emulated_cuda() as launches:
        out = fused.functional.scaled_dot_product_attention(q, k, v)
    assert launches.counts()

Needs fused's source tree: the module that holds the emulated kernels is built on first use, and is
not part of what is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch

from fused import _route

# The variant of the module that the whole test session runs: see build_support/emulated.py.
VARIANT = os.environ.get("FUSED_EMULATED_VARIANT", "plain")

# A race shows in one of these orders, unless something else orders its threads. A number seeds a
# random order.
ORDERS: tuple[str | int, ...] = ("forward", "reverse", 1)


class _Settings(NamedTuple):
    order: str
    seed: int
    shared_limit: int
    num_os_threads: int
    architecture: int


_settings = _Settings("forward", 0, 0, 1, 80)


@cache
def module() -> ModuleType:
    """The emulated twin of fused._C, built if anything in csrc has changed."""
    path = _build()
    spec = importlib.util.spec_from_file_location("_C_emulated", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _build() -> Path:
    roots = (Path(__file__).resolve().parents[2], Path.cwd())
    root = next((root for root in roots if (root / "build_support" / "emulated.py").exists()), None)
    if root is None:
        raise RuntimeError(
            "emulated_cuda: needs fused's source tree (an editable install, or tests run from it)"
        )
    command = [sys.executable, "-m", "build_support.emulated", VARIANT]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RuntimeError(f"emulated_cuda: the build failed\n{answer.stdout}{answer.stderr}")
    return Path(answer.stdout.splitlines()[-1])


class Launches:
    """The kernels launched since it was made."""

    def __init__(self) -> None:
        self._before: dict[str, int] = module().emulator.launch_counts()

    def counts(self) -> dict[str, int]:
        """How often each kernel was launched, by its full C++ name with template arguments."""
        now: dict[str, int] = module().emulator.launch_counts()
        counts = {name: count - self._before.get(name, 0) for name, count in now.items()}
        return {name: count for name, count in counts.items() if count}


@contextlib.contextmanager
def emulated_cuda(
    order: str | int | None = None, *, architecture: int = 80, shared_limit: int = 0
) -> Iterator[Launches]:
    """CPU tensors run the emulated CUDA kernels instead of the CPU kernels.

    `order` is the order in which threads and blocks run: "forward", "reverse", or a number, the
    seed of a random one. By default the first calls that launch a kernel run in every order of
    `ORDERS` and must give the same bits, and later ones in one order after the other.

    `architecture` is that of the device, times ten: at 75 it has no tensor-core instructions that
    kernels use, and the portable kernels run. A block may have `shared_limit` bytes of shared
    memory, by default as many as on the least device that its kernel is for.

    For the whole process, because autograd runs backward on threads of its own.
    """
    global _settings
    before = _settings
    _settings = before._replace(
        shared_limit=shared_limit,
        num_os_threads=torch.get_num_threads(),
        architecture=architecture,
    )
    kernels = module()
    if order is None:
        kernels = cast(ModuleType, _InEveryOrder(kernels))
    else:
        set_order(order)
    try:
        with _route.use_kernels(kernels), _empty_is_nan():
            yield Launches()
    finally:
        _settings = before
        module().emulator.configure(**before._asdict())


def set_order(order: str | int) -> None:
    """In which order the threads of launches run from now on: see `emulated_cuda`."""
    name, seed = (order, 0) if isinstance(order, str) else ("random", order)
    module().emulator.configure(**_settings._replace(order=name, seed=seed)._asdict())


@contextlib.contextmanager
def _empty_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that an output element nobody writes cannot be right by luck."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


# So many calls per kernel are repeated in the other orders. The first cases of a list are small.
# The variants take their time, and look for what does not depend on the order.
_CALLS_IN_EVERY_ORDER = 8 if VARIANT == "plain" else 1
_calls_in_every_order: Counter[str] = Counter()


def kernels_run_in_every_order() -> set[str]:
    """The kernels that ran in all of `ORDERS` since the process began, with the same bits."""
    return set(_calls_in_every_order)


def compared_in_every_order(launches: Launches) -> None:
    """For a test that itself ran what was launched in all of `ORDERS`, and compared the bits."""
    _calls_in_every_order.update(launches.counts().keys())


class _InEveryOrder:
    """Stands for the emulated module: repeats a call in another order, and compares."""

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels
        self._num_calls = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._kernels, name)
        return partial(self._call, name, value) if callable(value) else value

    def _call(self, name: str, function: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        if module().emulator.is_capturing():  # by an EmulatedGraph, which launches nothing
            return function(*positional, **named)
        args = (positional, named)
        before = _Snapshot(args)
        set_order(ORDERS[self._num_calls % len(ORDERS)])
        self._num_calls += 1
        launches = Launches()
        result = function(*positional, **named)
        launched = launches.counts()
        if all(_calls_in_every_order[kernel] >= _CALLS_IN_EVERY_ORDER for kernel in launched):
            return result
        expected = [*map(_bits, _tensors_in([result, args]))]
        for order in ORDERS:
            before.restore()
            set_order(order)
            again = function(*positional, **named)
            found = [*map(_bits, _tensors_in([again, args]))]
            for index, (one, other) in enumerate(zip(expected, found, strict=True)):
                difference = _num_differing_bytes(one, other)
                assert difference == 0, (
                    f"{name}: output {index} differs in {difference} bytes when the threads of "
                    f"{', '.join(launched)} run in the order {order!r}"
                )
        _calls_in_every_order.update(launched.keys())
        return result


class _Snapshot:
    """What a call may write to: its arguments' memory, and the dicts (optimizer states) in them."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        storages = {t.data_ptr(): t.untyped_storage() for t in _tensors_in(args)}.values()
        self._contents = [(storage, storage.clone()) for storage in storages]
        self._dicts = [(state, dict(state)) for state in _walk(args) if isinstance(state, dict)]

    def restore(self) -> None:
        for state, items in self._dicts:
            state.clear()
            state.update(items)
        for storage, content in self._contents:
            storage.copy_(content)


def _walk(tree: Any) -> Iterator[Any]:
    yield tree
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for branch in tree:
            yield from _walk(branch)
    elif isinstance(tree, torch.Tensor) and tree.is_leaf and tree.grad is not None:
        # An optimizer's step is given parameters, and finds their gradients itself.
        yield from [tree.grad] if tree.grad.layout == torch.strided else []


def _tensors_in(tree: Any) -> list[torch.Tensor]:
    leaves = (leaf for leaf in _walk(tree) if isinstance(leaf, torch.Tensor))
    return [leaf for leaf in leaves if leaf.layout == torch.strided]


def _bits(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.detach().clone(memory_format=torch.contiguous_format).untyped_storage()


def _num_differing_bytes(one: torch.UntypedStorage, other: torch.UntypedStorage) -> int:
    a, b = (torch.empty(0, dtype=torch.uint8).set_(storage) for storage in (one, other))
    return int((a != b).sum())
