"""A model of every layer, exported and compiled ahead of time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fused


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = fused.Attention(16, 4, batch_first=True)
        self.conv = fused.Conv1d(16, 12, 3, padding="same", activation="relu")
        self.lstm = fused.LSTM(12, 8, batch_first=True)
        self.cell = fused.LSTMCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.attention(x, x, x, need_weights=False)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x, _ = self.lstm(x)
        return self.cell(x[:, -1])[0]


def test_a_package_compiled_ahead_of_time_runs_the_kernels(tmp_path: Path) -> None:
    model, x = Everything().eval(), torch.randn(2, 9, 16)
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,))
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        for op in ("attention", "conv", "lstm_layer", "lstm_cell"):
            assert f"fused.{op}_forward.default" in called
        path = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        compiled = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (fused.Conv1d(4, 6, 3), (2, 4, 9)),
        (fused.Conv2d(4, 6, 3), (2, 4, 9, 9)),
        (fused.LSTM(4, 5), (3, 2, 4)),
        (fused.LSTMCell(4, 5), (2, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_jit_trace_records_computes_the_same(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(module.eval(), torch.randn(shape))
        x = torch.randn(shape)
        actual, expected = traced(x), module(x)
    for one, other in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(one, other)
