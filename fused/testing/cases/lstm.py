"""Cases of the LSTM cell and of one LSTM layer in one direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Draw:
    """Draws tensors from one generator; weights on the scale of a layer's initialisation."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype, self._device = dtype, device

    def state(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, self._dtype)

    def strided(self, *shape: int) -> Tensor:
        """Rows of an odd pitch inside a larger tensor."""
        return self.state(*shape[:-1], shape[-1] + 3)[..., 1 : shape[-1] + 1]

    def weight(self, *shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=self._generator) * 2 - 1
        return (drawn * shape[-1] ** -0.5).to(self._device, self._dtype)


@dataclass(frozen=True)
class LSTMCellCase:
    """Shapes and options of one call of lstm_cell; `make` draws its tensors."""

    name: str
    batch: int = 3
    input_size: int = 4
    hidden_size: int = 8
    bias: str = "ih hh"
    layout: str = "contiguous"

    def make(
        self, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> list[Tensor | None]:
        """[input, h, c, w_ih, w_hh, b_ih, b_hh]."""
        draw = _Draw(dtype, device, seed)
        gates = 4 * self.hidden_size
        state = draw.strided if self.layout == "strided" else draw.state
        tensors: list[Tensor | None] = [
            state(self.batch, self.input_size),
            state(self.batch, self.hidden_size),
            state(self.batch, self.hidden_size),
        ]
        if self.layout == "strided":
            tensors += [draw.weight(n, gates).t() for n in (self.input_size, self.hidden_size)]
        else:
            tensors += [draw.weight(gates, n) for n in (self.input_size, self.hidden_size)]
        tensors += [draw.weight(gates) if b in self.bias else None for b in ("ih", "hh")]
        return tensors


@dataclass(frozen=True)
class LSTMCase:
    """Shapes and options of one layer in one direction; `make` draws its tensors."""

    name: str
    steps: int = 5
    batch: int = 3
    input_size: int = 4
    hidden_size: int = 8
    proj_size: int = 0
    bias: bool = True
    lengths: tuple[int, ...] = ()  # of a packed batch, falling
    reverse: bool = False
    layout: str = "contiguous"

    def make(
        self, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> tuple[list[Tensor | None], dict[str, Any]]:
        """[input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr], options."""
        draw = _Draw(dtype, device, seed)
        batch = len(self.lengths) or self.batch
        batch_sizes = None
        if self.lengths:
            sizes = [sum(length > t for length in self.lengths) for t in range(self.lengths[0])]
            batch_sizes = torch.tensor(sizes)
            input = draw.state(sum(self.lengths), self.input_size)
        elif self.layout == "batch first":
            input = draw.state(batch, self.steps, self.input_size).transpose(0, 1)
        elif self.layout == "strided":
            input = draw.strided(self.steps, batch, self.input_size)
        else:
            input = draw.state(self.steps, batch, self.input_size)
        gates, state_size = 4 * self.hidden_size, self.proj_size or self.hidden_size
        state = draw.strided if self.layout == "strided" else draw.state
        tensors: list[Tensor | None] = [
            input,
            state(batch, state_size),
            state(batch, self.hidden_size),
            draw.weight(gates, self.input_size),
            draw.weight(gates, state_size),
            draw.weight(gates) if self.bias else None,
            draw.weight(gates) if self.bias else None,
            draw.weight(self.proj_size, self.hidden_size) if self.proj_size else None,
        ]
        return tensors, {"batch_sizes": batch_sizes, "reverse": self.reverse}


CELL_CASES = [
    LSTMCellCase("plain"),
    LSTMCellCase("one", batch=1, input_size=1, hidden_size=1),
    LSTMCellCase("one row", batch=1, input_size=33, hidden_size=40),
    LSTMCellCase("odd hidden size", input_size=5, hidden_size=7),
    LSTMCellCase("hidden size of half packs", hidden_size=6),
    LSTMCellCase("many threads", batch=70, input_size=17, hidden_size=68),
    LSTMCellCase("wide", batch=2, input_size=3, hidden_size=260),
    LSTMCellCase("no bias", bias=""),
    LSTMCellCase("input bias alone", bias="ih"),
    LSTMCellCase("hidden bias alone", bias="hh"),
    LSTMCellCase("strided", layout="strided", input_size=5, hidden_size=12),
    LSTMCellCase("no rows", batch=0),
]

CASES = [
    LSTMCase("plain"),
    LSTMCase("one", steps=1, batch=1, input_size=1, hidden_size=1),
    LSTMCase("one step", steps=1),
    LSTMCase("one row", batch=1, steps=9, input_size=20, hidden_size=33),
    LSTMCase("odd sizes", input_size=3, hidden_size=7),
    LSTMCase("many threads", steps=4, batch=35, input_size=9, hidden_size=68),
    LSTMCase("many rows", steps=10, batch=33, input_size=70, hidden_size=67),
    LSTMCase("many rows of a projection", steps=9, batch=34, hidden_size=50, proj_size=49),
    LSTMCase("many rows, an odd number", steps=9, batch=29, input_size=5, hidden_size=6),
    LSTMCase("many rows, wide", steps=4, batch=9, hidden_size=131),
    LSTMCase("wide", steps=3, batch=2, hidden_size=260),
    LSTMCase("long", steps=60, batch=2, hidden_size=5),
    LSTMCase("no bias", bias=False),
    LSTMCase("reverse", reverse=True),
    LSTMCase("reverse odd sizes", reverse=True, input_size=3, hidden_size=7),
    LSTMCase("projection", proj_size=3),
    LSTMCase("projection of one", proj_size=1, hidden_size=5, bias=False),
    LSTMCase("projection reverse", proj_size=3, reverse=True),
    LSTMCase("packed", lengths=(6, 4, 4, 1)),
    LSTMCase("packed reverse", lengths=(6, 4, 4, 1), reverse=True),
    LSTMCase("packed equal", lengths=(4, 4, 4), reverse=True, hidden_size=5),
    LSTMCase("packed one", lengths=(5,)),
    LSTMCase("packed projection", lengths=(5, 3, 2), proj_size=3),
    LSTMCase("packed projection reverse", lengths=(5, 3, 2), proj_size=3, reverse=True),
    LSTMCase("packed many", lengths=tuple(range(40, 0, -1)), reverse=True, hidden_size=12),
    LSTMCase("packed in whole stripes", lengths=(9, 9, 7, 7, 5, 2, 2, 1, 1, 1, 1), hidden_size=64),
    LSTMCase("batch first", layout="batch first"),
    LSTMCase("strided", layout="strided", input_size=5, hidden_size=12),
    LSTMCase("no rows", batch=0),
]
