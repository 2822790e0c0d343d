"""torch.optim's Adam, AdamW and SGD, one C++ call per parameter group."""

from fused.optim._adam import Adam, AdamW
from fused.optim._sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
