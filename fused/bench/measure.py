"""How a case is checked and timed: correctness first, then all contenders in turns."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fused.bench.case import Case, Contender
from fused.testing import assert_as_accurate_as_stock

_BLOCK_SECONDS = 0.005  # a block of calls lasts at least this long, or one call
_SLOW_SECONDS = 0.02  # a call this long is not noticeably slower for finding its caches cold
_MIN_ROUNDS = 5
_LARGE_BYTES = 128 << 20  # far beyond any cache, to copy and for a case to be compared with that
_LARGE_OPERATIONS = 1 << 28  # from here on a case's products, not its calls, are what takes time
_PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}  # of square matrices that keep the machine busy


@dataclass(frozen=True)
class Timing:
    """Seconds per call in each round; the rounds of two contenders go in pairs."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Result:
    """What was measured of one case."""

    case: Case
    timings: dict[Contender, Timing]
    stock_kernel: str  # what stock spent most of its time in
    wrong: str | None  # how fused failed its check
    failed: dict[Contender, str]  # contenders that could not run, and why
    machine_rate: float | None = None  # what plain work of the case's unit reaches meanwhile

    def ratios(self, contender: Contender = "fused") -> list[float]:
        """How many times faster than stock, round by round."""
        pairs = zip(self.timings["stock"].rounds, self.timings[contender].rounds, strict=True)
        return [stock / other for stock, other in pairs]

    def ratio(self, contender: Contender = "fused") -> float:
        return statistics.median(self.ratios(contender))

    def rate(self, contender: Contender) -> float:
        """Work per second, in the case's unit."""
        return self.case.work / self.timings[contender].median / 1e9


def run_case(case: Case, device: torch.device, seconds: float, *, compiled: bool = False) -> Result:
    """Checks a case, then times its contenders for about ``seconds`` each."""
    wrong = check(case, device)
    runs = {name: case.prepare(name, device) for name in ("stock", "fused")}
    failed: dict[Contender, str] = {}
    if compiled:
        torch.compiler.reset()  # after some shapes of one function the compiler gives up on it
        run = case.prepare("compiled", device)
        try:
            run()
            runs["compiled"] = run
        except Exception as error:  # the compiler's failure is a result, whatever its kind
            failed["compiled"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    plain, work = _plain_work(case, device)
    timings = interleave({**runs, **plain}, device, seconds)
    rates = [work / timings.pop(name).median / 1e9 for name in plain]
    kernel = main_kernel(runs["stock"], device)
    return Result(case, timings, kernel, wrong, failed, max(rates, default=None))


def _plain_work(case: Case, device: torch.device) -> tuple[Mapping[Any, Callable[[], Any]], float]:
    """What the machine is measured by in the case's unit, and the work in each; for a small case,
    of which it would say nothing, none.

    A copy and a pass in place over memory, or products of matrices in the case's precision and in
    float32: which of them is faster is the machine's choice. They take turns with the contenders,
    because what it reaches changes with whatever else it does.
    """
    if case.unit == "GB/s" and case.work >= _LARGE_BYTES:
        source = torch.ones(_LARGE_BYTES // 4, device=device)
        target = torch.zeros_like(source)
        passes = {"copy": lambda: target.copy_(source), "in place": lambda: source.neg_()}
        return passes, 2 * _LARGE_BYTES
    if case.unit == "GFLOP/s" and case.work >= _LARGE_OPERATIONS:
        size = _PRODUCT_SIZE[device.type]
        whole = torch.randn(size, size, device=device)
        factors = {dtype: whole.to(dtype) for dtype in (case.dtype, torch.float32)}
        products = {dtype: functools.partial(torch.mm, a, a) for dtype, a in factors.items()}
        return products, 2 * size**3
    return {}, 0


def check(case: Case, device: torch.device) -> str | None:
    """None if fused is as close to the float64 truth as the rule asks for, else what is not."""
    results = [
        [tensor.detach().clone() for tensor in run()]
        for run in (
            case.prepare("fused", device),
            case.prepare_truth(device),
            case.prepare("stock", device),
        )
    ]
    try:
        for index, (ours, truth, stock) in enumerate(zip(*results, strict=True)):
            assert_as_accurate_as_stock(ours, truth, stock, f"result {index}")
    except AssertionError as error:
        return str(error)
    return None


def interleave(
    runs: dict[Any, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[Any, Timing]:
    """Times all of ``runs`` in rounds, for about ``seconds`` each.

    In a round each runs one block of calls, and who begins goes round. What else the machine does
    then meets all alike, and the ratio of two blocks of one round says more than that of two means.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    blocks = {name: _block(run, synchronize) for name, run in runs.items()}
    order = list(runs)
    rounds: dict[Any, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    while len(rounds[order[0]]) < _MIN_ROUNDS or time.perf_counter() < end:
        for name in order:
            rounds[name].append(blocks[name]())
        order = [*order[1:], order[0]]
    return {name: Timing(tuple(times)) for name, times in rounds.items()}


def _block(run: Callable[[], Any], synchronize: Callable[[], Any]) -> Callable[[], float]:
    """A function that times one block of calls of ``run`` and returns the seconds per call."""

    def timed(calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize()
        return (time.perf_counter() - start) / calls

    run()  # the first call of all may compile, choose algorithms or touch new memory
    once = timed(1)
    calls = max(1, round(_BLOCK_SECONDS / once))

    def block() -> float:
        if once < _SLOW_SECONDS:
            run()  # untimed: the other contenders had the caches
        return timed(calls)

    return block


def main_kernel(run: Callable[[], Sequence[Any]], device: torch.device) -> str:
    """The PyTorch operator that ``run`` spends most of its time in: it names stock's backend."""
    # Otherwise the profiler's library announces each start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"

    def times() -> dict[str, float]:
        with profile(activities=activities) as profiler:
            run()
        return {event.key: getattr(event, time_of) for event in profiler.key_averages()}

    # The least of several runs: in a single one, whatever the machine does beside it counts too.
    runs = [times() for _ in range(3)]
    operators = [key for key in runs[0] if key.startswith("aten::")]
    longest = max(operators, key=lambda key: min(t.get(key, 0.0) for t in runs), default="none")
    return longest.removeprefix("aten::").lstrip("_")
