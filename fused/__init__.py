"""Accelerated kernels for PyTorch: drop-in functions, modules and optimizers."""

from fused import functional, models, reference
from fused._explain import explain
from fused._flops import register_formulas as _register_flop_formulas
from fused._patch import patch, unpatch
from fused._version import __version__
from fused.modules import LSTM, Attention, Conv1d, Conv2d, Conv3d, LSTMCell
from fused.optim import SGD, Adam, AdamW, clip_grad_norm_, get_total_norm

__all__ = [
    "LSTM",
    "SGD",
    "Adam",
    "AdamW",
    "Attention",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "LSTMCell",
    "__version__",
    "clip_grad_norm_",
    "explain",
    "functional",
    "get_total_norm",
    "models",
    "patch",
    "reference",
    "unpatch",
]

_register_flop_formulas()
