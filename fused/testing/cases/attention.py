"""Cases of scaled dot-product attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionCase:
    """Shapes and options of one call; `make` draws its tensors."""

    name: str
    batch: int = 2
    heads: int = 2
    heads_kv: int | None = None
    rows: int = 5
    keys: int = 7
    head_dim: int = 8
    head_dim_v: int | None = None
    mask: str | None = None  # "bool", "additive" and the shape that broadcasts: "bool [S, T]"
    is_causal: bool = False
    scale: float | None = None
    layout: str = "contiguous"
    causal_alignment: str = "top_left"
    window: tuple[int, int] | None = None
    softcap: float | None = None
    alibi: bool = False
    sink: bool = False
    return_lse: bool = False
    # Queries and keys of each packed sequence, instead of batch, rows and keys.
    lengths: tuple[tuple[int, int], ...] = ()
    rest: int = 0  # rows behind the last sequence

    def make(
        self, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """(query, key, value), keyword arguments."""
        generator = torch.Generator().manual_seed(seed)
        heads_kv = self.heads if self.heads_kv is None else self.heads_kv
        head_dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v

        def draw(heads: int, length: int, width: int) -> Tensor:
            shape = (self.batch, heads, length, width)
            if self.lengths:
                margin = 1 if self.layout == "odd strides" else 0
                x = torch.randn(length + self.rest, heads, width + 3 * margin, generator=generator)
                return x.to(device, dtype)[..., margin : margin + width]
            if self.layout == "heads last":  # as an input projection leaves them
                x = torch.randn(self.batch, length, heads, width, generator=generator)
                return x.to(device, dtype).transpose(1, 2)
            if self.layout == "odd strides":  # rows of an odd pitch inside a larger tensor
                x = torch.randn(self.batch, heads, length, width + 3, generator=generator)
                return x.to(device, dtype)[..., 1 : width + 1]
            if self.layout == "last dimension strided":
                x = torch.randn(self.batch, heads, width, length, generator=generator)
                return x.to(device, dtype).transpose(2, 3)
            if self.layout == "expanded":
                x = torch.randn(1, 1, length, width, generator=generator)
                return x.to(device, dtype).expand(shape)
            return torch.randn(shape, generator=generator).to(device, dtype)

        rows, keys = map(sum, zip(*self.lengths)) if self.lengths else (self.rows, self.keys)
        tensors = [
            draw(self.heads, rows, self.head_dim),
            draw(heads_kv, keys, self.head_dim),
            draw(heads_kv, keys, head_dim_v),
        ]
        options: dict[str, Any] = {"is_causal": self.is_causal, "scale": self.scale}
        for name, lengths in zip(("cu_seqlens_q", "cu_seqlens_k"), zip(*self.lengths)):
            ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            options[name] = ends.to(device)
        if heads_kv != self.heads:
            options["enable_gqa"] = True
        for name in ("causal_alignment", "window", "softcap", "return_lse"):
            if getattr(self, name) != getattr(type(self), name):
                options[name] = getattr(self, name)
        if self.alibi:
            slopes = torch.rand(self.heads, generator=generator) / 4
            options["alibi_slopes"] = slopes.to(device, dtype)
        if self.sink:
            options["sink"] = torch.randn(self.heads, generator=generator).to(device, dtype)
        if self.mask is not None:
            options["attn_mask"] = self._make_mask(dtype, device, generator)
        return tensors, options

    def _make_mask(
        self, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
    ) -> Tensor:
        assert self.mask is not None
        kind, _, shape_text = self.mask.partition(" ")
        batch, rows, keys = self.batch, self.rows, self.keys
        if self.lengths:
            batch, (rows, keys) = len(self.lengths), map(max, zip(*self.lengths))
        letters = {"B": batch, "H": self.heads, "S": rows, "T": keys, "1": 1}
        shape = [letters[letter] for letter in shape_text.strip("[]").split(", ")]
        noise = torch.randn(shape, generator=generator).to(device)
        if kind == "bool":
            return noise > -0.3
        if kind == "blind":  # some rows see no key at all
            mask = noise > -0.3
            mask[..., ::2, :] = False
            return mask
        if kind == "documents":  # three side by side, each of which sees itself alone
            row, key = (3 * torch.arange(n, device=device) // n for n in shape[-2:])
            return (row[:, None] == key).expand(shape)
        if kind == "float32":
            return noise
        if kind in ("-1e9", "lowest"):  # the first keys, more than a tile of them, by a number
            padding = torch.arange(shape[-1], device=device).expand(shape) < shape[-1] * 2 // 3
            if kind == "lowest":
                return torch.zeros_like(noise, dtype=dtype).masked_fill(
                    padding, torch.finfo(dtype).min
                )
            return torch.zeros_like(noise).masked_fill(padding, -1e9)
        if kind == "-inf":
            return torch.where(noise > -0.3, 0.0, -torch.inf).to(dtype)
        return noise.to(dtype)


LAST = "bottom_right"

CASES = [
    AttentionCase("plain"),
    AttentionCase("one", batch=1, heads=1, rows=1, keys=1, head_dim=1),
    AttentionCase("one row", rows=1, keys=70),
    AttentionCase("one key", rows=70, keys=1),
    AttentionCase("tiles", batch=1, rows=64, keys=64, head_dim=64),
    AttentionCase("beyond tiles", batch=1, heads=1, rows=131, keys=99, head_dim=33),
    AttentionCase("causal", rows=9, keys=9, is_causal=True),
    AttentionCase("causal beyond tiles", batch=1, rows=133, keys=133, is_causal=True),
    AttentionCase("causal wide", rows=5, keys=70, is_causal=True),
    AttentionCase("causal tall", rows=70, keys=5, is_causal=True),
    AttentionCase("grouped heads", heads=6, heads_kv=2),
    AttentionCase("one key head", heads=4, heads_kv=1, is_causal=True, rows=40, keys=40),
    AttentionCase("narrow values", head_dim=24, head_dim_v=5),
    AttentionCase("wide values", head_dim=5, head_dim_v=130),
    AttentionCase("head_dim 80", batch=1, head_dim=80, rows=34, keys=35),
    AttentionCase("head_dim 14", head_dim=14),
    AttentionCase("head_dim 257", batch=1, heads=1, head_dim=257),
    AttentionCase("head_dim 512", batch=1, heads=1, head_dim=512, rows=3, keys=34),
    AttentionCase("scale", scale=0.3),
    AttentionCase("scale 0", scale=0.0),
    AttentionCase("scale below 0", scale=-0.3, rows=34, keys=35),
    AttentionCase("bool [S, T]", mask="bool [S, T]"),
    AttentionCase("bool [B, 1, 1, T]", mask="bool [B, 1, 1, T]"),
    AttentionCase("bool [B, H, S, T]", mask="bool [B, H, S, T]", rows=66, keys=40),
    AttentionCase("bool [H, 1, T]", mask="bool [H, 1, T]"),
    AttentionCase("bool [1, 1, S, 1]", mask="bool [1, 1, S, 1]"),
    AttentionCase("blind [B, 1, S, T]", mask="blind [B, 1, S, T]"),
    AttentionCase("blind [S, T] beyond tiles", mask="blind [S, T]", rows=67, keys=67),
    AttentionCase("documents [S, T]", mask="documents [S, T]", batch=1, rows=200, keys=200),
    AttentionCase("documents [1, T]", mask="documents [1, T]", batch=1, rows=70, keys=300),
    AttentionCase("additive [S, T]", mask="additive [S, T]"),
    AttentionCase("additive [B, H, S, T]", mask="additive [B, H, S, T]", heads=4, heads_kv=2),
    AttentionCase("additive [T]", mask="additive [T]"),
    AttentionCase("additive [1, H, 1, T]", mask="additive [1, H, 1, T]", rows=33, keys=65),
    AttentionCase("float32 [S, T]", mask="float32 [S, T]"),
    AttentionCase("-inf [B, 1, S, T]", mask="-inf [B, 1, S, T]"),
    AttentionCase("-1e9 [B, 1, 1, T]", mask="-1e9 [B, 1, 1, T]", batch=1, keys=140),
    AttentionCase("lowest [B, 1, 1, T]", mask="lowest [B, 1, 1, T]", batch=1, keys=140),
    AttentionCase("heads last", layout="heads last", rows=34, keys=34, is_causal=True),
    AttentionCase("odd strides", layout="odd strides"),
    AttentionCase("last dimension strided", layout="last dimension strided"),
    AttentionCase("expanded", layout="expanded"),
    AttentionCase("bottom right", rows=5, keys=70, is_causal=True, causal_alignment=LAST),
    AttentionCase("bottom right tall", rows=70, keys=5, is_causal=True, causal_alignment=LAST),
    AttentionCase("bottom right, tiles", rows=133, keys=200, is_causal=True, causal_alignment=LAST),
    AttentionCase("window", batch=1, rows=140, keys=140, window=(5, 3)),
    AttentionCase("window of tiles", batch=1, heads=1, rows=200, keys=200, window=(64, 32)),
    AttentionCase("window to the left", rows=35, keys=67, window=(7, -1)),
    AttentionCase("window to the right", rows=67, keys=35, window=(-1, 2)),
    AttentionCase("window of one, sink", rows=66, keys=66, window=(0, 0), sink=True),
    AttentionCase("window beyond all", window=(2**40, 2**40)),
    AttentionCase("window beside the keys", rows=70, keys=5, window=(3, 1)),
    AttentionCase("window, causal", rows=40, keys=33, window=(9, 4), is_causal=True),
    AttentionCase("softcap", softcap=0.7),
    AttentionCase("softcap, tiles", batch=1, rows=67, keys=99, softcap=2.0, is_causal=True),
    AttentionCase("alibi", alibi=True),
    AttentionCase("alibi, tiles", batch=1, heads=3, rows=99, keys=67, alibi=True),
    AttentionCase("sink", sink=True),
    AttentionCase("sink, tiles", batch=3, heads=4, heads_kv=2, rows=99, keys=35, sink=True),
    AttentionCase(
        "sink, blind [S, T]", 2, 2, None, 67, 35, mask="blind [S, T]", sink=True, return_lse=True
    ),
    AttentionCase("lse", return_lse=True, rows=67, keys=35),
    AttentionCase("causal, bool [S, T]", mask="bool [S, T]", rows=40, keys=40, is_causal=True),
    AttentionCase("causal, additive [B, H, S, T]", mask="additive [B, H, S, T]", is_causal=True),
    AttentionCase(
        "additive [1, 1, S, 1], sink", mask="additive [1, 1, S, 1]", rows=67, keys=35, sink=True
    ),
    AttentionCase(
        "additive [1, 1, 1, 1], sink", mask="additive [1, 1, 1, 1]", rows=67, keys=35, sink=True
    ),
    AttentionCase("additive [B, 1, S, T]", mask="additive [B, 1, S, T]", rows=67, keys=35),
    AttentionCase(
        "additive [S, T], window", mask="additive [S, T]", rows=99, keys=99, window=(4, 2)
    ),
    AttentionCase(
        "everything",
        batch=3,
        heads=4,
        heads_kv=2,
        rows=70,
        keys=99,
        head_dim=12,
        head_dim_v=20,
        mask="additive [B, 1, S, T]",
        is_causal=True,
        window=(40, 9),
        causal_alignment=LAST,
        softcap=1.5,
        alibi=True,
        sink=True,
        return_lse=True,
    ),
    AttentionCase(
        "everything, bool",
        heads=3,
        rows=67,
        keys=50,
        head_dim=6,
        mask="blind [H, S, T]",
        is_causal=True,
        window=(20, 20),
        softcap=3.0,
        alibi=True,
        sink=True,
        scale=0.7,
    ),
    AttentionCase("no batch", batch=0),
    AttentionCase("no rows", rows=0),
    AttentionCase("no keys", keys=0),
    AttentionCase("no keys, sink", keys=0, sink=True, alibi=True, mask="additive [S, 1]"),
]

RAGGED = ((5, 7), (0, 3), (66, 35), (1, 1), (4, 0), (33, 99))

VARLEN_CASES = [
    AttentionCase("packed", lengths=((5, 7), (3, 9))),
    AttentionCase("packed one", heads=1, lengths=((1, 1),), head_dim=1),
    AttentionCase("ragged", lengths=RAGGED),
    AttentionCase("ragged, rest", lengths=RAGGED, rest=35, return_lse=True),
    AttentionCase("ragged, odd strides", lengths=RAGGED, layout="odd strides"),
    AttentionCase("packed wide values", lengths=((5, 7), (3, 40)), head_dim_v=70),
    AttentionCase("many short", lengths=((2, 3),) * 35, heads=1),
    AttentionCase("ends on tiles", heads=1, lengths=((64, 32), (96, 64), (32, 96))),
    AttentionCase("packed causal", lengths=RAGGED, is_causal=True),
    AttentionCase("packed bottom right", lengths=RAGGED, is_causal=True, causal_alignment=LAST),
    AttentionCase("packed window", lengths=RAGGED, window=(9, 4)),
    AttentionCase("packed groups", heads=4, heads_kv=2, lengths=RAGGED),
    AttentionCase("packed sink", lengths=RAGGED, sink=True, rest=3),
    AttentionCase("packed alibi", lengths=RAGGED, alibi=True, return_lse=True),
    AttentionCase("packed bool [B, 1, S, T]", lengths=RAGGED, mask="bool [B, 1, S, T]"),
    AttentionCase("packed bool [B, 1, 1, T]", lengths=RAGGED, mask="bool [B, 1, 1, T]"),
    AttentionCase("packed additive [H, S, T]", lengths=RAGGED, mask="additive [H, S, T]"),
    # Only by the log-sum-exp does the same bias for all of a row's keys have a gradient.
    AttentionCase(
        "packed additive [B, H, S, 1]",
        lengths=RAGGED,
        mask="additive [B, H, S, 1]",
        return_lse=True,
    ),
    AttentionCase(
        "packed everything",
        heads=2,
        heads_kv=1,
        lengths=RAGGED,
        rest=5,
        head_dim=12,
        head_dim_v=20,
        mask="additive [B, 1, S, T]",
        is_causal=True,
        window=(40, 9),
        causal_alignment=LAST,
        softcap=1.5,
        alibi=True,
        sink=True,
        return_lse=True,
    ),
]
