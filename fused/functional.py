"""The ops as functions: PyTorch's own signatures and meaning, and keyword-only extras after them.

Each runs a CUDA kernel, a C++ kernel for the CPU, or, for what no kernel covers, plain PyTorch;
`fused.explain` says which. Their definitions are in `fused.reference`.
"""

import torch.fx

from fused._attention import scaled_dot_product_attention
from fused._attention_cache import attention_with_kv_cache
from fused._attention_composite import merge_attention
from fused._attention_varlen import varlen_attention
from fused._conv import conv1d, conv2d, conv3d
from fused._lstm import lstm_cell
from fused._rotary import rotary_embedding

__all__ = [
    "attention_with_kv_cache",
    "conv1d",
    "conv2d",
    "conv3d",
    "lstm_cell",
    "merge_attention",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "varlen_attention",
]

# torch.fx.symbolic_trace records a call of what is here, as a call and not what it does.
for _name in __all__:
    torch.fx.wrap(_name)
