"""Training of the reference models, stock and fused side by side: ``python -m fused train``."""

from fused.train.checkpoint import load_checkpoint
from fused.train.command import main

__all__ = ["load_checkpoint", "main"]
