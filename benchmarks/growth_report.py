"""Curves of ``benchmarks/growth.py``: slopes, where one engine is cheaper than the other, tables and a picture."""

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
    """The power that grows like these values: a least-squares line through both logarithms. None: of one point."""
    if len(at) < 2:
        return None
    x, y = [math.log(value) for value in at], [math.log(value) for value in values]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def curve(axis: str, loss: str, quantity: str, at: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """A curve with its slopes: over all of it, and over its upper half, where what does not grow counts less."""
    upper = len(at) // 2
    slopes = {"slope": slope(at, values), "slope_upper_half": slope(at[upper:], values[upper:])}
    return {"axis": axis, "loss": loss, "quantity": quantity, "at": list(at), "values": list(values)} | slopes


def cheaper(at: Sequence[float], ratios: Sequence[dict[str, float]]) -> str:
    """Where exact derivatives cost less than central ones, by the whole middle half of the ratios of the two."""
    here = [place for place, ratio in zip(at, ratios, strict=True) if ratio["high"] < 1]
    medians = [ratio["median"] for ratio in ratios]
    span = f"{min(medians):.2f} to {max(medians):.2f} of central"
    if not here:
        return f"never in this range ({span})"
    if len(here) == len(at):
        return f"everywhere in this range ({span})"
    return f"at {', '.join(f'{place:,}' for place in here)} ({span})"


def markdown(found: dict[str, Any]) -> str:
    """Tables of what was measured."""
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
    """Slopes alone, those of the upper halves in brackets."""
    axes = list(dict.fromkeys(entry["axis"] for entry in curves))
    words = {"milliseconds": "time", "bytes": "memory"}
    head = " | ".join(f"{words[quantity]} by {axis}" for axis in axes for quantity in QUANTITIES)
    lines = [f"| loss | {head} |", "|---|" + "---:|" * (len(axes) * len(QUANTITIES))]
    cells: dict[str, list[str]] = {}
    for axis in axes:
        for quantity in QUANTITIES:
            for entry in curves:
                if (entry["axis"], entry["quantity"]) == (axis, quantity):
                    whole, upper = _slopes(entry)
                    cells.setdefault(entry["loss"], []).append(f"{whole} ({upper})" if upper else whole)
    return [*lines, *(f"| {loss} | {' | '.join(slopes)} |" for loss, slopes in cells.items())]


def _table(axis: str, title: str, curves: Sequence[dict[str, Any]], unit: float) -> list[str]:
    places = [count(place) for place in curves[0]["at"]]
    head = f"| {title}, by {axis} | " + " | ".join([*places, "slope", "upper half"]) + " |"
    rows = [
        f"| {entry['loss']} | "
        + " | ".join([*(_shown(value / unit) for value in entry["values"]), *_slopes(entry)])
        + " |"
        for entry in curves
    ]
    return [head, "|---|" + "---:|" * (len(places) + 2), *rows]


def _slopes(entry: dict[str, Any]) -> list[str]:
    return ["" if entry[name] is None else f"{entry[name]:.2f}" for name in ("slope", "slope_upper_half")]


def _shown(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def count(number: float) -> str:
    """A large number in a few letters."""
    if number >= 1e6:
        return f"{number / 1e6:.0f}M" if number >= 1e7 else f"{number / 1e6:.1f}M"
    return f"{number / 1e3:.0f}k" if number >= 1e4 else f"{number:g}"


def plot(found: dict[str, Any], path: Path) -> None:
    """One row for what grows, time on the left and memory on the right; legends give the slopes, all and upper half."""
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
        # Curves that lie on one another stay visible: later ones have smaller marks and thinner lines.
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
