"""The ops as functions: PyTorch's own signatures and meaning, and keyword-only extras after them.

Each runs a CUDA kernel, a C++ kernel for the CPU, or, for what no kernel covers, plain PyTorch;
`fused.explain` says which. Their definitions are in `fused.reference`.
"""

from fused._attention import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
