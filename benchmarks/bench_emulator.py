"""What the emulator takes on one thread, for 1000 of what kernels do most."""

import ctypes

import pytest
from emulator.library import load_library


@pytest.fixture(scope="module")
def library():
    library = load_library("speed_cases.cu")
    for function in (library.run_products, library.run_blocks):
        function.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("what", ["run_products", "run_blocks"])
def test_emulator(benchmark, library, what):
    """Milliseconds of the table are microseconds of one product, or of one block of 256 threads."""
    assert benchmark(getattr(library, what), 1000) is None
