"""Tables and plots of the checkerboard experiment, from its results alone."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from experiments.plane import HALF_WIDTH, WIDTH

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["markdown", "plot_curves", "plot_densities"]

KINDS = {
    "kl_50": "KL divergence, 50 x 50 bins (the published protocol; perfect samples: 0.065)",
    "kl_48": "KL divergence, 48 x 48 bins (aligned with the squares; perfect samples: 0.009)",
    "endpoint": "Endpoint error: root mean square per coordinate to the end of the ODE from the same noise, in units "
    "of the data's deviation; a lost sample counts as a board's width (3.46) away",
}


def _cell(runs: list[dict[str, Any]], kind: str, n: str) -> str:
    """Return mean and half the range over the seeds, or the number of seeds that lost most of their samples."""
    lost = sum(run["endpoint"][n] > WIDTH / 2 for run in runs)
    if lost:
        return f"diverged ({lost} of {len(runs)})"
    values = [run[kind][n] for run in runs]
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else mean


def _rows(runs: dict[str, list[dict[str, Any]]], kind: str, steps: list[str]) -> list[str]:
    rows = []
    for name, seeds in runs.items():
        cells = [_cell(seeds, kind, n) for n in steps]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def markdown(results: dict[str, Any]) -> str:
    """Return all tables of a finished experiment."""
    teacher, machine = results["teacher"], results["machine"]
    steps = [str(n) for n in results["steps"]]
    head = "| loss | " + " | ".join(f"{n} steps" if n != "1" else "1 step" for n in steps) + " |"
    rule = "|---|" + "---:|" * len(steps)
    budget = results["budget"]
    seen = budget["steps"] * results["batch_size"]
    lines = [
        f"Teacher: flow matching, {budget['teacher_steps'] * results['batch_size'] / 1e6:.1f} million samples; "
        f"{budget['solver_steps']} Heun steps give KL {teacher['kl_50']:.3f} (50 bins) and {teacher['kl_48']:.3f} "
        f"(48 bins). Every student: initially the teacher's weights, {seen / 1e6:.2f} million samples, "
        f"{budget['seeds']} seed(s), 4 x {budget['width']} units; mean and half the range. "
        f"{budget['points']:,} samples in a histogram. Machine: {machine}.",
        "",
    ]
    for kind, title in KINDS.items():
        euler = {"teacher, Euler steps": [teacher["euler"]]}
        lines += [f"**{title}**", "", head, rule, *_rows(euler | results["runs"], kind, steps), ""]
    for title, key in (("Long run", "long"), ("Long run, closed-form teacher", "exact")):
        run = results[key]
        lines += [
            f"**{title}: lagrangian, {run['samples'] / 1e6:.1f} million samples, {run['seconds'] / 60:.0f} minutes; "
            f"its teacher has KL {run['teacher']['kl_50']:.3f} and {run['teacher']['kl_48']:.3f}**",
            "",
            head.replace("loss", "figure"),
            rule,
            *(f"| {kind} | " + " | ".join(f"{run[kind][n]:.3f}" for n in steps) + " |" for kind in KINDS),
            "",
        ]
    lines += ["**Speed**", "", "| loss | samples per second | time outside the networks |", "|---|---:|---:|"]
    for name, seeds in results["runs"].items():
        rate = statistics.median(run["samples_per_second"] for run in seeds)
        lines.append(f"| {name} | {rate:,.0f} | {results['outside'][name]:.0%} |")
    return "\n".join(lines) + "\n"


def plot_densities(pictures: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Plot histograms of samples, one row per method and one column per number of steps."""
    plt = _pyplot()
    columns = max(len(row) for row in pictures.values())
    figure, panels = plt.subplots(
        len(pictures), columns, figsize=(1.35 * columns + 1.6, 1.35 * len(pictures)), layout="constrained"
    )
    edge = 1.15 * HALF_WIDTH
    for line, (name, row) in zip(panels, pictures.items(), strict=True):
        for panel in line:
            panel.set_axis_off()
        for panel, (title, points) in zip(line, row.items(), strict=False):
            x, y = points.T.numpy()
            panel.hist2d(x, y, bins=96, range=[[-edge, edge]] * 2, cmap="viridis", vmax=len(points) / 96**2 * 3)
            panel.set_aspect("equal")
            panel.set_title(title, fontsize=7, pad=2)
        line[0].text(-0.08, 0.5, name, fontsize=8, ha="right", va="center", transform=line[0].transAxes)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def plot_curves(curves: dict[str, list[dict[str, Any]]], floors: dict[str, float], path: Path) -> None:
    """Plot the KL divergence against samples seen, at 1 and 4 steps, with the teacher's dashed."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, n in zip(panels, ("1", "4"), strict=True):
        for name, curve in curves.items():
            seen = [point["samples"] for point in curve]
            (line,) = panel.loglog(seen, [point["kl_50"][n] for point in curve], marker="o", label=name)
            panel.axhline(floors[name], color=line.get_color(), linestyle="--", linewidth=1)
        panel.set(title=f"{n} step" + "s" * (n != "1"), xlabel="samples seen")
        panel.grid(alpha=0.3, which="both")
        # Labels between powers of ten would overlap.
        panel.xaxis.set_minor_formatter("")
    panels[0].set_ylabel("KL divergence, 50 x 50 bins")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt
