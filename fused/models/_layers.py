"""The layers that the reference models are built from: stock PyTorch's, or their fused twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

LayerName = Literal["stock", "fused"]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class StockConv2d(nn.Conv2d):
    """``nn.Conv2d`` followed by an activation: what ``fused.Conv2d(activation=...)`` replaces.

    It holds the same parameters under the same names as the fused layer.
    """

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if activation is not None and activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ValueError(
                f"conv2d: activation must be None or one of {known}, got {activation!r}"
            )
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = super().forward(input)
        return out if self.activation is None else _ACTIVATIONS[self.activation](out)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class Layers(NamedTuple):
    """One constructor per kind of layer; both sets are called with the same arguments."""

    conv2d: Callable[..., nn.Module]
    lstm: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]


def layer_set(name: LayerName) -> Layers:
    """The stock or the fused layers."""
    if name == "stock":
        return Layers(StockConv2d, nn.LSTM, nn.MultiheadAttention)
    if name == "fused":
        import fused  # here, because `fused` itself may be what imports this module

        return Layers(fused.Conv2d, fused.LSTM, fused.Attention)
    raise ValueError(f"models: layers must be 'stock' or 'fused', got {name!r}")
