"""Looks back at the whole session: was every CUDA kernel of the tree run in the emulator?"""

from __future__ import annotations

import pytest

from build_support.kernels import find_kernels
from fused.testing import emulator


@pytest.mark.last
def test_every_kernel_ran_emulated_in_every_order(emulated_tests_left_out: str | None) -> None:
    if emulated_tests_left_out:
        pytest.skip(emulated_tests_left_out)
    instances = set(emulator.module().emulator.instances_of(list(find_kernels())))
    assert instances, "no kernel was found in the emulated module"
    assert instances - emulator.kernels_run_in_every_order() == set()
