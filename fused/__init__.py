"""Accelerated kernels for PyTorch: drop-in functions, modules and optimizers."""

from fused import functional
from fused._version import __version__

__all__ = ["__version__", "functional"]
