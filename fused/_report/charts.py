"""Charts as pictures inside a page, an SVG as a data URI, or as one by itself."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

INK, MUTED, GRID = "#1c2733", "#66727f", "#e3e8ee"
STOCK, FUSED, SLOWER, ACCENT = "#f0a35c", "#1f5fa8", "#b9485a", "#7a8794"
_RATIO_TICKS = (1 / 16, 1 / 8, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)


def loss_chart(
    curves: dict[str, Sequence[float]],
    lines: dict[str, float],
    y_label: str = "training loss, nats",
) -> str:
    """Loss over steps, smoothed, with the raw values behind; ``lines`` are levels to compare with.

    The first curve is drawn wide and light, the next thin and dark: where they agree, both show.
    """
    figure, axes = _figure(7.2, 3.6)
    styles = {"stock": (STOCK, 4.5), "fused": (FUSED, 1.5)}
    for name, values in curves.items():
        color, width = styles[name]
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.25)
        axes.plot(steps, _smoothed(values), color=color, linewidth=width, label=name)
    for (name, level), style in zip(lines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(level, color=ACCENT, linestyle=style, linewidth=1.2, label=name)
    finite = [v for values in curves.values() for v in values if math.isfinite(v)]
    if finite:
        axes.set_ylim(bottom=0.0, top=1.05 * max(finite))
    axes.set_xlim(1, max(2, *map(len, curves.values())))
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    axes.legend(frameon=False, labelcolor=INK)
    return _data_uri(figure)


def difference_chart(differences: Sequence[float]) -> str:
    """The distance between two curves over steps, on a logarithmic scale."""
    figure, axes = _figure(7.2, 2.4)
    steps = [step for step, value in enumerate(differences, 1) if 0 < value < math.inf]
    if steps:
        axes.semilogy(steps, [differences[s - 1] for s in steps], color=FUSED, linewidth=0.8)
    else:
        axes.text(0.5, 0.5, "no difference at any step", ha="center", transform=axes.transAxes)
    axes.set_xlim(1, max(2, len(differences)))
    axes.set_xlabel("step")
    axes.set_ylabel("|stock − fused|")
    return _data_uri(figure)


def curves_chart(curves: dict[str, Sequence[float]], y_label: str = "training loss, nats") -> bytes:
    """Smoothed losses over steps, as an SVG file: from wide and light to thin and dark."""
    figure, axes = _figure(7.2, 3.6)
    styles = ((STOCK, 4.5), (FUSED, 1.5), (SLOWER, 1.5))
    for (name, values), (color, width) in zip(curves.items(), styles, strict=False):
        steps = range(1, len(values) + 1)
        axes.plot(steps, _smoothed(values), color=color, linewidth=width, label=name)
    axes.set_xlim(1, max(2, *map(len, curves.values())))
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    axes.legend(frameon=False, labelcolor=INK)
    return _svg(figure, transparent=False)


def ratio_chart(labels: Sequence[str], ratios: Sequence[float]) -> str:
    """Horizontal bars from 1 (a tie), to the right where fused is faster, on a log scale."""
    figure, axes = _figure(8.6, 0.75 + 0.3 * len(labels))
    positions = range(len(labels))
    logs = [math.log2(value) for value in ratios]
    colors = [FUSED if value >= 1 else SLOWER for value in ratios]
    axes.barh(positions, logs, color=colors, height=0.62)
    reach = max(1.0, *(abs(value) for value in logs)) * 1.2
    left = min(0.0, *logs) - (0.14 * reach if min(logs) < 0 else 0.04 * reach)
    axes.set_xlim(left, max(1.0, *logs) + 0.14 * reach)
    for position, value, log in zip(positions, ratios, logs, strict=True):
        side, offset = ("left", 4) if value >= 1 else ("right", -4)
        axes.annotate(
            f"{value:.2f}×", (log, position), xytext=(offset, 0), textcoords="offset points",
            ha=side, va="center", fontsize=8.5, color=INK,
        )  # fmt: skip
    axes.set_yticks(positions, labels)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    low, high = axes.get_xlim()
    shown = [value for value in _RATIO_TICKS if low <= math.log2(value) <= high]
    if len(shown) > 8:
        shown = [value for value in shown if math.log2(value).is_integer()]
    axes.set_xticks([math.log2(value) for value in shown], [f"{value:g}×" for value in shown])
    axes.axvline(0, color=INK, linewidth=1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("times as fast as stock")
    return _data_uri(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    return figure, axes


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a window of about a fortieth of the curve, narrower towards its ends."""
    reach = len(values) // 80
    smoothed = []
    for index in range(len(values)):
        side = min(reach, index, len(values) - 1 - index)
        window = values[index - side : index + side + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def _data_uri(figure: Any) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(_svg(figure)).decode()


def _svg(figure: Any, *, transparent: bool = True) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # Neither a date nor random names: the same data gives the same picture.
    with rc_context({"svg.hashsalt": "fused"}):
        figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None})
    return buffer.getvalue()
