"""Measure quality against images seen for teachers of several sizes, and extrapolate it by a power law.

    python -m experiments.cifar10.scaling --work runs/cifar10 --teachers runs/cifar10/teacher runs/cifar10/teacher-small

``--work`` is the folder of ``experiments.cifar10``, with its images and classifier. Each teacher is distilled anew for
every number of steps, so that every point is a complete run whose learning rate has decayed. ``q = a images^b`` is
fitted in logarithms by least squares. The Fréchet distance of the teacher (DDIM, 50 steps), the limit of a perfect
student, is subtracted first. The same command resumes after the last finished run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from experiments.cifar10.budget import BUDGETS
from experiments.cifar10.experiment import machine, read, read_if_there
from experiments.cifar10.measure import open_judge
from experiments.cifar10.methods import recipe_of
from experiments.cifar10.processes import Processes
from experiments.cifar10.report import COLORS
from fmm_distill.export.load import load_student
from fmm_distill.io.files import write_text
from fmm_distill.teachers.load import load_teacher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.cifar10.budget import Budget
    from experiments.cifar10.measure import Judge
    from fmm_distill.teachers.base import Teacher

METHOD = "lagrangian"
CALLS = (1, 2, 4)
LENGTHS = (64, 128, 256, 512, 1024)
# Images seen in published runs at this image size: sCT and consistency models, and the largest of them.
PUBLISHED = (179e6, 1.02e9)


@dataclass(frozen=True)
class Fit:
    """The power law ``q = exp(intercept) images^slope``.

    Attributes:
        error: standard error of the slope.
        spread: standard deviation of log q around the line.
    """

    slope: float
    intercept: float
    error: float
    spread: float

    def at(self, images: float) -> float:
        """Return the quality at a number of images."""
        return math.exp(self.intercept + self.slope * math.log(images))


def fitted(images: Sequence[float], quality: Sequence[float]) -> Fit:
    """Fit by least squares in logarithms; at least three points, all above zero."""
    x, y = np.log(images), np.log(quality)
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - slope * x - intercept
    spread = math.sqrt(float(rest @ rest) / (len(x) - 2))
    error = spread / math.sqrt(float(((x - x.mean()) ** 2).sum()))
    return Fit(float(slope), float(intercept), error, spread)


def fits(size: dict[str, Any]) -> dict[str, Fit | None]:
    """Fit all curves of one size; None with too few points or a point that is not above its floor."""
    found: dict[str, Fit | None] = {}
    for n in CALLS:
        for quantity in ("endpoint", "frechet"):
            # The limit of the endpoint error is zero.
            floor = size["teacher_frechet"] if quantity == "frechet" else 0.0
            images = [point["images_seen"] for point in size["points"]]
            above = [point["rows"][str(n)][quantity] - floor for point in size["points"]]
            enough = len(above) > 2 and min(above) > 0
            found[f"{quantity}, {n}"] = fitted(images, above) if enough else None
    return found


class Size:
    """One teacher and its students of several numbers of steps, in ``work/scaling``."""

    def __init__(self, teacher: Path, work: Path, data: Path, budget: Budget) -> None:
        self.folder, self.work, self.data, self.budget = teacher, work, data, budget
        self.title = teacher.name
        self.output = work / "scaling" / self.title
        (self.output / "rows").mkdir(parents=True, exist_ok=True)

    def missing(self, lengths: Sequence[int]) -> list[int]:
        """Return the numbers of steps that are not measured yet."""
        return [steps for steps in lengths if not (self.output / "rows" / f"{steps}.json").is_file()]

    def train(self, processes: Processes, steps: int) -> str:
        """Start to train a student, and return its name."""
        recipe = recipe_of(METHOD, self.folder, self.data, self.budget, steps, 0)
        file = self.output / f"{steps}.yaml"
        write_text(file, recipe.to_yaml())
        name = f"{self.title}-{steps}"
        processes.start_distilling(name, file, self.output / str(steps))
        return name

    def measure(self, judge: Judge, lengths: Sequence[int]) -> None:
        """Measure the finished students."""
        for steps in self.missing(lengths):
            rows, _ = judge.student(load_student(self.output / str(steps) / "student").flow_map, CALLS)
            log = [
                json.loads(line) for line in (self.output / str(steps) / "steps.jsonl").read_text("utf-8").splitlines()
            ]
            found: dict[str, Any] = {"steps": steps, "images_seen": steps * self.budget.batch, "rows": rows}
            found["images_per_second"] = statistics.median(line["images_per_second"] for line in log)
            found["peak_memory_gib"] = max(line["peak_memory_gib"] for line in log)
            write_text(self.output / "rows" / f"{steps}.json", json.dumps(found))
            print(f"{self.title}, {steps} steps: {shown(rows)}", flush=True)

    def run(self, lengths: Sequence[int], processes: Processes) -> dict[str, Any]:
        """Train and measure missing students, and return all results of this size."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        teacher, about = load_teacher(str(self.folder)), self.output / "teacher.json"
        # The longest first: with the short ones last, no process runs alone for long.
        waiting = sorted((n for n in self.missing(lengths) if not self._is_trained(n)), reverse=True)
        while waiting or processes.running:
            while waiting and len(processes.running) < self.budget.parallel:
                self.train(processes, waiting.pop(0))
            processes.wait_for_one()
        if self.missing(lengths) or not about.is_file():
            judge = open_judge(teacher, self.work, self.budget, device, self.output)
            if not about.is_file():
                rows, _ = judge.solver("ddim", (1, 50))
                write_text(about, json.dumps({"rows": rows, "protocol": judge.protocol}))
            self.measure(judge, [n for n in lengths if self._is_trained(n)])
        measured = read(about)
        points = [read(self.output / "rows" / f"{n}.json") for n in sorted(lengths)]
        found: dict[str, Any] = {"parameters": sum(p.numel() for p in teacher.network.parameters())}
        found |= {
            "flops": flops(teacher),
            "teacher_frechet": measured["rows"]["50"]["frechet"],
            "protocol": measured["protocol"],
        }
        found |= {"training": read_if_there(self.folder / "training.json"), "points": points}
        return found | {"fits": {name: fit and asdict(fit) for name, fit in fits(found).items()}}

    def _is_trained(self, steps: int) -> bool:
        return (self.output / str(steps) / "student" / "model_index.json").is_file()


def shown(rows: dict[str, dict[str, float]]) -> str:
    """Return both quantities at every number of calls, for the log."""
    return ", ".join(f"{n}: {row['frechet']:.3g} {row['endpoint']:.3f}" for n, row in rows.items())


@torch.no_grad()
def flops(teacher: Teacher) -> int:
    """Return the operations of one call on one sample."""
    with FlopCounterMode(display=False) as counter:
        teacher.network.cpu()(torch.zeros(1, *teacher.event_shape), torch.zeros(1))
    return int(counter.get_total_flops())


def table(results: dict[str, Any]) -> str:
    """Return the points and the fits as Markdown."""
    lines = ["| teacher | images seen | images per second | GiB | " + " | ".join(f"{n}" for n in CALLS) + " |"]
    lines.append("|---|---:|---:|---:|" + "---:|" * len(CALLS))
    for title, size in results["sizes"].items():
        for point in size["points"]:
            cells = [f"{row['frechet']:.3g}, {row['endpoint']:.3f}" for row in point["rows"].values()]
            cost = f"{point['images_per_second']:.0f} | {point['peak_memory_gib']:.2f}"
            lines.append(f"| {title} | {point['images_seen']:,} | {cost} | " + " | ".join(cells) + " |")
    lines += ["", "| teacher | curve | slope | " + " | ".join(f"at {n:.3g} images" for n in PUBLISHED) + " |"]
    lines.append("|---|---|---:|" + "---:|" * len(PUBLISHED))
    for title, size in results["sizes"].items():
        for name, values_of_fit in size["fits"].items():
            if values_of_fit is None:
                lines.append(
                    f"| {title} | {name} calls | no power law: a point is at its floor |" + " |" * len(PUBLISHED)
                )
                continue
            fit, floor = Fit(**values_of_fit), size["teacher_frechet"] if name.startswith("frechet") else 0.0
            values = " | ".join(f"{fit.at(n) + floor:.3g}" for n in PUBLISHED)
            lines.append(f"| {title} | {name} calls | {fit.slope:.2f} ± {fit.error:.2f} | {values} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot both quantities against images seen, with dashed fits up to the published budgets."""
    figure = Figure(figsize=(11, 4.4), dpi=130)
    panels = figure.subplots(1, 2)
    for axis, quantity in zip(panels, ("endpoint", "frechet"), strict=True):
        for i, size in enumerate(results["sizes"].values()):
            floor = size["teacher_frechet"] if quantity == "frechet" else 0.0
            images = [point["images_seen"] for point in size["points"]]
            for n, color in zip(CALLS, COLORS, strict=False):
                values = [point["rows"][str(n)][quantity] - floor for point in size["points"]]
                label = f"{size['parameters'] / 1e6:.1f}M, {n} call{'s' * (n > 1)}"
                axis.plot(images, values, "os"[i % 2], color=color, label=label, fillstyle=("full", "none")[i % 2])
                fit = size["fits"][f"{quantity}, {n}"]
                if fit:
                    ends = [min(images), PUBLISHED[-1]]
                    axis.plot(ends, [Fit(**fit).at(x) for x in ends], ("--", ":")[i % 2], color=color, linewidth=1)
        for budget in PUBLISHED:
            axis.axvline(budget, color="gray", linewidth=0.6)
        axis.set(xscale="log", yscale="log", xlabel="images seen (gray: published budgets)")
        axis.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("endpoint error (RMS)")
    panels[1].set_ylabel("Fréchet distance above the teacher's")
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="of experiments.cifar10: images and classifier")
    parser.add_argument("--teachers", type=Path, nargs="+", required=True, help="trained on the same images")
    parser.add_argument("--data", type=Path, default=Path(), help="unused: students start from noise alone")
    parser.add_argument("--budget", choices=list(BUDGETS), default="gpu", help="batch, learning rate and measurement")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="steps of the students")
    parser.add_argument("--output", type=Path, default=Path("cifar10-scaling.json"), help="the plot is next to it")
    given = parser.parse_args(arguments)
    processes, sizes = Processes(given.work.resolve() / "logs", BUDGETS[given.budget].parallel), {}
    try:
        for teacher in given.teachers:
            size = Size(teacher.resolve(), given.work.resolve(), given.data, BUDGETS[given.budget])
            sizes[size.title] = size.run(given.lengths, processes)
    finally:
        processes.stop()
    results = {"budget": asdict(BUDGETS[given.budget]), "machine": machine(), "sizes": sizes}
    write_text(given.output, json.dumps(results, indent=1) + "\n")
    plot(results, given.output.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
