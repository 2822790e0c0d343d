"""Speed of every op against stock PyTorch: ``python -m fused bench``, and what benchmarks/ runs."""

from fused.bench.command import main

__all__ = ["main"]
