"""Cases of convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = [None, "relu", "gelu", "silu", "leaky_relu", "sigmoid", "tanh"]


@dataclass(frozen=True)
class ConvCase:
    """Shapes and options of one call; `make` draws its tensors."""

    name: str
    size: tuple[int, ...] = (7, 6)  # as many axes as it has elements
    kernel: tuple[int, ...] = (3, 3)
    batch: int = 2
    in_channels: int = 3
    out_channels: int = 4
    groups: int = 1
    bias: bool = True
    stride: int | tuple[int, ...] = 1
    padding: str | int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    activation: str | None = None
    layout: str = "contiguous"

    @property
    def op(self) -> str:
        return f"conv{len(self.size)}d"

    def make(
        self, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """[input, weight, bias if there is one], keyword arguments."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        input = self._lay_out(draw(self.batch, self.in_channels, *self.size))
        weight = draw(self.out_channels, self.in_channels // self.groups, *self.kernel)
        if self.layout in ("channels-last", "channels-last weight") and len(self.size) > 1:
            weight = weight.to(memory_format=self._channels_last())
        if self.layout == "odd strides":
            weight = draw(*weight.shape[1:], self.out_channels).movedim(-1, 0)
        tensors = [input, weight]
        if self.bias:
            every = 2 if self.layout == "odd strides" else 1
            tensors.append(draw(every * self.out_channels)[::every])
        options = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "activation": self.activation,
        }
        return tensors, options

    def _channels_last(self) -> torch.memory_format:
        return torch.channels_last if len(self.size) == 2 else torch.channels_last_3d

    def _lay_out(self, input: Tensor) -> Tensor:
        if self.layout in ("channels-last", "channels-last input"):
            if input.dim() == 3:  # no name for it, the strides alone
                return input.transpose(1, 2).contiguous().transpose(1, 2)
            return input.to(memory_format=self._channels_last())
        if self.layout == "odd strides":  # a window of a larger tensor, its axes reversed
            larger = input.new_zeros([n + 3 for n in reversed(input.shape)]).permute(
                *reversed(range(input.dim()))
            )
            return larger[tuple(slice(1, n + 1) for n in input.shape)].copy_(input)
        if self.layout == "expanded":
            return input[:1, :, ..., :1].expand(input.shape)
        return input


def _layouts(**options: Any) -> list[ConvCase]:
    """The same case contiguous and channels-last."""
    name = options.pop("name")
    return [
        ConvCase(name, **options),
        ConvCase(f"{name}, channels-last", layout="channels-last", **options),
    ]


CASES = [
    ConvCase("plain"),
    ConvCase("one", size=(1, 1), kernel=(1, 1), batch=1, in_channels=1, out_channels=1),
    *_layouts(name="1x1", kernel=(1, 1), in_channels=20, out_channels=18),
    *_layouts(name="1x1 of one pixel", size=(1, 1), kernel=(1, 1), in_channels=19, out_channels=33),
    *_layouts(name="1x1 stride 2", kernel=(1, 1), stride=2, in_channels=9, out_channels=10),
    *_layouts(name="padded", padding=1, in_channels=8, out_channels=16),
    *_layouts(name="beyond tiles", size=(13, 11), padding=1, in_channels=17, out_channels=70),
    *_layouts(
        name="small images", size=(2, 2), batch=37, padding=1, in_channels=70, out_channels=64
    ),
    *_layouts(name="many images", size=(4, 3), batch=75, padding=1, in_channels=9, out_channels=20),
    *_layouts(
        name="padding beyond the kernel, wide",
        kernel=(2, 1),
        padding=(3, 2),
        in_channels=12,
        out_channels=36,
    ),
    *_layouts(name="stride 2", padding=1, stride=2, in_channels=5, out_channels=9),
    *_layouts(
        name="stride 3, dilation 2, wide",
        size=(11, 12),
        stride=3,
        dilation=2,
        padding=2,
        in_channels=10,
        out_channels=21,
    ),
    *_layouts(name="stride (3, 2)", size=(11, 9), padding=(2, 1), stride=(3, 2), out_channels=17),
    *_layouts(name="dilated", size=(9, 8), padding=2, dilation=2),
    *_layouts(name="dilation and stride", size=(11, 12), dilation=(2, 3), stride=(2, 2), padding=3),
    *_layouts(name="dilation 2, stride 4", size=(12, 13), dilation=2, stride=4, padding=1),
    ConvCase("stride beyond the kernel", kernel=(1, 2), stride=(3, 4)),
    ConvCase("padding beyond the kernel", kernel=(2, 1), padding=(3, 2)),
    ConvCase("kernel of the input's size", size=(3, 4), kernel=(3, 4)),
    *_layouts(name="groups", in_channels=6, out_channels=8, groups=2, padding=1),
    *_layouts(name="wide groups", in_channels=20, out_channels=40, groups=2, stride=2, padding=1),
    *_layouts(name="depthwise", in_channels=21, out_channels=21, groups=21, padding=1),
    *_layouts(name="depthwise wide", size=(5, 5), in_channels=66, out_channels=66, groups=66),
    *_layouts(
        name="depthwise stride 2", in_channels=5, out_channels=5, groups=5, padding=1, stride=2
    ),
    *_layouts(
        name="depthwise dilated", in_channels=3, out_channels=3, groups=3, padding=3, dilation=2
    ),
    *_layouts(name="depthwise times 3", in_channels=4, out_channels=12, groups=4, padding=1),
    *_layouts(name="depthwise times 17", in_channels=3, out_channels=51, groups=3, padding=1),
    *_layouts(name="same", kernel=(4, 3), padding="same"),
    ConvCase("same, dilated", kernel=(2, 3), padding="same", dilation=(3, 1)),
    ConvCase("valid", padding="valid"),
    ConvCase("no bias", bias=False),
    ConvCase("one input channel", size=(12, 12), in_channels=1, out_channels=32, padding=1),
    *_layouts(name="few channels", size=(9, 50), kernel=(5, 5), padding=2, out_channels=19),
    ConvCase("one output channel", in_channels=24, out_channels=1, padding=1),
    ConvCase("many rows", size=(41, 29), padding=1, batch=1),
    ConvCase("no batch", batch=0),
    ConvCase("channels-last input", layout="channels-last input", out_channels=16),
    ConvCase("channels-last weight", layout="channels-last weight", out_channels=16),
    ConvCase("odd strides", layout="odd strides", padding=1),
    ConvCase("relu, odd strides", layout="odd strides", padding=1, activation="relu"),
    ConvCase("odd strides, wide", layout="odd strides", in_channels=12, out_channels=40),
    ConvCase("expanded", layout="expanded"),
    ConvCase("expanded, wide", layout="expanded", in_channels=10, out_channels=16),
    *[ConvCase(f"1d {n}", size=(n,), kernel=(3,), padding=1) for n in (1, 3, 16, 600)],
    ConvCase("1d, wide", size=(600,), kernel=(3,), in_channels=11, out_channels=18, padding=1),
    ConvCase("1d, channels-last", size=(21,), kernel=(4,), in_channels=9, layout="channels-last"),
    ConvCase(
        "1d depthwise causal-like",
        size=(33,),
        kernel=(4,),
        in_channels=6,
        out_channels=6,
        groups=6,
        padding="same",
    ),
    ConvCase("1d strided, dilated", size=(40,), kernel=(5,), stride=3, dilation=2, padding=4),
    *_layouts(name="3d", size=(4, 5, 6), kernel=(3, 2, 3), padding=1),
    *_layouts(
        name="3d stride, dilation",
        size=(7, 6, 8),
        kernel=(2, 3, 2),
        stride=(2, 1, 3),
        dilation=(3, 2, 1),
        padding=(1, 2, 0),
        in_channels=4,
        out_channels=9,
    ),
    *_layouts(
        name="3d depthwise",
        size=(4, 5, 6),
        kernel=(3, 3, 3),
        padding=1,
        stride=(1, 2, 1),
        in_channels=4,
        out_channels=4,
        groups=4,
    ),
    *_layouts(
        name="3d groups, same",
        size=(3, 4, 5),
        kernel=(2, 3, 4),
        padding="same",
        in_channels=4,
        out_channels=20,
        groups=2,
    ),
    *[ConvCase(f"{name}", activation=name, padding=1) for name in ACTIVATIONS if name],
    ConvCase("gelu, wide", activation="gelu", size=(9, 5), out_channels=50),
    *[
        ConvCase(f"{name}, channels-last", activation=name, layout="channels-last", out_channels=17)
        for name in ("relu", "gelu")
    ],
]
