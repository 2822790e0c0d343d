"""torch.optim's Adam, AdamW and SGD, one C++ call per parameter group."""

from fused.optim._adam import Adam, AdamW
from fused.optim._clip import clip_grad_norm_, get_total_norm
from fused.optim._in_backward import step_after_backward, step_in_backward
from fused.optim._sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "clip_grad_norm_",
    "get_total_norm",
    "step_after_backward",
    "step_in_backward",
]
