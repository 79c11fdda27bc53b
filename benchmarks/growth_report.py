"""Curves of ``benchmarks/growth.py``: slopes, comparison of the engines, tables and a plot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from experiments.cifar10.report import COLORS, MARKERS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

__all__ = ["QUANTITIES", "cheaper", "count", "curve", "markdown", "plot", "slope"]

QUANTITIES = {"milliseconds": "ms of a step", "bytes": "peak memory of a step, MiB"}
_UNITS = {"milliseconds": 1.0, "bytes": 2**20}


def slope(at: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the exponent of the best power law, by least squares in logarithms; None for one point."""
    if len(at) < 2:
        return None
    x, y = [math.log(value) for value in at], [math.log(value) for value in values]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def curve(axis: str, loss: str, quantity: str, at: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """Return a curve with its slopes: of all points, and of the upper half, where constant costs matter less."""
    upper = len(at) // 2
    slopes = {"slope": slope(at, values), "slope_upper_half": slope(at[upper:], values[upper:])}
    return {"axis": axis, "loss": loss, "quantity": quantity, "at": list(at), "values": list(values)} | slopes


def cheaper(at: Sequence[float], ratios: Sequence[dict[str, float]]) -> str:
    """Return the sizes at which exact derivatives are cheaper: the interquartile range of ratios is below 1."""
    cheap = [size for size, ratio in zip(at, ratios, strict=True) if ratio["high"] < 1]
    medians = [ratio["median"] for ratio in ratios]
    span = f"{min(medians):.2f} to {max(medians):.2f} of central"
    if not cheap:
        return f"never in this range ({span})"
    if len(cheap) == len(at):
        return f"everywhere in this range ({span})"
    return f"at {', '.join(f'{size:,}' for size in cheap)} ({span})"


def markdown(found: dict[str, Any]) -> str:
    """Return all tables."""
    lines: list[str] = []
    for axis in dict.fromkeys(entry["axis"] for entry in found["curves"]):
        for quantity, title in QUANTITIES.items():
            curves = [c for c in found["curves"] if c["axis"] == axis and c["quantity"] == quantity]
            lines += [*_table(axis, title, curves, _UNITS[quantity]), ""]
    lines += [*_summary(found["curves"]), ""]
    if found["exact_by_central"]:
        lines += ["Exact derivatives cost less than central ones:", ""]
        lines += ["| loss | against | time | memory |", "|---|---|---|---|"]
        lines += [
            f"| {r['loss']} | {r['axis']} | {r['time_says']} | {r['memory_says']} |" for r in found["exact_by_central"]
        ]
        lines.append("")
    if found["options"]:
        lines += ["| network | option | time by plain | memory by plain |", "|---|---|---:|---:|"]
        for row in found["options"]:
            time = "{median:.2f} ({low:.2f} to {high:.2f})".format(**row["time"])
            lines.append(f"| {row['network']} | {row['option']} | {time} | {row['memory']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def _summary(curves: Sequence[dict[str, Any]]) -> list[str]:
    """Return the slopes, with those of the upper halves in parentheses."""
    axes = list(dict.fromkeys(entry["axis"] for entry in curves))
    words = {"milliseconds": "time", "bytes": "memory"}
    head = " | ".join(f"{words[quantity]} by {axis}" for axis in axes for quantity in QUANTITIES)
    lines = [f"| loss | {head} |", "|---|" + "---:|" * (len(axes) * len(QUANTITIES))]
    cells: dict[str, list[str]] = {}
    for axis in axes:
        for quantity in QUANTITIES:
            for entry in curves:
                if (entry["axis"], entry["quantity"]) == (axis, quantity):
                    overall, upper = _slopes(entry)
                    cells.setdefault(entry["loss"], []).append(f"{overall} ({upper})" if upper else overall)
    return [*lines, *(f"| {loss} | {' | '.join(slopes)} |" for loss, slopes in cells.items())]


def _table(axis: str, title: str, curves: Sequence[dict[str, Any]], unit: float) -> list[str]:
    sizes = [count(size) for size in curves[0]["at"]]
    head = f"| {title}, by {axis} | " + " | ".join([*sizes, "slope", "upper half"]) + " |"
    rows = [
        f"| {entry['loss']} | "
        + " | ".join([*(_shown(value / unit) for value in entry["values"]), *_slopes(entry)])
        + " |"
        for entry in curves
    ]
    return [head, "|---|" + "---:|" * (len(sizes) + 2), *rows]


def _slopes(entry: dict[str, Any]) -> list[str]:
    return ["" if entry[name] is None else f"{entry[name]:.2f}" for name in ("slope", "slope_upper_half")]


def _shown(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def count(number: float) -> str:
    """Return a short form of a large number."""
    if number >= 1e6:
        return f"{number / 1e6:.0f}M" if number >= 1e7 else f"{number / 1e6:.1f}M"
    return f"{number / 1e3:.0f}k" if number >= 1e4 else f"{number:g}"


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot one row per axis, time left and memory right; legends have the slopes of all and the upper half."""
    axes = list(dict.fromkeys(entry["axis"] for entry in found["curves"]))
    figure = Figure(figsize=(14, 3.7 * len(axes)), dpi=120, layout="constrained")
    panels = figure.subplots(len(axes), len(QUANTITIES), squeeze=False)
    for axis, row in zip(axes, panels, strict=True):
        for (quantity, title), panel in zip(QUANTITIES.items(), row, strict=True):
            curves = [c for c in found["curves"] if c["axis"] == axis and c["quantity"] == quantity]
            _draw_panel(panel, curves, _UNITS[quantity])
            panel.set(xlabel=found["about"]["axes"][axis], ylabel=title)
    figure.savefig(path)


def _draw_panel(panel: Axes, curves: Sequence[dict[str, Any]], unit: float) -> None:
    for i, entry in enumerate(curves):
        label = entry["loss"] + "".join(f"  {text}" for text in _slopes(entry))
        values = [value / unit for value in entry["values"]]
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        # Later curves have smaller markers and thinner lines, so that coinciding curves stay visible.
        panel.plot(entry["at"], values, label=label, markersize=9 - 1.2 * i, linewidth=2.6 - 0.4 * i, **style)
    panel.set(xscale="log", yscale="log")
    panel.xaxis.set_major_locator(FixedLocator(curves[0]["at"]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda number, _: count(number)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)
    title = "loss  slope  upper half" if curves[0]["slope_upper_half"] is not None else "loss  slope"
    panel.legend(title=title, fontsize=8, title_fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
