"""pytest-benchmark over the cases of ``fused.bench``: ``pytest benchmarks [--device cuda]``.

Every case is a group of two rows, stock and fused. Each round of a row is preceded by a call of the
other contender, so that whatever else the machine does meets both alike.
"""

from __future__ import annotations

import pytest
import torch

from fused.bench.cases import cases
from fused.bench.measure import check

ROUNDS = 15
CONTENDERS = ("stock", "fused")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the device of the benchmarks")


def pytest_generate_tests(metafunc):
    """Gives a test marked ``op("attention")`` all cases of that op, for both contenders."""
    marker = metafunc.definition.get_closest_marker("op")
    if marker is not None:
        metafunc.parametrize("case", cases(*marker.args), ids=str)
        metafunc.parametrize("contender", CONTENDERS)


def pytest_configure(config):
    config.addinivalue_line("markers", "op(name): benchmark all cases of one op")


@pytest.fixture
def compare(benchmark, request):
    """Checks a case, then times one contender of it, with the other in between."""
    device = torch.device(request.config.getoption("--device"))

    def run(case, contender):
        assert (wrong := check(case, device)) is None, wrong
        runs = {name: case.prepare(name, device) for name in CONTENDERS}
        timed = runs.pop(contender)
        (other,) = runs.values()

        def synchronized():
            timed()
            if device.type == "cuda":
                torch.cuda.synchronize()

        def before_each_round():
            other()
            timed()  # untimed: the other has had the caches
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = str(case)
        benchmark.extra_info |= {"torch": torch.__version__, "device": str(device)}
        benchmark.pedantic(synchronized, setup=before_each_round, rounds=ROUNDS, warmup_rounds=2)

    return run
