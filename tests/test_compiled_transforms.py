"""torch.func's transforms inside a compiled graph, for every op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fused
from fused import functional

Loss = Callable[[Tensor], Tensor]


def attention(x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x, x, x, is_causal=True).square().sum()


def rotary(x: Tensor) -> Tensor:
    angles = torch.linspace(0, 3, 10, dtype=x.dtype).reshape(5, 2)
    q, k = functional.rotary_embedding(x, x[:, :1], angles.cos(), angles.sin())
    return (q * k).exp().sum()


def convolution(weight: Tensor) -> Tensor:
    x = torch.linspace(-1, 1, 24, dtype=weight.dtype).reshape(2, 2, 6)
    return functional.conv1d(x, weight, activation="gelu").square().sum()


def cell(w_ih: Tensor) -> Tensor:
    x, h, c = (torch.linspace(-1, 1, 2 * n, dtype=w_ih.dtype).reshape(2, n) for n in (3, 4, 4))
    w_hh = torch.linspace(-1, 1, 64, dtype=w_ih.dtype).reshape(16, 4)
    return functional.lstm_cell(x, (h, c), w_ih, w_hh)[0].square().sum()


LSTM = fused.LSTM(3, 4, bidirectional=True, dtype=torch.float64)


def layers(x: Tensor) -> Tensor:
    return LSTM(x)[0].square().sum()


LOSSES = [
    (attention, (1, 2, 5, 4)),
    (rotary, (1, 2, 5, 4)),
    (convolution, (3, 2, 3)),
    (cell, (16, 3)),
    (layers, (5, 2, 3)),
]
TRANSFORMS: dict[str, Callable[[Loss], Callable[[Tensor], Tensor]]] = {
    "grad": torch.func.grad,
    "jvp": lambda loss: lambda x: torch.func.jvp(loss, (x,), (x,))[1],
    "per sample": lambda loss: torch.func.vmap(torch.func.grad(loss)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("loss, shape", LOSSES, ids=[loss.__name__ for loss, _ in LOSSES])
def test_transforms(loss: Loss, shape: tuple[int, ...], name: str) -> None:
    x = torch.randn(3 if name == "per sample" else 1, *shape, dtype=torch.float64)
    x = x if name == "per sample" else x[0]
    function = TRANSFORMS[name](loss)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    if name == "grad":
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(compiled(x), torch.autograd.grad(loss(leaf), leaf)[0])


def test_without_a_transform_the_graph_holds_the_kernel() -> None:
    """The answer is not remembered from a graph that was traced under a transform."""
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    torch.compiler.reset()
    torch.compile(torch.func.grad(attention), fullgraph=True, backend="aot_eager")(x)
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> nn.Module:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(attention, fullgraph=True, backend=backend)(x)
    assert "fused.attention_forward" in targets
