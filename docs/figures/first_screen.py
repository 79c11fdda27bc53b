"""Make the README's picture and table from the files of the CIFAR-10 result.

    python docs/figures/first_screen.py

The picture is rows of ``docs/results/cifar10-samples.png`` in another order, with other labels; the table is written to
the terminal, and a test compares it with the README.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

DOCS = Path(__file__).parents[1]
SAMPLES = DOCS / "results" / "cifar10-samples.png"
PICTURE = DOCS / "assets" / "cifar10-samples.png"

# The rows of the picture: the label here, and the index of the row in the picture of all samplers.
ROWS = {
    "teacher, 50 calls": 2,
    "teacher, 4 calls": 1,
    "student, 1 call": 7,
    "student, 2 calls": 8,
    "student, 4 calls": 9,
}


def bands(picture: np.ndarray) -> list[np.ndarray]:
    """Cut a picture into its rows of images: what is to the right of the labels, between lines of white.

    Args:
        picture: colors, uint8, shape ``[height, width, 3]``.
    """
    dark = picture.min(axis=2) < 250
    # A row of images is dark over most of the width; labels are not.
    inside = np.concatenate(([False], dark.mean(axis=1) > 0.35, [False]))
    top, bottom = np.flatnonzero(inside[1:] & ~inside[:-1]), np.flatnonzero(inside[:-1] & ~inside[1:])
    columns = np.flatnonzero(dark.mean(axis=0) > 0.35)
    return [picture[a:b, columns[0] : columns[-1] + 1] for a, b in zip(top, bottom, strict=True)]


def draw() -> None:
    """Write the picture."""
    found = bands(np.asarray(Image.open(SAMPLES).convert("RGB")))
    figure, axes = plt.subplots(len(ROWS), 1, figsize=(9, 3.75), dpi=90)
    for axis, (label, index) in zip(axes, ROWS.items(), strict=True):
        axis.imshow(found[index], aspect="auto", interpolation="lanczos")
        axis.set_yticks([found[index].shape[0] / 2], [label])
        axis.set_xticks([])
        axis.tick_params(length=0, labelsize=11)
        axis.spines[:].set_visible(False)
    figure.subplots_adjust(left=0.17, right=0.995, top=0.99, bottom=0.01, hspace=0.04)
    figure.savefig(PICTURE)


def table() -> str:
    """Return the table: Fréchet distance and endpoint error of the CIFAR-10 result, and the measured seconds."""
    result = json.loads((DOCS / "results" / "cifar10.json").read_text(encoding="utf-8"))
    seconds = json.loads((DOCS / "results" / "cifar10-seconds.json").read_text(encoding="utf-8"))["seconds"]
    teacher, student = result["teacher"]["rows"], result["students"]["lagrangian-0"]["rows"]
    rows = {
        "teacher, DDIM": ("50", teacher["ddim"]["50"], "ddim-50"),
        "teacher, DPM-Solver++": ("8", teacher["dpmsolver++"]["8"], "dpmsolver++-8"),
    }
    lines = [
        "| | network calls | Fréchet distance | endpoint error | CPU seconds per image |",
        "|---|---:|---:|---:|---:|",
    ]
    numbered = [(name, *row) for name, row in rows.items()]
    numbered += [("**student**", steps, student[steps], f"student-{steps}") for steps in ("1", "2", "4")]
    for name, steps, row, key in numbered:
        cells = (name, steps, f"{row['frechet']:#.3g}", f"{row['endpoint']:.3f}", f"{seconds[key]:.2g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    draw()
    print(table())
