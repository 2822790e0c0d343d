"""Runs the CUDA kernels on CPU tensors, by the emulator in csrc/emulator (docs/emulator.md).

with emulated_cuda("reverse") as launches:
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
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from fused import _route

# The variant of the module that the whole test session runs: see build_support/emulated.py.
VARIANT = os.environ.get("FUSED_EMULATED_VARIANT", "plain")
SHARED_LIMIT_SM75 = 64 * 1024

# In one of these orders a race shows, if its threads are not ordered otherwise. A number seeds a
# random order.
ORDERS: tuple[str | int, ...] = ("forward", "reverse", 1)


class _Settings(NamedTuple):
    order: str
    seed: int
    shared_limit: int
    num_os_threads: int


_settings = _Settings("forward", 0, SHARED_LIMIT_SM75, 1)


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
    order: str | int = "forward", *, shared_limit: int = SHARED_LIMIT_SM75
) -> Iterator[Launches]:
    """CPU tensors run the emulated CUDA kernels instead of the CPU kernels.

    `order` is the order in which threads and blocks run: "forward", "reverse", or a number, the
    seed of a random one. A block may have `shared_limit` bytes of shared memory. For the whole
    process, because autograd runs backward on threads of its own.
    """
    global _settings
    before = _settings
    name, seed = (order, 0) if isinstance(order, str) else ("random", order)
    kernels = module()
    _settings = _Settings(name, seed, shared_limit, torch.get_num_threads())
    kernels.emulator.configure(**_settings._asdict())
    try:
        with _route.use_kernels(kernels), _empty_is_nan():
            yield Launches()
    finally:
        _settings = before
        kernels.emulator.configure(**before._asdict())


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


def assert_same_in_every_order(run: Callable[[], Any]) -> Any:
    """Runs `run` on the emulated kernels in three thread orders and compares every bit.

    `run` starts from the same state each time and returns tensors in any nesting; what the first
    run returned is returned.
    """
    results = []
    for order in ORDERS:
        with emulated_cuda(order) as launches:
            results.append(run())
        assert launches.counts(), "no kernel was launched"
    first, spec = pytree.tree_flatten(results[0])
    for order, result in zip(ORDERS[1:], results[1:], strict=True):
        leaves, other_spec = pytree.tree_flatten(result)
        assert spec == other_spec
        for index, (expected, found) in enumerate(zip(first, leaves, strict=True)):
            where = f"result {index} in the order {order!r}"
            if isinstance(expected, torch.Tensor):
                assert expected.shape == found.shape, where
                differing = int((_bits(expected) != _bits(found)).sum())
                assert differing == 0, f"{where}: {differing} bytes differ from forward order"
            else:
                assert expected == found, where
    return results[0]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
