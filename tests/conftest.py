"""The backends that tests run on: the CPU kernels, the CUDA kernels in the emulator, and a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from fused.testing import emulated_cuda

BACKENDS = ["cpu", "emulated", *(["cuda"] if torch.cuda.is_available() else [])]

_deselected = pytest.StashKey[int]()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of a test's tensors, with the kernels of that backend behind it."""
    if request.param == "emulated":
        with emulated_cuda():
            yield torch.device("cpu")
    else:
        yield torch.device(request.param)


@pytest.fixture
def emulated_tests_left_out(request: pytest.FixtureRequest) -> str | None:
    """Which tests of the emulated backend this session does not run, in words, if any."""
    deselected = request.config.stash.get(_deselected, 0)
    if deselected:
        return f"{deselected} tests of the emulated backend were deselected"
    collected = {item.path for item in request.session.items}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path not in collected and "backend: torch.device" in path.read_text():
            return f"{path.name} is not part of this run"
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "last: looks back at the session, and so runs at its end")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if "emulated" in item.name:
            item.config.stash[_deselected] = item.config.stash.get(_deselected, 0) + 1
