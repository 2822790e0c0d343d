"""Convolution layers: `torch.nn`'s own, run by fused kernels, with an activation."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fused import functional
from fused._conv import check_activation

_DOC = """:class:`torch.nn.Conv{axes}d` with bias and activation in one kernel.

    Takes every argument of its twin, with the same meaning, and one more. State dicts load both
    ways.

    Args:
        activation: None, ``"relu"``, ``"gelu"``, ``"silu"``, ``"leaky_relu"``, ``"sigmoid"`` or
            ``"tanh"``. With one, ``torch.nn.utils.fusion.fuse_conv_bn_eval`` must not be used: the
            activation would come behind the batch norm.
    """


class _ActivatedConv:
    """What the three layers add to their stock class, which comes after this one."""

    # A class attribute too: layers that were pickled or built as the stock class have none.
    activation: str | None = None

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        check_activation(type(self).__name__.lower(), activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer: Any = self
        axes = len(layer.kernel_size)
        conv = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
        padding = layer.padding
        if layer.padding_mode != "zeros":
            around = layer._reversed_padding_repeated_twice
            input, padding = F.pad(input, around, mode=layer.padding_mode), 0
        return conv(
            input,
            weight,
            bias,
            layer.stride,
            padding,
            layer.dilation,
            layer.groups,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        # A mixin: the method is that of the stock class beside it.
        text: str = super().extra_repr()  # type: ignore[misc]
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


# What help() shows and nn.utils.skip_init looks at: stock's parameters, of one name in all layers.
_of_stock = inspect.signature(nn.Conv2d.__init__)
_extra = inspect.signature(_ActivatedConv.__init__).parameters["activation"]
vars(_ActivatedConv.__init__)["__signature__"] = _of_stock.replace(
    parameters=[*_of_stock.parameters.values(), _extra]
)


class Conv1d(_ActivatedConv, nn.Conv1d):
    __doc__ = _DOC.format(axes=1)


class Conv2d(_ActivatedConv, nn.Conv2d):
    __doc__ = _DOC.format(axes=2)


class Conv3d(_ActivatedConv, nn.Conv3d):
    __doc__ = _DOC.format(axes=3)
