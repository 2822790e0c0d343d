"""Numbers and tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """``12.3 ms``: three digits and the unit that fits."""
    for limit, factor, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{three_digits(seconds * factor)} {unit}"
    return f"{three_digits(seconds)} s"


def three_digits(value: float) -> str:
    """At least three significant digits, without an exponent."""
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def count(value: float) -> str:
    """``12,300``: rounded to three digits."""
    if value < 1000:
        return three_digits(value)
    unit = 10 ** (len(str(int(value))) - 3)
    return f"{round(value / unit) * unit:,}"


def ratio(value: float) -> str:
    """How many times faster, so that 1 is a tie: ``1.25x``."""
    return f"{value:.2f}x"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 2) -> str:
    """A plain table: the first ``left`` columns are aligned left, the others right."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(headers), rule, *(line(row) for row in rows)])
