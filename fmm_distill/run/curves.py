"""The curves of a run: loss, gradient norm, learning rate, images per second, and evaluations during training."""

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

__all__ = ["plot_curves", "running_mean"]

# Okabe and Ito's palette, and markers, which color-blind readers can distinguish.
RAW, SMOOTH, BAD = "#56B4E9", "#003A5D", "#D55E00"
STEPS = [("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]
QUANTITIES = {"endpoint_error": "endpoint error", "frechet": "Fréchet distance"}


def running_mean(values: Float[ndarray, " steps"], width: int) -> Float[ndarray, " steps"]:
    """Return the mean of the finite values among the last ``width``, shape ``[steps]``; nan where there is none."""
    numbers = np.isfinite(values)
    sums, counts = (np.cumsum(np.insert(one, 0, 0.0)) for one in (np.where(numbers, values, 0.0), numbers))
    first = np.maximum(np.arange(len(values)) + 1 - width, 0)
    count = counts[1:] - counts[first]
    return np.where(count > 0, (sums[1:] - sums[first]) / np.maximum(count, 1), np.nan)


def plot_curves(
    records: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], total: int, path: Path
) -> None:
    """Plot the log of a run against the number of completed steps, with its phases marked.

    Args:
        records: the lines of ``steps.jsonl``, one or more.
        evaluations: the lines of ``evaluations.jsonl`` and of the final evaluation, each with ``step`` and ``rows``.
        total: the number of steps of the run.
        path: the PNG file to write.
    """
    quantities = [name for name in QUANTITIES if any(row[name] is not None for e in evaluations for row in e["rows"])]
    heights = [2.2, 1.2, 1.2, 1.2, *(1.8 for _ in quantities)]
    figure = Figure(figsize=(9, 0.6 + 1.25 * sum(heights)), dpi=130, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    done = _column(records, "step") + 1
    # A fiftieth of the run smooths the noise of single batches and leaves its trend.
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
        label = f"skipped ({len(bad)})"
        shown = axes[0].plot(
            bad, [0.04] * len(bad), "x", color=BAD, transform=axes[0].get_xaxis_transform(), label=label
        )
        axes[0].legend(handles=shown, loc="lower left", frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(visible=True, which="major", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _phases(axes, records)
    axes[-1].set_xlabel(f"steps, of {total:,}")
    # A margin, so that the last point is not cut in half.
    axes[-1].set_xlim(0, done[-1] * 1.01)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    figure.savefig(path)


def _column(records: Sequence[Mapping[str, Any]], key: str) -> Float[ndarray, " steps"]:
    return np.array([np.nan if record[key] is None else record[key] for record in records], dtype=float)


def _noisy(axis: Axes, records: Sequence[Mapping[str, Any]], values: Float[ndarray, " steps"], width: int) -> None:
    """Plot each value in light and the running mean of each phase in dark, as each loss has its own scale."""
    done = _column(records, "step") + 1
    dots = "." if len(values) <= 60 else ""
    axis.plot(done, values, color=RAW, linewidth=0.8, alpha=0.7, marker=dots)
    for first, last in pairwise(_edges(records)):
        axis.plot(done[first:last], running_mean(values[first:last], width), color=SMOOTH, linewidth=1.5)


def _edges(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the index in the log at which each phase begins, and the length of the log."""
    changes = [i for i in range(1, len(records)) if records[i]["phase"] != records[i - 1]["phase"]]
    return [0, *changes, len(records)]


def _logarithmic(axis: Axes, values: Float[ndarray, " values"]) -> None:
    """Make an axis logarithmic, with labeled ticks on short spans too, if it has two positive values."""
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) == 0 or positive.min() == positive.max():
        return
    axis.set_yscale("log")
    decades = np.log10(positive.max() / positive.min())
    if decades < 2.5:
        # Matplotlib labels decades alone, and a span below 2.5 decades has one or two of them.
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if decades > 1 else MaxNLocator(5))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axis.yaxis.set_major_formatter(LogFormatterSciNotation())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())


def _evaluations(axis: Axes, evaluations: Sequence[Mapping[str, Any]], quantity: str) -> None:
    """Plot a line for each number of steps of the student, and a dashed line for the teacher's best row."""
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
    """Mark each phase: a thin line at its start, its name above the first axis, and a shade on every second one."""
    for i, (first, last) in enumerate(pairwise(_edges(records))):
        start, end = records[first]["step"], records[last - 1]["step"] + 1
        for axis in axes:
            if i % 2:
                axis.axvspan(start, end, color="#000000", alpha=0.05, linewidth=0)
            if i:
                axis.axvline(start, color="#777777", linewidth=0.8)
        above = axes[0].get_xaxis_transform()
        # At two heights, the names of short phases don't overlap.
        height = 1.02 if i % 2 == 0 else 1.09
        axes[0].text(start, height, records[first]["phase"], transform=above, fontsize=8, color="#333333")
