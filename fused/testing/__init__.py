"""What tests, gradient checks and benchmarks share: the rule of comparison and the lists of cases.

The cases of each op are in `fused.testing.cases`, the CUDA kernels on a CPU in
`fused.testing.emulator`, and graphs of them in `fused.testing.emulated_graph`.
"""

from fused.testing.compare import assert_as_accurate_as_stock
from fused.testing.emulator import emulated_cuda

__all__ = ["assert_as_accurate_as_stock", "emulated_cuda"]
