"""A model of every layer, exported and compiled ahead of time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

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
