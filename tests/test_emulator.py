"""The emulator itself: small kernels of tests/emulator/cases.cu, each with a known outcome."""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from emulator.library import load_library

FORWARD, REVERSE, RANDOM = range(3)
ORDERS = [(FORWARD, 0), (REVERSE, 0), (RANDOM, 1), (RANDOM, 2)]

# Runs a case on a buffer, in an order, and returns the launch's error or None.
RunCase = Callable[..., "str | None"]


def load_cases(variant: str) -> ctypes.CDLL:
    library = load_library("cases.cu", variant)
    library.run_case.restype = ctypes.c_char_p
    library.launch_log.restype = ctypes.c_char_p
    library.instances.restype = ctypes.c_char_p
    return library


def case_runner(library: ctypes.CDLL) -> RunCase:
    def run(
        name: str, out: np.ndarray, order: int = FORWARD, seed: int = 0, threads: int = 1
    ) -> str | None:
        pointer = out.ctypes.data_as(ctypes.c_void_p)
        status = library.run_case(name.encode(), order, ctypes.c_ulong(seed), threads, pointer)
        return None if status is None else status.decode()

    return run


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    return load_cases("plain")


@pytest.fixture(scope="session")
def run_case(library: ctypes.CDLL) -> RunCase:
    return case_runner(library)


@pytest.fixture(scope="session")
def run_case_with_races() -> RunCase:
    return case_runner(load_cases("races"))


def ints(size: int) -> np.ndarray:
    return np.zeros(size, dtype=np.int32)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("threads", [1, 4])
def test_indices(run_case: RunCase, order: int, seed: int, threads: int) -> None:
    out = ints(12 * 24)
    assert run_case("indices_kernel", out, order, seed, threads) is None
    block, z, y, x = np.meshgrid(*map(np.arange, (12, 3, 2, 4)), indexing="ij")
    np.testing.assert_array_equal(out, (block * 1000 + x * 100 + y * 10 + z).ravel())


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_barriers(run_case: RunCase, order: int, seed: int) -> None:
    out = ints(64)
    assert run_case("reverse_kernel<true>", out, order, seed) is None
    np.testing.assert_array_equal(out, np.arange(64)[::-1])
    assert run_case("reducing_barriers_kernel", out, order, seed) is None
    np.testing.assert_array_equal(out, 22 * 100 + 0 * 10 + 1)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_named_barriers(run_case: RunCase, order: int, seed: int) -> None:
    out = ints(128)
    assert run_case("pairs_of_warps_kernel<true>", out, order, seed) is None
    np.testing.assert_array_equal(out, np.arange(128) ^ 32)
    out = ints(192)
    assert run_case("producer_kernel", out, order, seed) is None
    expected = 100 * np.arange(3)[:, None] + np.tile(np.arange(32) ^ 1, 2)
    np.testing.assert_array_equal(out, expected.ravel())


def test_missing_barrier_shows_in_the_result(run_case: RunCase) -> None:
    results = []
    for order, seed in ORDERS:
        out = ints(64)
        assert run_case("reverse_kernel<false>", out, order, seed) is None
        results.append(out)
        # -1: shared memory that nobody had written yet.
        assert (out == -1).any()
    assert any((results[0] != other).any() for other in results[1:])


@pytest.mark.parametrize("threads", [1, 4])
def test_shared_memory_is_each_blocks_own_and_nan_at_first(run_case: RunCase, threads: int) -> None:
    out = ints(8 * 64)
    assert run_case("static_shared_kernel", out, threads=threads) is None
    sums = [sum(range(block, block + 64)) for block in range(8)]
    np.testing.assert_array_equal(out, np.repeat(sums, 64))
    for name in ("fresh_shared_memory_kernel", "fresh_static_shared_kernel"):
        floats = np.zeros(8 * 64, dtype=np.float32)
        assert run_case(name, floats, threads=threads) is None
        assert np.isnan(floats).all()


def test_thread_orders(run_case: RunCase) -> None:
    def places(order: int, seed: int = 0) -> list[int]:
        out = ints(101)
        assert run_case("order_kernel", out, order, seed) is None
        return out[:100].tolist()

    assert places(FORWARD) == list(range(100))
    assert places(REVERSE) == list(range(100))[::-1]
    assert sorted(places(RANDOM, 1)) == list(range(100))
    assert places(RANDOM, 1) == places(RANDOM, 1) != places(RANDOM, 2)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_shuffles(run_case: RunCase, order: int, seed: int) -> None:
    out = ints(256)
    assert run_case("shuffles_kernel", out, order, seed) is None
    lane = np.arange(32)
    expected = [
        np.full(32, 5),
        lane // 8 * 8 + 1,
        np.where(lane % 16 >= 3, lane - 3, lane),
        np.where(lane % 16 < 13, lane + 3, lane),
        lane ^ 9,
        lane ^ 1,
        lane ^ 1,
        lane ^ 2,
    ]
    np.testing.assert_array_equal(out, np.concatenate(expected))


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_votes_match_and_reduce(run_case: RunCase, order: int, seed: int) -> None:
    out = ints(256)
    assert run_case("votes_kernel", out, order, seed) is None
    lane = np.arange(32)
    tens = [sum(1 << other for other in lane if other // 10 == one // 10) for one in lane]
    expected = [
        np.full(32, sum(1 << one for one in lane if one % 5 == 0)),
        np.full(32, 3),
        np.array(tens),
        np.full(32, 0),  # every bit, and one more for the predicate
        np.full(32, 31 * 16),
        np.full(32, 2**32 - 9),
        np.full(32, 93),
        np.full(32, 2**32 - 1 - 7),
    ]
    np.testing.assert_array_equal(out.view(np.uint32), np.concatenate(expected))


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_collectives_over_half_a_warp(run_case: RunCase, order: int, seed: int) -> None:
    out = ints(256)
    assert run_case("masks_kernel", out, order, seed) is None
    lane = np.arange(32)
    mask = np.where(lane % 2, 0xAAAAAAAA, 0x55555555)
    expected = [
        np.where(lane % 2, 256, 240),
        np.where(lane % 2, -8, -9) % 2**32,
        np.where(lane % 2, 31, 30),
        mask,
        mask & np.where(lane < 16, 0xFFFF, 0xFFFF0000),
        mask ^ 1,
        np.zeros(32),
        mask & 0xFFFF,
    ]
    np.testing.assert_array_equal(out.view(np.uint32), np.concatenate(expected))


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_parts_of_a_warp_go_their_own_way(run_case: RunCase, order: int, seed: int) -> None:
    out = ints(32)
    assert run_case("halves_kernel", out, order, seed) is None
    low = np.repeat([sum(range(8)), sum(range(8, 16))], 8)
    high = np.arange(16, 32) + 10
    np.testing.assert_array_equal(out, np.concatenate([low, high + high[-1]]))


@pytest.mark.parametrize("threads", [1, 4])
def test_atomics_over_blocks_and_os_threads(run_case: RunCase, threads: int) -> None:
    out = ints(8)
    assert run_case("atomics_kernel", out, threads=threads) is None
    assert out[:6].tolist() == [3200, 63 + 49, -49, 2**31 - 1, 1, 42]
    assert out.view(np.float32)[6] == 1600
    assert out[7] == 3200 % 7


def test_atomics_in_shared_memory(run_case: RunCase) -> None:
    out = ints(12)
    assert run_case("shared_atomics_kernel", out, RANDOM, 1) is None
    # Bits that two of 64 threads flip are back; 31 of them were flipped a second, two a third time.
    flips = [sum(thread % 31 == bit for thread in range(64)) for bit in range(31)]
    xor = sum(1 << bit for bit, count in enumerate(flips) if count % 2)
    assert out.reshape(3, 4).tolist() == [[64 * 63 // 2, xor, 63, -64 % 7]] * 3


ERRORS = {
    "bad_exit_before_barrier": r"__syncthreads at cases.cu:\d+ waits for thread \(3, 0, 0\), which "
    "has exited",
    "bad_divergent_barrier": r"__syncthreads at cases.cu:\d+, while thread \(\d+, 0, 0\) waits at "
    r"the one at cases.cu:\d+",
    "bad_barrier_against_shuffle": r"__syncthreads at cases.cu:\d+ waits for thread \(9, 0, 0\), "
    r"which waits at cases.cu:\d+",
    "bad_named_barrier_of_too_few": r"bar.sync 1 at \w+.cuh:\d+ waits for 64 threads, of which 32 "
    "have come",
    "bad_named_barrier_of_an_odd_count": r"the count must be a multiple of 32, at most the block's "
    "64 threads, got 48",
    "bad_named_barrier_zero": r"the barrier must be 1 to 15 \(0 is __syncthreads\), got 0",
    "bad_named_barrier_of_two_counts": r"for (96|128) threads, while others wait for (128|96)",
    "bad_named_barrier_of_half_warps": r"of warp 0 came lanes 0000ffff alone",
    "bad_named_barrier_that_nobody_waits_at": "ends with 32 of 64 threads at barrier 1",
    "bad_named_barrier_twice": r"bar.arrive 1 at \w+.cuh:\d+: comes again before the barrier has "
    "let go",
    "bad_exited_lane": r"__shfl_sync at cases.cu:\d+: mask ffffffff names lane 3, which has exited",
    "bad_caller_not_in_mask": r"mask 00000001 does not name the calling lane \d+",
    "bad_lane_not_in_mask": "a lane reads from a lane that is not in the mask",
    "bad_masks_differ": r"with mask [0-9a-f]{8}, while lane \d+ waits in __shfl_sync at "
    r"cases.cu:\d+ with mask [0-9a-f]{8}",
    "bad_collectives_differ": r"while lane \d+ waits in __(shfl_xor|any)_sync",
    "bad_misaligned": r"misaligned access at .*cases.cu:\d+: .* must be a multiple of 16",
    "bad_index": r"index out of bounds at .*cases.cu:\d+: 4 in ",
    "bad_shared_write": r"wrote byte 64 of its shared memory, which has 64",
}


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_kernel_block_and_thread(
    run_case: RunCase, name: str, order: int, seed: int
) -> None:
    # One float off sixteen bytes, whatever numpy's alignment.
    buffer = np.zeros(260, dtype=np.int32)
    start = (4 - buffer.ctypes.data // 4 % 4) % 4
    error = run_case(name, buffer[start:], order, seed)
    assert error is not None
    where = re.escape(f"fused::cases::{name}: block (0, 0, 0)") + r"(, thread \(\d+, 0, 0\))?: .*"
    assert re.search(where + ERRORS[name], error), error


def test_launch_limits(run_case: RunCase) -> None:
    out = ints(64)
    assert "1 to 1024 threads" in str(run_case("too many threads", out))
    assert "65536 bytes of shared memory, asked for 70000" in str(
        run_case("too much shared memory", out)
    )
    assert "65536 bytes of shared memory, asked for 65537" in str(
        run_case("too much shared memory, part of it static", out)
    )
    assert "(2147483647, 65535, 65535) blocks" in str(run_case("too many rows", out))
    assert run_case("no blocks", out) is None


def test_a_failed_launch_leaves_nothing_behind(run_case: RunCase) -> None:
    out = ints(64)
    assert run_case("bad_exit_before_barrier", out) is not None
    assert run_case("reverse_kernel<true>", out) is None
    np.testing.assert_array_equal(out, np.arange(64)[::-1])


def test_launches_are_counted_by_name(library: ctypes.CDLL, run_case: RunCase) -> None:
    def counts() -> Counter[str]:
        lines = library.launch_log().decode().splitlines()
        return Counter({name: int(count) for name, count in map(str.split, lines)})

    before = counts()
    out = ints(256)
    for name in ("reverse_kernel<true>", "shuffles_kernel", "shuffles_kernel", "no blocks"):
        assert run_case(name, out) is None
    launched = {"fused::cases::reverse_kernel<true>": 1, "fused::cases::shuffles_kernel": 2}
    assert counts() - before == launched


def test_instances_of_a_template_are_listed(library: ctypes.CDLL) -> None:
    names = library.instances(b"reverse_kernel").decode().splitlines()
    assert names == [f"fused::cases::reverse_kernel<{value}>" for value in ("false", "true")]
    assert library.instances(b"reverse").decode() == ""


# Where the race is; whether the read or the write comes first depends on the order.
RACES = {
    "neighbour_kernel<false>": r"byte \d+ of shared memory",
    "reused_tile_kernel<false>": r"byte \d+ of shared memory",
    "pairs_of_warps_kernel<false>": r"byte \d+ of shared memory",
    "race_after_arrival": r"byte \d+ of shared memory",
    "race_shuffle_is_no_barrier": r"byte \d+ of shared memory",
    "race_between_blocks": r"address 0x[0-9a-f]+",
    "race_read_of_another_block": r"address 0x[0-9a-f]+",
    "race_atomic_against_plain": r"address 0x[0-9a-f]+",
}


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("name", RACES)
def test_races_are_found_in_every_order(
    run_case_with_races: RunCase, name: str, order: int, seed: int
) -> None:
    error = run_case_with_races(name, ints(128), order, seed)
    text = (
        rf"thread \(\d+, 0, 0\): race: (reads|writes) {RACES[name]} at \w+\.\w+:\d+, which thread "
        r"\(\d+, 0, 0\) of block \(\d, 0, 0\) (wrote|read) at \w+\.\w+:\d+ with no barrier between"
    )
    assert error is not None
    assert re.search(text, error), error


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize(
    "name",
    [
        "neighbour_kernel<true>",
        "reused_tile_kernel<true>",
        "bytes_of_one_word_kernel",
        "reverse_kernel<true>",
        "pairs_of_warps_kernel<true>",
        "producer_kernel",
        "static_shared_kernel",
        "fresh_static_shared_kernel",
        "shared_atomics_kernel",
        "fresh_shared_memory_kernel",
        "atomics_kernel",
        "indices_kernel",
    ],
)
def test_ordered_accesses_are_no_races(
    run_case_with_races: RunCase, name: str, order: int, seed: int
) -> None:
    assert run_case_with_races(name, ints(1024), order, seed) is None
