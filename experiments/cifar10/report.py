"""Tables and plots of the CIFAR-10 experiment, from its results alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator
from safetensors.torch import load_file

from fmm_distill.evaluation.pictures import plot_samples

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["markdown", "plot_minutes", "plot_steps", "write_samples"]

STEPS = ("1", "2", "4", "8", "16", "32")
SOLVERS = {"ddim": "teacher, DDIM", "dpmsolver++": "teacher, DPM-Solver++"}
# Colors of Okabe and Ito, which color-blind readers distinguish; line styles distinguish the others.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP*X<>hd"


MINUTES = {
    "GPU": "GPU minutes: the fraction of the device that the steps use, measured with all losses at the same time.",
    "CPU": "CPU minutes: of one core, start and export of the student included.",
}


def _device(results: dict[str, Any]) -> str:
    return "CPU" if results["machine"]["device"].endswith("processor") else "GPU"


def markdown(results: dict[str, Any]) -> str:
    """Return all tables of an experiment, which may be incomplete."""
    lines = [*_about(results), ""]
    for quantity, title in (("frechet", "Fréchet distance"), ("endpoint", "Endpoint error")):
        lines += [f"{title}:", "", *_table(results, quantity), ""]
    if results["missing"]:
        lines += [f"Not finished: {', '.join(results['missing'])}.", ""]
    return "\n".join(lines)


def _about(results: dict[str, Any]) -> list[str]:
    teacher, classifier, protocol = results["teacher"], results["classifier"], results["protocol"]
    budget, lines = (
        results["budget"],
        [f"Machine: {results['machine']['device']}, torch {results['machine']['torch']}."],
    )
    if "parameters" in teacher:
        lines.append(
            f"Teacher: {teacher['parameters']:,} parameters, {teacher['objective']}, {teacher['images_seen']:,} images "
            f"seen in {teacher['seconds']:.0f} s."
        )
    if classifier:
        lines.append(
            f"Classifier: {100 * classifier['accuracy']:.1f} % of {classifier['test_images']:,} test images correct, "
            f"{classifier['width']} features, {classifier['seconds']:.0f} s."
        )
    if protocol:
        lines.append(
            f"Fréchet distance: {protocol['samples']:,} samples against {protocol['reference']} (decoded JPEG), "
            f"{protocol['features']}. Endpoint error: root mean square over {protocol['endpoint_samples']} noises and "
            f"all pixels (range -1 to 1) of the distance to the teacher's ODE ({protocol['ode_solver']}; half as many "
            f"steps change it by {protocol['ode_solver_error']:.2g})."
        )
    seen = {found["images_seen"] for found in results["students"].values()}
    if seen:
        lines.append(
            f"Students: {', '.join(f'{n:,}' for n in sorted(seen))} images seen each, batches of {budget['batch']}. "
            + MINUTES[_device(results)]
        )
    return lines


def _table(results: dict[str, Any], quantity: str) -> list[str]:
    head = "| sampler | " + " | ".join([*STEPS, "50", f"{_device(results)} minutes"]) + " |"
    lines = [head, "|---|" + "---:|" * (len(STEPS) + 2)]
    for kind, rows in results["teacher"].get("rows", {}).items():
        cells = [_cell(rows.get(n), quantity) for n in (*STEPS, "50")]
        lines.append(f"| {SOLVERS[kind]} | " + " | ".join([*cells, ""]) + " |")
    for title, found in results["students"].items():
        cells = [_cell(found["rows"].get(n), quantity) for n in STEPS]
        seconds = found["device_seconds"]
        cells += ["", "" if seconds is None else f"{seconds / 60:.2f}"]
        lines.append(f"| {_name(title)} | " + " | ".join(cells) + " |")
    return lines


def _name(title: str) -> str:
    name, _, seed = title.rpartition("-")
    return name if seed == "0" else f"{name}, seed {seed}"


def _cell(row: dict[str, float] | None, quantity: str) -> str:
    if row is None:
        return ""
    return f"{row[quantity]:.3f}" if quantity == "endpoint" else f"{row[quantity]:.3g}"


def _style(results: dict[str, Any], title: str) -> dict[str, Any]:
    """Return the style of a student, the same for all seeds of a method."""
    methods = list(dict.fromkeys(title.rpartition("-")[0] for title in results["students"]))
    i = methods.index(title.rpartition("-")[0])
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}


def plot_steps(results: dict[str, Any], path: Path) -> None:
    """Plot both quantities against network calls, with the teacher's solvers dashed."""
    figure = Figure(figsize=(11, 4.4), dpi=130)
    panels = figure.subplots(1, 2)
    for axis, quantity in zip(panels, ("frechet", "endpoint"), strict=True):
        for i, (kind, rows) in enumerate(results["teacher"]["rows"].items()):
            calls = [int(n) for n in rows]
            values = [row[quantity] for row in rows.values()]
            axis.plot(calls, values, "--" if i else "-.", color="black", marker="|", label=SOLVERS[kind])
        for title, found in results["students"].items():
            values = [row[quantity] for row in found["rows"].values()]
            calls, seeded = [int(n) for n in found["rows"]], not title.endswith("-0")
            axis.plot(calls, values, ":" if seeded else "-", linewidth=1, label=_name(title), **_style(results, title))
        axis.set(xscale="log", yscale="log", xlabel="network calls")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xticks([1, 2, 4, 8, 16, 32, 50])
        axis.xaxis.set_major_formatter(FormatStrFormatter("%d"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("Fréchet distance (classifier's features)")
    panels[1].set_ylabel("endpoint error (RMS)")
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def plot_minutes(results: dict[str, Any], path: Path) -> None:
    """Plot the Fréchet distance at 1 and 4 calls against the minutes of training alone on the device."""
    figure = Figure(figsize=(10, 4.2), dpi=130)
    panels = figure.subplots(1, 2)
    for axis, n in zip(panels, ("1", "4"), strict=True):
        timed = {title: found for title, found in results["students"].items() if found["device_seconds"] is not None}
        for title, found in timed.items():
            point = found["device_seconds"] / 60, found["rows"][n]["frechet"]
            axis.plot(*point, linestyle="", label=_name(title), **_style(results, title))
        for i, (kind, rows) in enumerate(results["teacher"]["rows"].items()):
            if n in rows:
                axis.axhline(rows[n]["frechet"], color="black", linestyle="--" if i else "-.", label=SOLVERS[kind])
        axis.set(
            yscale="log",
            xlabel=f"{_device(results)} minutes of the student's training",
            title=f"{n} call{'s' * (n != '1')}",
        )
        for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatted(FormatStrFormatter("%g"))
        axis.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("Fréchet distance (classifier's features)")
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def write_samples(rows: Path, students: list[str], path: Path) -> None:
    """Plot samples from the same noises: the teacher's ODE and stock solvers above, the best students below."""
    shown: dict[str, Tensor] = {}
    for name, n, title in (("ode", "0", "teacher's ODE"), ("ddim-4", "4", "DDIM, 4"), ("ddim-50", "50", "DDIM, 50")):
        file = rows / f"{name}.safetensors"
        if file.is_file():
            shown[title] = load_file(file)[n] / 127.5 - 1
    for title in students:
        images = load_file(rows / f"{title}.safetensors")
        shown |= {f"{_name(title)}, {n}": images[n] / 127.5 - 1 for n in ("1", "2", "4", "8")}
    plot_samples(shown, path)
