"""A small convolutional classifier without normalisation: convolutions, activations and pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fused.models._layers import LayerName, layer_set


class ConvNet(nn.Module):
    """Image classifier in the manner of VGG.

    Every stage is two 3x3 convolutions with an activation each, then a 2x2 max-pool that halves the
    image; the mean over what is left of the image goes through one linear layer. Any image works
    whose sides are at least ``2 ** len(channels)``: digits (8x8), MNIST (28x28), CIFAR-10 (32x32).

    Args:
        in_channels: channels of the image.
        num_classes: size of the output.
        channels: output channels of each stage.
        activation: what follows every convolution, as in ``fused.Conv2d(activation=...)``.
        dropout: probability of dropping a feature before the last layer.
        layers: ``"stock"`` or ``"fused"``.

    Shape:
        - Input: ``[N, in_channels, H, W]``
        - Output: ``[N, num_classes]``, logits

    Example:
        >>> model = fused.models.ConvNet(in_channels=3, layers="fused")
        >>> model(torch.randn(8, 3, 32, 32)).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        *,
        channels: Sequence[int] = (32, 64, 128),
        activation: str = "relu",
        dropout: float = 0.0,
        layers: LayerName = "fused",
    ) -> None:
        super().__init__()
        if not channels:
            raise ValueError("ConvNet: channels must name at least one stage, got none")
        conv2d = layer_set(layers).conv2d
        stages = []
        for width in channels:
            stages.append(
                nn.Sequential(
                    conv2d(in_channels, width, 3, padding=1, activation=activation),
                    conv2d(width, width, 3, padding=1, activation=activation),
                    nn.MaxPool2d(2),
                )
            )
            in_channels = width
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(in_channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation of the convolutions, GPT-2's of the last layer; biases are zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.stages(images)  # [N, C, H / 2**stages, W / 2**stages]
        return self.head(self.dropout(features.mean(dim=(2, 3))))
