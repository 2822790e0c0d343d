"""Cases of rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryCase:
    """Shapes and options of one call; `make` draws its tensors."""

    name: str
    batch: int = 2
    heads: int = 2
    heads_kv: int = 1
    length: int = 5
    head_dim: int = 8
    pairs: int | None = None  # half of head_dim
    interleaved: bool = False
    layout: str = "projection"
    table: str = "shared"  # "per sequence", "strided"
    table_dtype: torch.dtype | None = None  # that of query and key

    def make(
        self, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> tuple[list[Tensor], dict[str, bool]]:
        """(query, key, cos, sin), keyword arguments. The table need not lie on the unit circle."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        batch, length, width = self.batch, self.length, self.head_dim
        both = self.heads + self.heads_kv
        if self.layout == "projection":  # beside them what would be the values
            x = draw(batch, length, both + self.heads_kv, width).transpose(1, 2)
        elif self.layout == "length first":
            x = draw(length, batch, both, width).permute(1, 2, 0, 3)
        elif self.layout == "odd strides":  # rows of an odd pitch inside a larger tensor
            x = draw(batch, both, length, width + 3)[..., 1 : width + 1]
        elif self.layout == "last dimension strided":
            x = draw(batch, both, width, length).transpose(2, 3)
        else:
            assert self.layout == "expanded"
            x = draw(1, 1, length, width).to(dtype).expand(batch, both, length, width)
        q, k = x.to(dtype)[:, : self.heads], x.to(dtype)[:, self.heads : both]

        pairs = width // 2 if self.pairs is None else self.pairs
        tables = []
        for _ in range(2):
            if self.table == "strided":
                table = draw(pairs, length).t()
            else:
                table = draw(*(batch,) * (self.table == "per sequence"), length, pairs)
            tables.append(table.to(self.table_dtype or dtype))
        return [q, k, *tables], {"interleaved": self.interleaved}


def _both_ways(name: str, **options: Any) -> list[RotaryCase]:
    return [
        RotaryCase(f"{name}, halves", **options),
        RotaryCase(f"{name}, interleaved", interleaved=True, **options),
    ]


CASES = [
    *_both_ways("plain"),
    *_both_ways("one", batch=1, heads=1, length=1, head_dim=2),
    *_both_ways("packs", heads=3, length=3, head_dim=64),
    *_both_ways("packs, table in float32", head_dim=32, table_dtype=torch.float32),
    *_both_ways("part, in packs", head_dim=56, pairs=16),
    *_both_ways("part of an odd head_dim", head_dim=7, pairs=2),
    *_both_ways("odd strides", layout="odd strides", head_dim=16, pairs=5),
    *_both_ways("many heads", batch=1, heads=21, length=2, head_dim=26, pairs=12),
    RotaryCase("many rows", heads=1, length=70, head_dim=4),
    RotaryCase("many heads in packs", heads=33, heads_kv=11, length=1, head_dim=64),
    RotaryCase("nothing turns", head_dim=1),
    RotaryCase("nothing turns, in packs", head_dim=8, pairs=0),
    RotaryCase("table for each sequence", table="per sequence", head_dim=32),
    RotaryCase("table for each sequence, one by one", table="per sequence", pairs=3),
    RotaryCase("strided table", table="strided"),
    RotaryCase("table in float32", table_dtype=torch.float32, head_dim=10),
    RotaryCase("table in float64", table_dtype=torch.float64),
    RotaryCase("length first", layout="length first", head_dim=32),
    RotaryCase("last dimension strided", layout="last dimension strided"),
    RotaryCase("expanded", layout="expanded", head_dim=32),
    RotaryCase("no sequences", batch=0),
    RotaryCase("no rows", length=0),
    RotaryCase("no key heads", heads_kv=0),
]
