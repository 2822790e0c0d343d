"""What a benchmark case is: one piece of work, written once, run by stock and by fused layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Contender = Literal["stock", "fused", "compiled"]
Runnable = Callable[[], Sequence[Tensor]]

DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class Workbench:
    """Builds what a case needs: the same values for every contender, in any precision.

    Values are drawn in float32 and rounded to the case's dtype; the float64 truth starts from those
    rounded values too, so that it differs from the contenders by their arithmetic alone.
    """

    def __init__(
        self, contender: Contender, device: torch.device, dtype: torch.dtype, *, exact: bool = False
    ) -> None:
        self.layers: Literal["stock", "fused"] = "fused" if contender == "fused" else "stock"
        self.device = device
        self._compile = contender == "compiled"
        self._dtype = dtype
        self._exact = exact
        self._generator = torch.Generator().manual_seed(0)

    def tensor(self, *shape: int, scale: float = 1.0, requires_grad: bool = False) -> Tensor:
        drawn = scale * torch.randn(shape, generator=self._generator)
        return self._cast(drawn).requires_grad_(requires_grad)

    def module(self, make: Callable[[], nn.Module]) -> nn.Module:
        """What ``make`` returns, its parameters drawn afresh: how a layer draws them is its own."""
        module = make().to(self.device)
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
            parameter.data = self.tensor(*parameter.shape, scale=fan_in**-0.5)
        return module

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, compiled if that is how this contender runs it."""
        return torch.compile(function) if self._compile else function

    def _cast(self, values: Tensor) -> Tensor:
        rounded = values.to(self.device, self._dtype)
        return rounded.double() if self._exact else rounded


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    op: str
    name: str
    dtype: torch.dtype
    build: Callable[[Workbench], Runnable]
    work: float  # floating-point operations, or bytes that one pass over memory moves
    unit: Literal["GFLOP/s", "GB/s"]
    quick: bool = False  # part of a quick run

    def __str__(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]} {self.name}"

    def prepare(self, contender: Contender, device: torch.device) -> Runnable:
        return self.build(Workbench(contender, device, self.dtype))

    def prepare_truth(self, device: torch.device) -> Runnable:
        return self.build(Workbench("stock", device, self.dtype, exact=True))


def direction(backward: bool) -> str:
    return "fwd+bwd" if backward else "fwd"


def forward_only(function: Callable[[], Tensor]) -> Runnable:
    def run() -> Sequence[Tensor]:
        with torch.no_grad():
            return (function(),)

    return run


def forward_backward(
    function: Callable[[], Tensor], inputs: Iterable[Tensor], grad: Tensor
) -> Runnable:
    """The output and the gradients of ``inputs`` for the output's gradient ``grad``."""
    inputs = list(inputs)

    def run() -> Sequence[Tensor]:
        out = function()
        return (out.detach(), *torch.autograd.grad(out, inputs, grad))

    return run
