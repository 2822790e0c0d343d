"""The backends that tests run on: the CPU kernels, the CUDA kernels in the emulator, and a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fused.testing import emulated_cuda

BACKENDS = ["cpu", "emulated", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of a test's tensors, with the kernels of that backend behind it."""
    if request.param == "emulated":
        with emulated_cuda():
            yield torch.device("cpu")
    else:
        yield torch.device(request.param)
