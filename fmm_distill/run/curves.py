"""The curves of a run: loss, gradient norm, learning rate, images per second, the evaluations on the way."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter, NullLocator

from fmm_distill.evaluation.pictures import STYLES as SAMPLERS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jaxtyping import Float
    from matplotlib.axes import Axes
    from numpy import ndarray

__all__ = ["draw_curves", "running_mean"]

# Of Okabe and Ito's palette, with markers: told apart by the color-blind.
RAW, SMOOTH, BAD = "#56B4E9", "#003A5D", "#D55E00"
STEPS = [("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]
QUANTITIES = {"endpoint_error": "endpoint error", "frechet": "Fréchet distance"}


def running_mean(values: Float[ndarray, " steps"], width: int) -> Float[ndarray, " steps"]:
    """The mean of the ``width`` values up to each, of fewer at the start, of those that are numbers."""
    numbers = np.isfinite(values)
    sums, counts = (np.cumsum(np.insert(kept, 0, 0.0)) for kept in (np.where(numbers, values, 0.0), numbers))
    first = np.maximum(np.arange(len(values)) + 1 - width, 0)
    count = counts[1:] - counts[first]
    return np.where(count > 0, (sums[1:] - sums[first]) / np.maximum(count, 1), np.nan)


def draw_curves(
    records: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], total: int, path: Path
) -> None:
    """Draw what is logged of a run, over the steps done, with its phases marked.

    Args:
        records: lines of ``steps.jsonl``, one or more.
        evaluations: lines of ``evaluations.jsonl``, and one of the evaluation at the end: ``step`` and ``rows``.
        total: steps of the whole run.
        path: of the PNG, which is written.
    """
    quantities = [name for name in QUANTITIES if any(row[name] is not None for e in evaluations for row in e["rows"])]
    heights = [2.2, 1.2, 1.2, 1.2, *(1.8 for _ in quantities)]
    figure = Figure(figsize=(9, 0.6 + 1.25 * sum(heights)), dpi=130, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    done = _column(records, "step") + 1
    width = max(10, len(records) // 50)
    for axis, (key, label) in zip(
        axes,
        {
            "loss": f"loss\n(dark: mean of {width})",
            "gradient_norm": "gradient norm",
            "learning_rate": "learning rate",
            "images_per_second": "images\nper second",
        }.items(),
        strict=False,
    ):
        values = _column(records, key)
        if key == "learning_rate":
            axis.plot(done, values, color=SMOOTH, linewidth=1.5)
        else:
            _noisy(axis, records, values, width)
        axis.set_ylabel(label)
        if key in ("loss", "gradient_norm"):
            _logarithmic(axis, values)
        else:
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axis, quantity in zip(axes[4:], quantities, strict=True):
        _evaluations(axis, evaluations, quantity)
    bad = [record["step"] + 1 for record in records if "skipped" in record]
    if bad:
        label = f"left out ({len(bad)})"
        shown = axes[0].plot(
            bad, [0.04] * len(bad), "x", color=BAD, transform=axes[0].get_xaxis_transform(), label=label
        )
        axes[0].legend(handles=shown, loc="lower left", frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(visible=True, which="major", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _phases(axes, records)
    axes[-1].set_xlabel(f"steps done, of {total:,}")
    axes[-1].set_xlim(0, done[-1] * 1.01)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    figure.savefig(path)


def _column(records: Sequence[Mapping[str, Any]], key: str) -> Float[ndarray, " steps"]:
    return np.array([np.nan if record[key] is None else record[key] for record in records], dtype=float)


def _noisy(axis: Axes, records: Sequence[Mapping[str, Any]], values: Float[ndarray, " steps"], width: int) -> None:
    """Every value in light; in dark their running mean, anew in each phase: losses have scales of their own."""
    done = _column(records, "step") + 1
    dots = "." if len(values) <= 60 else ""
    axis.plot(done, values, color=RAW, linewidth=0.8, alpha=0.7, marker=dots)
    for first, last in pairwise(_edges(records)):
        axis.plot(done[first:last], running_mean(values[first:last], width), color=SMOOTH, linewidth=1.5)


def _edges(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where in the log each phase begins, and its length."""
    changes = [i for i in range(1, len(records)) if records[i]["phase"] != records[i - 1]["phase"]]
    return [0, *changes, len(records)]


def _logarithmic(axis: Axes, values: Float[ndarray, " values"]) -> None:
    """A logarithmic axis whose ticks carry numbers, however little it spans; linear without two positive values."""
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) == 0 or positive.min() == positive.max():
        return
    axis.set_yscale("log")
    decades = np.log10(positive.max() / positive.min())
    if decades < 2.5:
        # Less than a decade has too few ticks of its own.
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if decades > 1 else MaxNLocator(5))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axis.yaxis.set_major_formatter(LogFormatterSciNotation())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())


def _evaluations(axis: Axes, evaluations: Sequence[Mapping[str, Any]], quantity: str) -> None:
    """A line for each number of the student's steps; the teacher's best row dashed."""
    rows = [(e["step"], row) for e in evaluations for row in e["rows"] if row[quantity] is not None]
    student = [(step, row) for step, row in rows if row["sampler"] == "student"]
    for i, steps in enumerate(sorted({row["steps"] for _, row in student})):
        color, marker = STEPS[i % len(STEPS)]
        points = sorted((step, row[quantity]) for step, row in student if row["steps"] == steps)
        label = "1 step" if steps == 1 else f"{steps} steps"
        axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1.3, label=label)
    teacher = [row for _, row in rows if not row["sampler"].startswith("student")]
    if teacher:
        best = min(teacher, key=lambda row: row[quantity])
        name = f"{SAMPLERS[best['sampler']][2]}, {best['steps']}"
        axis.axhline(best[quantity], color="#555555", linestyle="--", linewidth=1.0, label=name)
    _logarithmic(axis, np.array([row[quantity] for _, row in rows], dtype=float))
    axis.set_ylabel(QUANTITIES[quantity])
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _phases(axes: Sequence[Axes], records: Sequence[Mapping[str, Any]]) -> None:
    """A thin line where a phase begins, every second one shaded, its name above the first axes."""
    for i, (first, last) in enumerate(pairwise(_edges(records))):
        start, end = records[first]["step"], records[last - 1]["step"] + 1
        for axis in axes:
            if i % 2:
                axis.axvspan(start, end, color="#000000", alpha=0.05, linewidth=0)
            if i:
                axis.axvline(start, color="#777777", linewidth=0.8)
        place = axes[0].get_xaxis_transform()
        # Beside each other short phases would be written over each other.
        height = 1.02 if i % 2 == 0 else 1.09
        axes[0].text(start, height, records[first]["phase"], transform=place, fontsize=8, color="#333333")
