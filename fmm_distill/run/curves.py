"""The curves of a run: loss, gradient norm, learning rate, images per second, and evaluations during training."""

from __future__ import annotations

from dataclasses import dataclass
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
    from matplotlib.figure import SubFigure
    from numpy import ndarray

__all__ = ["StageSteps", "plot_curves", "running_mean"]

# Okabe and Ito's palette, and markers, which color-blind readers can distinguish.
RAW, SMOOTH, BAD = "#56B4E9", "#003A5D", "#D55E00"
STEPS = [("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]
# In pairs of what improves and what it costs.
QUANTITIES = {
    "frechet": "Fréchet distance",
    "endpoint_error": "endpoint error",
    "recall": "recall",
    "precision": "precision",
}
_HIGHER = ("recall", "precision")
_COLUMNS = {
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
    "images_per_second": "images\nper second",
}
_GRAY = "#555555"


@dataclass(frozen=True)
class StageSteps:
    """The second stage of a run, in steps of the run.

    Attributes:
        start: its first step, of the critic alone; the evaluation there is the map's.
        first: the first step of the student.
        steps: the number of the student's steps.
        name: of the matching loss.
        best: the step of the best evaluation; None: there is no early stopping.
        ended: the average of that evaluation is the one that is exported.
    """

    start: int
    first: int
    steps: int
    name: str
    best: int | None = None
    ended: bool = False

    def steps_of_student(self, step: int) -> int:
        """Return the number of steps of the student in the stage; the critic's own steps change nothing."""
        return max(0, step - self.first)


def running_mean(values: Float[ndarray, " steps"], width: int) -> Float[ndarray, " steps"]:
    """Return the mean of the finite values among the last ``width``, shape ``[steps]``; nan where there is none."""
    numbers = np.isfinite(values)
    sums, counts = (np.cumsum(np.insert(one, 0, 0.0)) for one in (np.where(numbers, values, 0.0), numbers))
    first = np.maximum(np.arange(len(values)) + 1 - width, 0)
    count = counts[1:] - counts[first]
    return np.where(count > 0, (sums[1:] - sums[first]) / np.maximum(count, 1), np.nan)


def plot_curves(
    records: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    total: int,
    path: Path,
    stage: StageSteps | None = None,
) -> None:
    """Plot the log of a run against the number of completed steps, with its phases marked.

    A second stage that has begun has panels of its own below: the health of the critic, its loss, and the evaluations.

    Args:
        records: the lines of ``steps.jsonl``, one or more.
        evaluations: the lines of ``evaluations.jsonl`` and of the final evaluation, each with ``step`` and ``rows``.
        total: the number of steps of the run.
        path: the PNG file to write.
    """
    later = [record for record in records if stage is not None and record["step"] >= stage.start]
    of_stage = [one for one in evaluations if stage is not None and one["step"] >= stage.start]
    # Evaluations of the second stage alone are shown there.
    shown = evaluations if not later or len(of_stage) < len(evaluations) else []
    height = _run_height(shown)
    if not later or stage is None:
        figure = Figure(figsize=(9, height), dpi=130, layout="constrained")
        _plot_run(figure, records, shown, total)
    else:
        below = 0.9 + 2.3 * (1 + (len(_measured(of_stage)) + 1) // 2)
        figure = Figure(figsize=(9, height + below), dpi=130, layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[height, below])
        _plot_run(parts[0], records, shown, total)
        _plot_stage(parts[1], later, [*_of_teacher(evaluations), *of_stage], stage)
    figure.savefig(path)


def _of_teacher(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the teacher alone, which the first evaluation of a run has."""
    return [{**one, "rows": [row for row in one["rows"] if row["sampler"] != "student"]} for one in evaluations]


def _measured(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    # Lines of an earlier version have no recall and no precision.
    return [name for name in QUANTITIES if any(row.get(name) is not None for e in evaluations for row in e["rows"])]


def _run_height(evaluations: Sequence[Mapping[str, Any]]) -> float:
    return 0.6 + 1.25 * sum(_heights(evaluations))


def _heights(evaluations: Sequence[Mapping[str, Any]]) -> list[float]:
    return [2.2, 1.2, 1.2, 1.2, *(1.6 for _ in _measured(evaluations))]


def _plot_run(
    figure: Figure | SubFigure,
    records: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    total: int,
) -> None:
    """Plot all steps of a run."""
    quantities, heights = _measured(evaluations), _heights(evaluations)
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    done = _column(records, "step") + 1
    width = _width(records)
    for axis, (key, label) in zip(axes, _COLUMNS.items(), strict=False):
        values = _column(records, key)
        if key == "learning_rate":
            for first, last in pairwise(_edges(records)):
                axis.plot(done[first:last], values[first:last], color=SMOOTH, linewidth=1.5)
        else:
            _noisy(axis, records, key, width)
        axis.set_ylabel(f"{label}\n(dark: mean of {width})" if key == "loss" else label)
        if key in ("loss", "gradient_norm"):
            _logarithmic(axis, values)
        else:
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axis, quantity in zip(axes[len(_COLUMNS) :], quantities, strict=True):
        _evaluations(axis, evaluations, quantity)
        if quantity not in _HIGHER:
            _logarithmic(axis, np.concatenate([line.get_ydata() for line in axis.lines]).astype(float))
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    bad = [record["step"] + 1 for record in records if "skipped" in record]
    if bad:
        label = f"skipped ({len(bad)})"
        marks = axes[0].plot(
            bad, [0.04] * len(bad), "x", color=BAD, transform=axes[0].get_xaxis_transform(), label=label
        )
        axes[0].legend(handles=marks, loc="lower left", frameon=False, fontsize=8)
    for axis in axes:
        _plain(axis)
    _phases(axes, records)
    axes[-1].set_xlabel(f"steps, of {total:,}")
    # A margin, so that the last point is not cut in half.
    axes[-1].set_xlim(0, done[-1] * 1.01)
    figure.align_ylabels(axes)


def _plot_stage(
    figure: Figure | SubFigure,
    records: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    stage: StageSteps,
) -> None:
    """Plot the second stage against the steps of the student, of which the critic's own are before 0."""
    quantities = _measured(evaluations)
    rows = 1 + (len(quantities) + 1) // 2
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    figure.suptitle(f"Second stage ({stage.name}), against steps of the student; 0: the map", fontsize=10)
    _health(axes[0], records, stage)
    own = [record for record in records if record["step"] >= stage.first]
    _noisy(axes[1], own, "loss", _width(own), start=stage.first)
    _logarithmic(axes[1], _column(own, "loss"))
    axes[1].set_ylabel("loss of the student")
    # Before the first step of the student its axis is empty.
    last = stage.steps_of_student(records[-1]["step"] + 1) or stage.steps
    axes[1].set_xlim(0, last * 1.02)
    placed = [{**one, "step": stage.steps_of_student(one["step"])} for one in evaluations]
    for axis, quantity in zip(axes[2:], quantities, strict=False):
        _evaluations(axis, placed, quantity)
        axis.set_xlim(-0.02 * last, last * 1.02)
        if stage.best is not None:
            label = "exported" if stage.ended else "best so far"
            axis.axvline(stage.steps_of_student(stage.best), color="#000000", linestyle=":", label=label)
    for axis in axes[2 + len(quantities) :]:
        axis.set_axis_off()
    for axis in axes[: 2 + len(quantities)]:
        _plain(axis)
    figure.align_ylabels(axes)
    if quantities:
        # The name of the teacher's best row differs between quantities.
        handles, labels = axes[2].get_legend_handles_labels()
        labels = ["teacher's best" if label.startswith("teacher") else label for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)


def _health(axis: Axes, records: Sequence[Mapping[str, Any]], stage: StageSteps) -> None:
    """Plot the errors of critic and teacher on generated samples, of which the critic's must be the lower one."""
    # In the critic's own steps its loss is this error.
    errors = [
        {**record, "critic_loss": record["loss"]} if record["step"] < stage.first else record for record in records
    ]
    width = _width(records)
    done = _column(records, "step") + 1 - stage.first
    for key, name, color in (("critic_loss", "critic", BAD), ("teacher_loss", "teacher", SMOOTH)):
        values = _column(errors, key)
        axis.plot(done, values, color=color, linewidth=0.6, alpha=0.3)
        axis.plot(done, running_mean(values, width), color=color, linewidth=1.5, label=name)
    _logarithmic(axis, np.concatenate([_column(errors, "critic_loss"), _column(errors, "teacher_loss")]))
    axis.axvspan(stage.start - stage.first, 0, color="#000000", alpha=0.05, linewidth=0)
    axis.set_xlim(stage.start - stage.first, max(done[-1], 1) * 1.02)
    axis.set_ylabel("health of the critic:\nerror on samples")
    axis.legend(frameon=False, fontsize=8)


def _plain(axis: Axes) -> None:
    axis.grid(visible=True, which="major", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _width(records: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of steps of the running mean: a fiftieth smooths the noise of batches and leaves the trend."""
    return max(10, len(records) // 50)


def _column(records: Sequence[Mapping[str, Any]], key: str) -> Float[ndarray, " steps"]:
    values = [record.get(key) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _noisy(axis: Axes, records: Sequence[Mapping[str, Any]], key: str, width: int, *, start: int = 0) -> None:
    """Plot each value in light and its running mean in dark, one line per phase, as each loss has its own scale.

    Args:
        start: the step that is 0 on the axis.
    """
    done, values = _column(records, "step") + 1 - start, _column(records, key)
    dots = "." if len(values) <= 60 else ""
    for first, last in pairwise(_edges(records)):
        axis.plot(done[first:last], values[first:last], color=RAW, linewidth=0.8, alpha=0.7, marker=dots)
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
    rows = [(e["step"], row) for e in evaluations for row in e["rows"] if row.get(quantity) is not None]
    student = [(step, row) for step, row in rows if row["sampler"] == "student"]
    for i, steps in enumerate(sorted({row["steps"] for _, row in student})):
        color, marker = STEPS[i % len(STEPS)]
        points = sorted((step, row[quantity]) for step, row in student if row["steps"] == steps)
        label = "1 step" if steps == 1 else f"{steps} steps"
        axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1.3, label=label)
    teacher = [row for _, row in rows if not row["sampler"].startswith("student")]
    if teacher:
        choose = max if quantity in _HIGHER else min
        best = choose(teacher, key=lambda row: row[quantity])
        name = f"{SAMPLERS[best['sampler']][2]}, {best['steps']}"
        axis.axhline(best[quantity], color=_GRAY, linestyle="--", linewidth=1.0, label=name)
    axis.set_ylabel(QUANTITIES[quantity])


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
