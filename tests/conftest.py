"""The backends that tests run on: the CPU kernels, the CUDA kernels in the emulator, and a GPU."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fused.testing import emulated_cuda

# Convolutions of float32 are in tf32 on CUDA unless told otherwise, as stock's are. Tests of tf32
# ask for it (fused.testing.tf32); all others mean float32.
torch.backends.cudnn.allow_tf32 = False

BACKENDS = ["cpu", "emulated", *(["cuda"] if torch.cuda.is_available() else [])]

on_gpus = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"], indirect=True)

_deselected = pytest.StashKey[int]()
_CHECKED = "checked"
_backends = pytest.StashKey[dict[str, str]]()


@contextmanager
def threads_given_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of a test's tensors, with the kernels of that backend behind it."""
    if request.param == "emulated":
        # Threads of PyTorch's that wait for work would keep the emulator's own from running.
        with threads_given_back(), emulated_cuda():
            torch.set_num_threads(1)
            yield torch.device("cpu")
    else:
        yield torch.device(request.param)


class Counted:
    """Counts what a test checks, for the report: called once for each."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> None:
        self.number += 1


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Iterator[Counted]:
    count = Counted()
    yield count
    record_property(_CHECKED, count.number)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is the test's to change, and comes back after it."""
    with threads_given_back():
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a module of tensors so small that a second thread only waits for the first."""
    with threads_given_back():
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file that a language model can learn something from."""
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text("the cat sat on the mat; the dog dug in the fog.\n" * 60)
    return path


@pytest.fixture
def emulated_tests_left_out(request: pytest.FixtureRequest) -> str | None:
    """Which tests of the emulated backend this session does not run, in words, if any."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return "this process runs its share of the tests"
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_backends] = {item.nodeid: backend_of(item) for item in items}
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if "emulated" in item.name:
            item.config.stash[_deselected] = item.config.stash.get(_deselected, 0) + 1


def backend_of(item: pytest.Item) -> str:
    """Which kernels a test runs; the emulator's own tests count as emulated."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("backend", "emulated" if "emulat" in item.nodeid else "no backend")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    backends = terminalreporter.config.stash.get(_backends, {})
    tests: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    checked: Counter[tuple[str, str]] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.nodeid in backends:
                backend = backends[report.nodeid]
                tests[backend] += report.when == "call"
                seconds[backend] += report.duration
                if report.when == "teardown":
                    number = sum(n for name, n in report.user_properties if name == _CHECKED)
                    checked[backend, report.nodeid.split("::")[1].split("[")[0]] += number
    terminalreporter.section("backends")
    for backend in sorted(tests):
        share = seconds[backend] / max(sum(seconds.values()), 1e-9)
        terminalreporter.line(
            f"{backend:10}  {tests[backend]:5} tests  {seconds[backend]:6.1f} s  {share:4.0%}"
        )
    for (backend, test), number in sorted(checked.items()):
        if number:
            terminalreporter.line(f"{backend:10}  {number:5} cases of {test}")
