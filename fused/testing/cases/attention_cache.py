"""Cases of attention over a cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheCase:
    """Shapes and options of one call; `make` draws its tensors."""

    name: str
    lengths: tuple[int, ...] = (3, 0, 40)  # what is in the cache
    capacity: int = 70
    new: int | None = 1  # keys to write
    rows: int = 1
    heads: int = 2
    heads_kv: int = 2
    head_dim: int = 8
    head_dim_v: int = 8
    page_size: int | None = None
    mask: str | None = None
    odd_strides: bool = False
    extras: tuple[tuple[str, Any], ...] = ()

    def make(self, dtype: torch.dtype, device: torch.device | str) -> tuple[list, dict[str, Any]]:
        """(q, k_cache, v_cache), keyword arguments. What no sequence has in the cache is NaN."""
        generator = torch.Generator().manual_seed(0)
        batch = len(self.lengths)

        def draw(*shape: int) -> Tensor:
            margin = 3 if self.odd_strides else 0
            x = torch.randn(*shape[:-1], shape[-1] + margin, generator=generator)
            return x.to(device, dtype)[..., : shape[-1]]

        options: dict[str, Any] = dict(self.extras)
        options["cache_seqlens"] = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        pages, size = batch, self.capacity
        if self.page_size is not None:
            size, of_sequence = self.page_size, -(-self.capacity // self.page_size)
            pages = batch * of_sequence + 3
            order = torch.randperm(pages, generator=generator)[: batch * of_sequence]
            options["block_table"] = order.view(batch, -1).to(device, torch.int32)
        caches = [
            draw(pages, self.heads_kv, size, width) for width in (self.head_dim, self.head_dim_v)
        ]
        for b, length in enumerate(self.lengths):
            for j in range(length, of_sequence * size if self.page_size else size):
                place = (
                    (int(options["block_table"][b, j // size]), j % size)
                    if self.page_size
                    else (b, j)
                )
                for cache in caches:
                    cache[place[0], :, place[1]] = torch.nan
        if self.new is not None:
            options["k"] = draw(batch, self.heads_kv, self.new, self.head_dim)
            options["v"] = draw(batch, self.heads_kv, self.new, self.head_dim_v)
        if self.mask == "bool":
            shape = (batch, 1, self.rows, self.capacity)
            options["attn_mask"] = torch.rand(shape, generator=generator).to(device) > 0.3
        elif self.mask == "additive":
            options["attn_mask"] = draw(self.heads, self.rows, self.capacity)
        for name in ("alibi_slopes", "sink"):
            if name in options:
                options[name] = torch.rand(self.heads, generator=generator).to(device, dtype)
        return [draw(batch, self.heads, self.rows, self.head_dim), *caches], options


EVERYTHING = (
    ("window", (30, -1)), ("softcap", 2.0), ("alibi_slopes", True), ("sink", True),
    ("return_lse", True), ("scale", 0.4),
)  # fmt: skip

CASES = [
    CacheCase("one token"),
    CacheCase("one", lengths=(0,), capacity=1, heads=1, heads_kv=1, head_dim=1, head_dim_v=1),
    CacheCase("several tokens", new=5, rows=5),
    CacheCase("nothing new", new=None, lengths=(3, 0, 70)),
    CacheCase("fewer queries than keys", new=9, rows=2),
    CacheCase("no new key", new=0, rows=2),
    CacheCase("full", lengths=(66, 5), new=4, rows=4),
    CacheCase("chunk beyond tiles", lengths=(30, 2), capacity=140, new=70, rows=70),
    CacheCase("grouped", heads=4, heads_kv=2, head_dim_v=70),
    CacheCase("not causal", new=5, rows=5, extras=(("is_causal", False),)),
    CacheCase("odd strides", odd_strides=True, new=2, rows=2),
    CacheCase("bool", mask="bool", new=2, rows=2),
    CacheCase("additive", mask="additive", new=2, rows=2),
    CacheCase("pages of 1", page_size=1, lengths=(3, 0), capacity=5),
    CacheCase("pages of 16", page_size=16, new=3, rows=3),
    CacheCase("pages of 7, odd strides", page_size=7, odd_strides=True, head_dim=5, head_dim_v=3),
    CacheCase("pages beyond tiles", page_size=48, lengths=(90, 2), capacity=144, new=40, rows=40),
    CacheCase("several chunks", lengths=(300, 10), capacity=320, heads=1, heads_kv=1),
    CacheCase(
        "pages, several chunks", lengths=(300, 10), capacity=320, page_size=16, heads=1, heads_kv=1
    ),
    CacheCase("everything", heads=4, new=3, rows=3, mask="bool", extras=EVERYTHING),
    CacheCase(
        "everything in pages", heads=4, new=3, rows=3, page_size=16, mask="additive",
        extras=EVERYTHING,
    ),
    CacheCase("no sequences", lengths=(), page_size=None),
    CacheCase("no queries", rows=0, new=2),
]  # fmt: skip
