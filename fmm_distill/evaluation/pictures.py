"""Pictures of an evaluation: samples from the same noise, and quality against network calls.

matplotlib is imported inside the functions: training imports this module and may never plot.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

from fmm_distill.evaluation.result import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import BytesIO
    from pathlib import Path

    from jaxtyping import Float
    from matplotlib.axes import Axes
    from torch import Tensor

    from fmm_distill.evaluation.result import Column, Evaluation, Row

__all__ = [
    "PLOTTED",
    "STYLES",
    "measured_columns",
    "plot_samples",
    "plot_steps",
    "still_images",
    "styles_of",
]

# Colors of Okabe and Ito, which color-blind readers distinguish; markers differ too.
STYLES = {
    "student": ("#D55E00", "o", "student"),
    "teacher-ddim": ("#0072B2", "s", "teacher, DDIM"),
    "teacher-euler": ("#0072B2", "s", "teacher, Euler"),
    "teacher-dpmsolver++": ("#009E73", "^", "teacher, DPM-Solver++"),
    "teacher-unipc": ("#CC79A7", "v", "teacher, UniPC"),
    "teacher-heun": ("#E69F00", "D", "teacher, Heun"),
    "teacher": ("#000000", "*", "teacher's own sampler"),
}
_OTHERS = (("#56B4E9", "P"), ("#7F7F7F", "X"), ("#F0E442", "p"), ("#56B4E9", "h"))
# Quantities with a plot in the report.
PLOTTED = ("endpoint_error", "frechet", "kid", "precision", "recall", "inception_score", "clip_score")


def styles_of(evaluation: Evaluation) -> dict[str, tuple[str, str, str]]:
    """Return color, marker and label of each sampler of an evaluation, the student first."""
    names = list(dict.fromkeys(row.sampler for row in evaluation.rows))
    known = {name: style for name, style in STYLES.items() if name in names}
    free = cycle(_OTHERS)
    return known | {name: (*next(free), name) for name in names if name not in STYLES}


def still_images(samples: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "batch channels height width"]:
    """Return one image per sample: the middle frame of a video, the numbers of a vector or matrix as gray levels."""
    if samples.ndim == 5:
        return samples[:, :, samples.shape[2] // 2]
    if samples.ndim == 2:
        # Vectors: a band of their entries.
        samples = samples.unsqueeze(1)
    return samples if samples.ndim == 4 else samples.unsqueeze(1)


def plot_samples(rows: dict[str, Float[Tensor, "batch channels height width"]], path: Path) -> None:
    """Plot one row per sampler and one column per noise.

    Args:
        rows: images in [-1, 1] by the name of their row.
    """
    from matplotlib.figure import Figure

    columns = min(len(images) for images in rows.values())
    figure = Figure(figsize=(1.2 + columns * 0.6, len(rows) * 0.62), dpi=200)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (name, images), line in zip(rows.items(), axes, strict=True):
        for image, axis in zip(images[:columns], line, strict=True):
            pixels = (image / 2 + 0.5).clamp(0, 1).movedim(0, -1).squeeze(-1).numpy()
            # Fixed limits: matplotlib would stretch the contrast of each image to its own range.
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout(pad=0.4, h_pad=0.15, w_pad=0.15)
    figure.savefig(path)


def plot_steps(
    evaluation: Evaluation, target: Path | BytesIO, quantities: Sequence[str] = ("endpoint_error", "frechet")
) -> None:
    """Plot quantities against network calls; error bars are two standard errors to each side.

    Args:
        target: a file or a buffer for the PNG.
        quantities: fields of a row; those that no row has are left out.
    """
    from matplotlib.figure import Figure

    columns = measured_columns(evaluation, quantities)
    across = min(2, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(5.2 * across, 3.8 * down), dpi=160)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis, column in zip(axes, columns, strict=False):
        _plot_quantity(axis, evaluation, column)
    for axis in axes[len(columns) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(target, format="png")


def measured_columns(evaluation: Evaluation, quantities: Sequence[str]) -> list[Column]:
    """Return the columns of quantities that some row has; without any, the first of the table."""
    found = [
        column
        for column in COLUMNS
        if column.key in quantities and any(getattr(row, column.key) is not None for row in evaluation.rows)
    ]
    return found or [COLUMNS[0]]


def _plot_quantity(axis: Axes, evaluation: Evaluation, column: Column) -> None:
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, LogLocator, NullLocator

    labels = {
        "endpoint_error": "endpoint error (RMS)",
        "frechet": "Fréchet distance",
        "kid": "kernel distance",
        "inception_score": "inception score",
        "clip_score": "CLIP score",
    }
    shown: list[Row] = []
    for sampler, (color, marker, name) in styles_of(evaluation).items():
        rows = [row for row in evaluation.rows if row.sampler == sampler and getattr(row, column.key) is not None]
        rows.sort(key=lambda row: row.calls)
        shown += rows
        if rows:
            calls = [row.calls for row in rows]
            values = [getattr(row, column.key) for row in rows]
            errors = [2 * row.errors.get(column.key, 0.0) for row in rows]
            style: dict[str, Any] = {"color": color, "marker": marker, "label": name, "capsize": 2}
            # The student's curve is in front of those that it coincides with.
            axis.errorbar(calls, values, errors, zorder=4 if sampler == "student" else 3, **style)
    positive = all(getattr(row, column.key) > 0 for row in shown)
    logarithmic = column.better == "lower" and positive
    axis.set(xscale="log", xlabel="network calls", ylabel=labels.get(column.key, column.title))
    axis.xaxis.set_major_locator(FixedLocator(_apart(sorted({row.calls for row in shown}))))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(NullLocator())
    if logarithmic:
        axis.set(yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(visible=True, which="major", alpha=0.3)
    if shown:
        axis.legend(frameon=False, fontsize=8)


def _apart(calls: list[int]) -> list[int]:
    """Return the numbers whose labels don't overlap on a logarithmic axis, the largest included."""
    labeled: list[int] = []
    for number in reversed(calls):
        # Labels of the usual size overlap below this ratio.
        if not labeled or number <= labeled[-1] / 1.3:
            labeled.append(number)
    return labeled
