"""The two pictures of a run: samples from the same noise, and quality against network calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, LogLocator, NullLocator

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.evaluate import Evaluation

__all__ = ["draw_samples", "draw_steps", "still"]

# Okabe and Ito's palette: told apart by the colour-blind; markers differ too.
STYLES = {
    "student": ("#D55E00", "o", "student"),
    "teacher-ddim": ("#0072B2", "s", "teacher, DDIM"),
    "teacher-euler": ("#0072B2", "s", "teacher, Euler"),
    "teacher-dpmsolver++": ("#009E73", "^", "teacher, DPM-Solver++"),
}


def still(samples: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "batch channels height width"]:
    """One picture a sample: the middle frame of a video, a sound's waves as a grey band."""
    if samples.ndim == 5:
        return samples[:, :, samples.shape[2] // 2]
    return samples if samples.ndim == 4 else samples.unsqueeze(1)


def draw_samples(rows: dict[str, Float[Tensor, "batch channels height width"]], path: Path) -> None:
    """One row a sampler, one column a noise; images in [-1, 1]."""
    columns = min(len(images) for images in rows.values())
    figure = Figure(figsize=(1.2 + columns * 0.6, len(rows) * 0.62), dpi=200)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (name, images), line in zip(rows.items(), axes, strict=True):
        for image, place in zip(images[:columns], line, strict=True):
            pixels = (image / 2 + 0.5).clamp(0, 1).movedim(0, -1).squeeze(-1).numpy()
            place.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout(pad=0.4, h_pad=0.15, w_pad=0.15)
    figure.savefig(path)


def draw_steps(evaluation: Evaluation, path: Path) -> None:
    """Endpoint error and, where measured, Fréchet distance against network calls, both axes logarithmic."""
    quantities = {"endpoint_error": "endpoint error (RMS)"}
    if any(row.frechet is not None for row in evaluation.rows):
        quantities["frechet"] = "Fréchet distance"
    figure = Figure(figsize=(5.2 * len(quantities), 3.8), dpi=160)
    for axis, (quantity, label) in zip(
        figure.subplots(1, len(quantities), squeeze=False)[0], quantities.items(), strict=True
    ):
        for sampler, (colour, marker, name) in STYLES.items():
            rows = [row for row in evaluation.rows if row.sampler == sampler]
            if rows:
                calls = [row.calls for row in rows]
                axis.plot(calls, [getattr(row, quantity) for row in rows], color=colour, marker=marker, label=name)
        axis.set(xscale="log", yscale="log", xlabel="network calls", ylabel=label)
        axis.xaxis.set_major_locator(FixedLocator(sorted({row.calls for row in evaluation.rows})))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(FormatStrFormatter("%g"))
            side.set_minor_locator(NullLocator())
        axis.grid(visible=True, which="major", alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
