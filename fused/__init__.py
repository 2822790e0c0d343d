"""Accelerated kernels for PyTorch: drop-in functions, modules and optimizers."""

from fused import functional
from fused._version import __version__
from fused.modules import LSTM, LSTMCell
from fused.optim import SGD, Adam, AdamW

__all__ = ["LSTM", "LSTMCell", "SGD", "Adam", "AdamW", "__version__", "functional"]
