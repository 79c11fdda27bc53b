"""Both kinds of students on one teacher: endpoint error and Fréchet distance against the number of network calls.

    python -m experiments.kinds --work runs/kinds --output kinds.json --steps 500 --seeds 0 1

A case is a list of changes of a recipe, as ``fmm-distill --set`` takes them. Each case is trained by the package's own
trainer, and measured by its evaluation. Each finished row is written at once: the same command resumes, and ``--only``
adds cases to the same JSON. ``--render`` prints the tables of such a JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from fmm_distill.config.recipe import load_recipe
from fmm_distill.evaluation.evaluator import EvaluationSpec, Evaluator
from fmm_distill.io.files import write_text
from fmm_distill.run.plan import open_reference, open_teacher, plan
from fmm_distill.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.evaluation.result import Row
    from fmm_distill.student.student import Student

__all__ = ["CASES", "Comparison", "markdown", "read"]

CALLS = (1, 2, 4, 8, 16, 32)
QUANTITIES = {"endpoint_error": "Endpoint error", "frechet": "Fréchet distance"}
SOLVERS = {"teacher-ddim": "teacher, DDIM", "teacher-dpmsolver++": "teacher, DPM-Solver++"}

EMBEDDED, SCALED = ["student.kind=embedded"], ["student.kind=scaled"]
# Trains the velocity, which an embedded student has to learn and a scaled one has.
VELOCITY = "extra_losses=[{loss: {name: flow_matching}, fraction: 0.5, time_sampling: {prior: 0, data: 1}}]"
EULERIAN = ["loss={name: eulerian, step: 0.1}"]
PROGRESSIVE = ["loss={name: progressive, target: average}"]
CONSISTENCY = ["loss={name: consistency, step: 0.05, solver: heun}", "time_sampling={prior: 0, data: 1}"]

CASES: dict[str, list[str]] = {
    "embedded": EMBEDDED,
    "scaled": SCALED,
    "scaled, 8 groups": [*SCALED, "time_sampling.groups=8"],
    "scaled, 16 groups": [*SCALED, "time_sampling.groups=16"],
    "scaled, rank 64": [*SCALED, "student.lora.rank=64"],
    "scaled, rank 16": [*SCALED, "student.lora.rank=16"],
    "embedded, eulerian": [*EMBEDDED, *EULERIAN],
    "scaled, eulerian": [*SCALED, *EULERIAN],
    "embedded, progressive": [*EMBEDDED, *PROGRESSIVE, VELOCITY],
    "scaled, progressive": [*SCALED, *PROGRESSIVE],
    "embedded, consistency": [*EMBEDDED, *CONSISTENCY, VELOCITY],
    "scaled, consistency": [*SCALED, *CONSISTENCY],
    "embedded, lr 5e-4": [*EMBEDDED, "optimizer.lr=0.0005"],
    "scaled, lr 5e-4": [*SCALED, "optimizer.lr=0.0005"],
    "scaled, lr 2e-3": [*SCALED, "optimizer.lr=0.002"],
    "scaled, weight 0.5": [*SCALED, "weight.power=0.5"],
    "scaled, prior 0.25": [*SCALED, "time_sampling.prior=0.25"],
    "scaled, prior 0.75": [*SCALED, "time_sampling.prior=0.75"],
}


class Comparison:
    """The rows of one teacher and its students, in a JSON file that grows.

    Args:
        recipe: the name of the recipe that all cases change.
        changes: changes that all cases have in common, the steps included.
        work: a folder for checkpoints.
    """

    def __init__(self, recipe: str, teacher: str, changes: Sequence[str], work: Path, output: Path) -> None:
        self.recipe, self.teacher, self.work, self.output = recipe, teacher, work, output
        rows = ", ".join(map(str, CALLS))
        # The maps alone: the second stage has a comparison of its own, experiments/matching.
        self.changes = [*changes, "matching=null", "training.checkpoint_every=100000", "export.steps=[]"]
        self.changes += [f"evaluation.{name}=[{rows}]" for name in ("steps", "ddim_steps", "dpmsolver_steps")]
        about = {"recipe": recipe, "changes": list(changes)}
        self.results: dict[str, Any] = {"about": about, "protocol": {}, "teacher": {}, "students": {}}
        if output.is_file():
            self.results = read(output)
            if self.results["about"] != about:
                sys.exit(f"{output} has other settings: choose another --output or remove it")
        self.evaluator: Evaluator | None = None

    def run(self, names: Sequence[str], seeds: Sequence[int]) -> None:
        """Measure the teacher and the cases that have no rows yet, in the order of their names, seed by seed."""
        if not self.results["teacher"]:
            evaluator = self._opened()
            self._save("teacher", _by_sampler(evaluator.rows_of_teacher()))
        for seed in seeds:
            for name in names:
                if str(seed) not in self.results["students"].get(name, {}).get("seeds", {}):
                    self._student(name, seed)

    def recipe_of(self, name: str, seed: int) -> Recipe:
        """Return the recipe of a case."""
        changes = [*self.changes, f"training.seed={seed}", *CASES[name]]
        return load_recipe(self.recipe, changes, teacher=self.teacher)

    def _opened(self) -> Evaluator:
        """Return the evaluator of all rows, which solves the teacher's ODE once."""
        if self.evaluator is None:
            recipe = self.recipe_of(next(iter(CASES)), 0)
            teacher = open_teacher(recipe)
            images = open_reference(recipe, teacher, None) if recipe.evaluation.features != "none" else None
            self.evaluator = Evaluator(EvaluationSpec(teacher, recipe.evaluation, images, torch.device("cpu")))
            self._save("protocol", self.evaluator.protocol)
        return self.evaluator

    def _save(self, key: str, value: object) -> None:
        self.results[key] = value
        write_text(self.output, json.dumps(self.results, indent=1))

    def _student(self, name: str, seed: int) -> None:
        recipe, evaluator = self.recipe_of(name, seed), self._opened()
        folder = self.work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        student, trained = train(recipe, folder)
        rows = _by_sampler(evaluator.rows_of_students({"student": student}))["student"]
        students = self.results["students"]
        case = students.setdefault(name, {"changes": CASES[name], "seeds": {}})
        case["seeds"][str(seed)] = trained | {"rows": rows}
        self._save("students", students)
        print(f"{name}, seed {seed}: {_line(rows, 'endpoint_error')} | {_line(rows, 'frechet')}", flush=True)


def train(recipe: Recipe, folder: Path) -> tuple[Student, dict[str, Any]]:
    """Train the student of a recipe, and return its average with the number of its trained parameters and its cost."""
    job = plan(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    resumed = any((folder / "checkpoints").glob("step-*"))
    count = sum(parameter.numel() for parameter in job.student.parameters() if parameter.requires_grad)
    trainer = Trainer(job.student, job.teacher, recipe, job.images, folder, Accelerator(cpu=True))
    started = time.process_time()
    trainer.run()
    # A resumed run has taken unknown seconds before.
    seconds = None if resumed else time.process_time() - started
    student: Any = trainer.averaged_student(recipe.training.ema[0])
    return student, {"parameters": count, "cpu_seconds": seconds}


def _by_sampler(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return the quantities of rows and their standard errors, by sampler and number of calls."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        names = ("endpoint_error", "frechet", "precision", "recall", "errors")
        values = {name: getattr(row, name) for name in names if getattr(row, name) is not None}
        found.setdefault(row.sampler, {})[str(row.steps)] = values
    return found


def _line(rows: dict[str, Any], quantity: str) -> str:
    return " ".join(f"{row[quantity]:.3f}" for row in rows.values() if quantity in row)


def markdown(results: dict[str, Any]) -> str:
    """Return a table of each quantity, and one of parameters and seconds; of several results, one after the other."""
    if "students" not in results:
        return "\n".join(f"{name}\n\n{markdown(part)}" for name, part in results.items())
    lines: list[str] = []
    for quantity, title in QUANTITIES.items():
        samplers = [*_samplers(results, quantity)]
        if samplers:
            head = " | ".join(map(str, CALLS))
            lines += [f"{title}:", "", f"| sampler | {head} |", "|---|" + "---:|" * len(CALLS), *samplers, ""]
    lines += ["| student | trained parameters | CPU seconds | seeds |", "|---|---:|---:|---:|"]
    for name, case in _in_order(results["students"]).items():
        runs = list(case["seeds"].values())
        seconds = [run["cpu_seconds"] for run in runs if run["cpu_seconds"] is not None]
        mean = f"{statistics.mean(seconds):.0f}" if seconds else ""
        lines.append(f"| {name} | {runs[0]['parameters']:,} | {mean} | {len(runs)} |")
    return "\n".join([*lines, ""])


def _in_order(students: dict[str, Any]) -> dict[str, Any]:
    names = [*(name for name in CASES if name in students), *(name for name in students if name not in CASES)]
    return {name: students[name] for name in names}


def _samplers(results: dict[str, Any], quantity: str) -> Iterator[str]:
    """Yield a row per sampler: the mean over the seeds and, of several, its standard error."""
    samplers = {SOLVERS[name]: [rows] for name, rows in results["teacher"].items()}
    students = _in_order(results["students"])
    samplers |= {name: [run["rows"] for run in case["seeds"].values()] for name, case in students.items()}
    for name, runs in samplers.items():
        cells = []
        for n in map(str, CALLS):
            values = [rows[n][quantity] for rows in runs if quantity in rows[n]]
            if not values:
                break
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            digits = ".3f" if values[0] < 10 else ".3g"
            cells.append(f"{statistics.mean(values):{digits}}" + ("" if error is None else f" ± {error:.3f}"))
        if cells:
            yield f"| {name} | " + " | ".join(cells) + " |"


def read(path: Path) -> dict[str, Any]:
    """Return the results of a file."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def main() -> None:
    logging.basicConfig(level="WARNING", format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="builtin:digits", help="a folder or builtin:digits")
    parser.add_argument("--recipe", default="digits", help="the recipe that all cases change")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="a change of all cases")
    parser.add_argument("--steps", type=int, default=500, help="steps of every student")
    parser.add_argument("--work", type=Path, default=Path("runs/kinds"), help="folder of checkpoints")
    parser.add_argument("--output", type=Path, default=Path("kinds.json"))
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="only these cases")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--render", type=Path, metavar="JSON", help="print the tables of a JSON, and stop")
    options = parser.parse_args()
    if options.render is not None:
        print(markdown(read(options.render)))
        return
    changes = [*options.changes, f"training.steps={options.steps}"]
    comparison = Comparison(options.recipe, options.teacher, changes, options.work, options.output)
    comparison.run(options.only, options.seeds)
    print(markdown(comparison.results))


if __name__ == "__main__":
    main()
