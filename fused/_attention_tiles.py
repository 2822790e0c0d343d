"""Attention's scores cut into tiles: some rows of queries, over the keys in their sight."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from fused._attention_composite import Options, Place, Range, completed, mask_window, sequences

TILE = 2**18  # scores; more only where one row of all heads that share a key has more


class Problem(NamedTuple):
    """[B, G, H / G, S, T], or one packed sequence, which begins at these rows of q and k."""

    batch: int
    groups: int
    ratio: int
    rows: int
    keys: int
    begin: tuple[int, int] = (0, 0)
    sequence: int = 0

    def cuts(self) -> tuple[list[Range], list[Range], list[Range]]:
        """The ranges of batch, groups and rows whose product is the tiles.

        Cut along the batch first, then along the heads, and along the rows only then.
        """
        of_row = max(self.keys * self.ratio, 1)
        of_group = of_row * max(self.rows, 1)
        return (
            _ranges(self.batch, TILE // (of_group * max(self.groups, 1))),
            _ranges(self.groups, TILE // of_group),
            _ranges(self.rows, TILE // of_row),
        )


def _ranges(extent: int, size: int) -> list[Range]:
    size = max(size, 1)
    return [(i, min(i + size, extent)) for i in range(0, max(extent, 1), size)]


class Tile(NamedTuple):
    """Ranges of a problem, with all query heads of `groups`."""

    problem: Problem
    batch: Range
    groups: Range
    rows: Range
    keys: Range

    @property
    def place(self) -> Place:
        batch, heads, rows, keys = self._scores
        of = self.problem
        return Place(
            batch[0], heads[0], rows[0], keys[0],
            heads=of.groups * of.ratio, shift=of.keys - of.rows,
        )  # fmt: skip

    @property
    def _scores(self) -> tuple[Range, ...]:
        """Ranges of [B, H, S, T], where B counts the packed sequences."""
        return _moved(self.batch, self.problem.sequence), self._heads, self.rows, self.keys

    @property
    def _heads(self) -> Range:
        return self.groups[0] * self.problem.ratio, self.groups[1] * self.problem.ratio

    def of_queries(self, tensor: Tensor) -> Tensor:
        """The tile's view of [B, H, S, ...]."""
        return _view(tensor, self.batch, self._heads, _moved(self.rows, self.problem.begin[0]))

    def of_keys(self, tensor: Tensor) -> Tensor:
        """The tile's view of [B, G, T, ...]."""
        return _view(tensor, self.batch, self.groups, _moved(self.keys, self.problem.begin[1]))

    def of_inputs(self, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tile's views of q, k, v, mask, slopes and sink, any of which may be None."""
        views = (self.of_queries, self.of_keys, self.of_keys, self._of_mask)
        return [
            None if x is None else view(x)
            for x, view in zip(inputs, (*views, self._of_heads, self._of_heads), strict=True)
        ]

    def _of_mask(self, mask: Tensor) -> Tensor:
        return mask_window(mask, self._scores)

    def _of_heads(self, tensor: Tensor) -> Tensor:
        return _view(tensor, self._heads)

    def completed(self, window: Tensor, shape: Sequence[int]) -> Tensor:
        """Its view of a mask of that shape, with what that is short of."""
        return completed(window, shape, self._scores)


def _view(tensor: Tensor, *ranges: Range) -> Tensor:
    return tensor[tuple(slice(*r) for r in ranges)]


def _moved(extent: Range, by: int) -> Range:
    return extent[0] + by, extent[1] + by


def problems(q: Tensor, k: Tensor, options: Options) -> list[Problem]:
    """The one of q [B, H, S, D], or those of the packed sequences in [1, H, S, D]."""
    (batch, heads, rows), (groups, keys) = q.shape[:3], k.shape[1:3]
    ratio = heads // max(groups, 1)
    if options.cu_seqlens_q is None:
        return [Problem(batch, groups, ratio, rows, keys)]
    return [
        Problem(1, groups, ratio, q1 - q0, k1 - k0, (q0, k0), index)
        for index, ((q0, q1), (k0, k1)) in enumerate(sequences(options))
    ]


def cut(problem: Problem, options: Options, batch: Range, groups: Range, rows: Range) -> Tile:
    """The tile of these ranges, less keys that causality and the window hide from all its rows."""
    shift = problem.keys - problem.rows
    first, last = 0, problem.keys
    if options.is_causal:
        last = min(last, rows[1])
    if options.window_right >= 0:
        last = min(last, rows[1] + shift + options.window_right)
    if options.window_left >= 0:
        first = max(first, rows[0] + shift - options.window_left)
    last = max(last, 0)
    return Tile(problem, batch, groups, rows, (min(first, last), last))


def tiles(problem: Problem, options: Options) -> Iterator[Tile]:
    for ranges in itertools.product(*problem.cuts()):
        yield cut(problem, options, *ranges)


def unpacked(tensor: Tensor) -> Tensor:
    """Packed [S, H, D] as [1, H, S, D], and [H, S] as [1, H, S]."""
    return (tensor.transpose(0, 1) if tensor.dim() == 3 else tensor).unsqueeze(0)


def packed(tensor: Tensor) -> Tensor:
    """The inverse of `unpacked`."""
    return tensor[0].transpose(0, 1) if tensor.dim() == 4 else tensor[0]
