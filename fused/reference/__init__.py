"""What each op means, in float64 and plain PyTorch operators: the definition that tests hold to."""

from fused.reference.attention import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
