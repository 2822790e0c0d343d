"""What each op means, in float64 and plain PyTorch operators: the definition that tests hold to."""

from fused.reference.attention import (
    attention_with_kv_cache,
    scaled_dot_product_attention,
    varlen_attention,
)
from fused.reference.conv import conv1d, conv2d, conv3d
from fused.reference.lstm import lstm, lstm_cell
from fused.reference.optim import adam, sgd
from fused.reference.rotary import rotary_embedding

__all__ = [
    "adam",
    "attention_with_kv_cache",
    "conv1d",
    "conv2d",
    "conv3d",
    "lstm",
    "lstm_cell",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "sgd",
    "varlen_attention",
]
