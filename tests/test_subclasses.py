"""Tensors whose class knows of PyTorch's operators alone: DTensors, and one of our own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.utils._pytree import tree_map

import fused
from fused import functional as F

REASON = "a tensor is of a subclass that may not know of fused's ops"


class Labelled(Tensor):
    """Hands PyTorch's operators on to the tensor inside, and knows of nobody else's."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Labelled:
        # PyTorch's own way to a wrapper; its type stubs leave it out.
        wrapper: Labelled = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device,
            requires_grad=inner.requires_grad,
        )  # fmt: skip
        wrapper.inner = inner.detach()
        return wrapper

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # for explain, which makes fakes
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, *sizes: Any) -> Labelled:
        return Labelled(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused":
            raise NotImplementedError(f"{func} of a Labelled")
        inner = tree_map(lambda x: x.inner if isinstance(x, Labelled) else x, (args, kwargs or {}))
        out = func(*inner[0], **inner[1])
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, out)


def cell(input: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
    return torch.cat(F.lstm_cell(input, (h, c), *weights))


def output(module: nn.Module, input: Tensor) -> Tensor:
    result: Tensor = module(input)[0]
    return result


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat(F.rotary_embedding(query, key, cos, sin), dim=1)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "conv1d": (F.conv1d, [(4, 3, 7), (4, 3, 3), (4,)]),
    "conv2d": (F.conv2d, [(4, 3, 7, 5), (4, 3, 3, 3), (4,)]),
    "conv3d": (F.conv3d, [(4, 3, 5, 4, 6), (4, 3, 3, 2, 3), (4,)]),
    "lstm_cell": (cell, [(4, 3), (4, 5), (4, 5), (20, 3), (20, 5), (20,), (20,)]),
    "rotary": (rotary, [(4, 2, 3, 8), (4, 1, 3, 8), (3, 4), (3, 4)]),
    "attention": (F.scaled_dot_product_attention, [(4, 2, 3, 8)] * 3),
}


def results(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """What it returns, and the gradient of every input."""
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def leaves_of(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrapper_of_tensors(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    leaves = leaves_of(shapes)
    wrapped: list[Tensor] = [Labelled(leaf) for leaf in leaves]
    for actual, expected in zip(results(function, wrapped), results(function, leaves), strict=True):
        assert isinstance(actual, Labelled)
        torch.testing.assert_close(actual.inner, expected.detach())
    assert REASON in str(fused.explain(function, *wrapped))
    # One of them is enough: a weight that is stored in another way, say.
    mixed = [*leaves[:1], *wrapped[1:]]
    torch.testing.assert_close(function(*mixed).inner, function(*leaves).detach())


def test_a_class_without_rules_of_its_own_keeps_the_kernel() -> None:
    class Named(Tensor):
        pass

    function, shapes = FUNCTIONS["conv2d"]
    leaves = [leaf.detach().as_subclass(Named).requires_grad_() for leaf in leaves_of(shapes)]
    assert "conv2d: CPU kernel" in str(fused.explain(function, *leaves))
    expected = results(function, leaves_of(shapes))
    for actual, one in zip(results(function, leaves), expected, strict=True):
        assert torch.equal(actual.as_subclass(Tensor), one)


def check_sharded_batches() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for name, (function, shapes) in FUNCTIONS.items():
        leaves = leaves_of(shapes)
        # DTensor's own rules for a convolution are about images that are cut in width.
        has_batch = [shape[0] == 4 and len(shape) > 1 and "conv" not in name for shape in shapes]
        placed: list[Tensor] = [
            distribute_tensor(leaf.detach(), mesh, [Shard(0) if cut else Replicate()])
            .requires_grad_()
            for leaf, cut in zip(leaves, has_batch, strict=True)
        ]  # fmt: skip
        for actual, one in zip(results(function, placed), results(function, leaves), strict=True):
            assert isinstance(actual, DTensor), name
            torch.testing.assert_close(actual.full_tensor(), one.detach())

    modules: list[tuple[nn.Module, tuple[int, ...], int]] = [
        (fused.LSTM(3, 5, 2, batch_first=True, bidirectional=True), (4, 6, 3), 0),
        (fused.LSTM(3, 5, proj_size=2), (6, 4, 3), 1),
        (fused.LSTMCell(3, 5), (4, 3), 0),
    ]
    for module, shape, batch in modules:
        module.double()
        torch.manual_seed(4)  # the same weights on either rank
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        input = torch.randn(shape, dtype=torch.float64)
        expected = output(module, input)
        expected.square().sum().backward()
        twin = copy.deepcopy(module)
        twin.zero_grad()
        distribute_module(twin, mesh)
        out = output(twin, distribute_tensor(input, mesh, [Shard(batch)]))
        out.square().sum().backward()
        torch.testing.assert_close(out.full_tensor(), expected.detach())
        for ours, one in zip(twin.parameters(), module.parameters(), strict=True):
            assert isinstance(ours.grad, DTensor)
            torch.testing.assert_close(ours.grad.full_tensor(), one.grad)

    function, shapes = FUNCTIONS["lstm_cell"]
    placed = [distribute_tensor(leaf, mesh, [Replicate()]) for leaf in leaves_of(shapes)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*placed).full_tensor(), function(*placed).full_tensor())


def test_dtensors(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, check_sharded_batches)
