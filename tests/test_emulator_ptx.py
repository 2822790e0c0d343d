"""The emulated PTX instructions: matrix products, matrix loads and stores, asynchronous copies."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from emulator.library import load_library

ORDERS = [0, 1, 2]
RunCase = Callable[[str, int, np.ndarray, np.ndarray], "str | None"]


@pytest.fixture(scope="session", params=["plain", "races"])
def run_case(request: pytest.FixtureRequest) -> RunCase:
    library = load_library("ptx_cases.cu", request.param)
    library.run_ptx_case.restype = ctypes.c_char_p

    def run(name: str, order: int, given: np.ndarray, out: np.ndarray) -> str | None:
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (given, out))
        status = library.run_ptx_case(name.encode(), order, *pointers)
        return None if status is None else status.decode()

    return run


def aligned(dtype: type, size: int) -> np.ndarray:
    """Zeros on a boundary of 16 bytes, whatever numpy's own."""
    buffer = np.zeros(size * np.dtype(dtype).itemsize + 16, dtype=np.uint8)
    start = -buffer.ctypes.data % 16
    return buffer[start : start + size * np.dtype(dtype).itemsize].view(dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_product_of_16_bit_matrices(
    run_case: RunCase, name: str, dtype: torch.dtype, order: int
) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    given = aligned(np.uint16, 384)
    given[:] = torch.cat([a.reshape(-1), b.reshape(-1)]).view(torch.uint16).numpy()
    out = np.zeros((16, 8), dtype=np.float32)
    assert run_case(name, order, given, out) is None
    expected = (a.double() @ b.double()).float().numpy()
    # Products of 16-bit numbers are exact in double: one rounding, at the end.
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_product_of_tf32_matrices(run_case: RunCase, order: int) -> None:
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    given = torch.cat([x.reshape(-1) for x in (a, b, c)]).numpy()
    out = np.zeros((16, 8), dtype=np.float32)
    assert run_case("tf32", order, given, out) is None
    shortened = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b)]
    expected = (shortened[0] @ shortened[1] + c.double()).float()
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=0, atol=4e-7)
    assert not np.array_equal(out, (a.double() @ b.double() + c.double()).float().numpy())


def test_rounding_to_tf32(run_case: RunCase) -> None:
    step = 2.0**-10
    pairs = {
        1 + step * 0.49: 1.0,
        1 + step * 0.5: 1 + step,  # halves away from zero
        -1 - step * 0.5: -1 - step,
        1 + step * 1.49: 1 + step,
        2 - step * 0.5: 2.0,
        step * 2**-126: step * 2**-126,  # the least there is
        3.4028234e38: np.inf,
        -np.inf: -np.inf,
        np.nan: np.nan,
    }
    given, out = (np.zeros(32, dtype=np.float32) for _ in range(2))
    given[: len(pairs)] = list(pairs)
    assert run_case("round to tf32", 0, given, out) is None
    np.testing.assert_array_equal(out[: len(pairs)], np.float32(list(pairs.values())))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("store", ["plain", "transposed"])
@pytest.mark.parametrize("load", ["plain", "transposed"])
def test_matrices_load_and_store(run_case: RunCase, load: str, store: str, order: int) -> None:
    given, out = np.arange(256, dtype=np.uint16), np.zeros(256, dtype=np.uint16)
    assert run_case(f"{load} {store}", order, given, out) is None
    matrices = given.reshape(4, 8, 8)
    expected = matrices if load == store else matrices.transpose(0, 2, 1)
    np.testing.assert_array_equal(out.reshape(4, 8, 8), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_copies_land_when_they_are_waited_for(run_case: RunCase, order: int) -> None:
    given, out = aligned(np.float32, 384), aligned(np.float32, 3 * 384)
    given[:] = np.arange(384)
    assert run_case("copies", order, given, out) is None
    before, between, after = out.reshape(3, 3, 32, 4)
    groups = given.reshape(3, 32, 4)
    assert np.isnan(before).all()
    np.testing.assert_array_equal(between[:2], groups[:2])
    assert np.isnan(between[2]).all()
    np.testing.assert_array_equal(after[:2], groups[:2])
    # The last copies one float of four.
    np.testing.assert_array_equal(after[2], groups[2] * [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("misaligned row", r"misaligned access at .*: .*MatrixRow.* must be a multiple of 16"),
        ("row in global memory", r"ldmatrix at .*ptx_cases.cu:\d+: must be in shared memory"),
        (
            "copy behind the end",
            r"cp.async at .*ptx_cases.cu:\d+: must be in shared memory, got byte",
        ),
    ],
)
def test_errors(run_case: RunCase, name: str, error: str) -> None:
    found = run_case(name, 0, aligned(np.uint16, 64), aligned(np.uint16, 64))
    assert found is not None
    assert re.search(error, found), found
