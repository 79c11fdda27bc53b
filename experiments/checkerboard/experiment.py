"""The runs of the checkerboard experiment: training, measurement, and all results."""

from __future__ import annotations

import copy
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from experiments.checkerboard.report import plot_curves, plot_densities
from experiments.plane import Board, Perceptron, PlaneTeacher, closed_form, divergence, endpoint_error, sample, solved
from fmm_distill.config.recipe import Recipe, load_recipe, parse
from fmm_distill.core.flow_map import LearnedFlowMap, diagonal
from fmm_distill.core.time_axis import LinearClock
from fmm_distill.io.files import write_text
from fmm_distill.training import checkpoint
from fmm_distill.training.trainer import Trainer, TrainingDivergedError

if TYPE_CHECKING:
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap

STEPS = (1, 2, 4, 8, 16)
BINS = (50, 48)
CURVE_STEPS = (1, 4)
NOISE_SEED = 2026
TEACHER_RATE = 3e-3
NETWORK_OPERATIONS = ("aten::addmm", "aten::mm", "aten::gelu", "aten::gelu_backward")
UNIFORM = {"prior": 0, "data": 1}
# Trains the velocity, for losses that alone train it at no time or not at every time.
VELOCITY = {"loss": {"name": "flow_matching"}, "fraction": 0.5, "time_sampling": UNIFORM}
# A weight that depends on the loss of a sample biases the conditional mean, which losses from data estimate.
FROM_DATA = {"weight": {"kind": "none"}}

METHODS: dict[str, dict[str, Any]] = {
    "lagrangian": {"loss": {"name": "lagrangian"}},
    "lagrangian-target": {"loss": {"name": "lagrangian", "stop_gradient": "target"}},
    "lagrangian-none": {"loss": {"name": "lagrangian", "stop_gradient": "nowhere"}},
    "lagrangian-self": {"loss": {"name": "lagrangian", "velocity": "self"}, "extra_losses": [VELOCITY]},
    "eulerian": {"loss": {"name": "eulerian"}},
    "progressive-half": {"loss": {"name": "progressive"}, "extra_losses": [VELOCITY]},
    "progressive-uniform": {"loss": {"name": "progressive", "middle": "uniform"}, "extra_losses": [VELOCITY]},
    "progressive_distillation": {
        "loss": {"name": "progressive_distillation"},
        "extra_losses": [VELOCITY],
        "time_sampling": {"dyadic": 4, "prior": 0},
    },
    "consistency": {"loss": {"name": "consistency"}, "extra_losses": [VELOCITY], "time_sampling": UNIFORM},
    "consistency_trajectory": {"loss": {"name": "consistency_trajectory"}, "extra_losses": [VELOCITY]},
    "operator_regression": {
        "loss": {"name": "operator_regression", "solver_steps": 4},
        "extra_losses": [VELOCITY],
        "time_sampling": {"prior": 1},
    },
    "mean_flow": FROM_DATA | {"loss": {"name": "mean_flow"}},
    "flow_map_matching": FROM_DATA | {"loss": {"name": "flow_map_matching"}},
    "terminal_velocity": FROM_DATA | {"loss": {"name": "terminal_velocity"}},
    "flow_matching": FROM_DATA | {"loss": {"name": "flow_matching", "velocity": "data"}, "time_sampling": UNIFORM},
}


@dataclass(frozen=True)
class Budget:
    """Sizes and durations of all runs.

    Attributes:
        width: units in each of the four hidden layers.
        teacher_steps, steps: optimizer steps of the teacher and of each student.
        long_steps: of the one long Lagrangian run; a quarter with the closed-form teacher.
        seeds: the number of students of each loss.
        solver_steps: Heun steps of the teacher's ODE, the reference.
        points: samples in a histogram.
        curve: the number of measurements during a long run.
    """

    width: int = 512
    teacher_steps: int = 5000
    steps: int = 300
    long_steps: int = 7000
    seeds: int = 3
    solver_steps: int = 200
    points: int = 64_000
    curve: int = 7


QUICK = Budget(width=128, teacher_steps=1500, steps=200, long_steps=1200, seeds=2, solver_steps=50)


def recipe_for(changes: dict[str, Any], steps: int, seed: int, curve: int) -> Recipe:
    """Return the checkerboard recipe with changes in some of its groups."""
    base = load_recipe("checkerboard").model_dump(mode="json", exclude_unset=True)
    training = base["training"] | {"steps": steps, "seed": seed}
    training |= {"checkpoint_every": max(steps // curve, 1), "checkpoints_total_limit": curve + 1}
    times = base.get("time_sampling", {}) | changes.get("time_sampling", {})
    return parse(base | changes | {"training": training, "time_sampling": times}, "checkerboard")


def save_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the settings of a run into its folder, or exit if the folder has a run with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    if file.is_file() and file.read_text(encoding="utf-8") != recipe.to_yaml():
        sys.exit(f"{folder} has a run with other settings: remove it or choose another --output")
    write_text(file, recipe.to_yaml())


def train(student: Perceptron, teacher: PlaneTeacher, recipe: Recipe, folder: Path) -> None:
    """Train to the last step, from the newest checkpoint in ``folder``."""
    Trainer(student, teacher, recipe, Board(), folder, Accelerator(cpu=True)).run()


def speed(folder: Path, recipe: Recipe) -> dict[str, float]:
    """Return the total seconds of the steps of a run and the median samples per second."""
    records = [json.loads(line) for line in (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [record["images_per_second"] for record in records]
    seconds = sum(recipe.training.batch_size / rate for rate in rates)
    return {"seconds": seconds, "samples_per_second": statistics.median(rates)}


def averages(folder: Path, width: int, rate: float) -> dict[int, Perceptron]:
    """Return the averaged student of a rate at each checkpoint, by its step."""
    students = {}
    for path in checkpoint.complete(folder / "checkpoints"):
        state = checkpoint.load(path)
        student = Perceptron(0, width=width).requires_grad_(False)
        ema = state.tensors[checkpoint.average_name(rate)].items()
        student.load_state_dict({key: value for key, value in ema if key != "n_averaged"})
        students[state.step] = student
    return students


def measure(
    student: FlowMap | None, noise: Tensor, ends: Tensor, steps: tuple[int, ...]
) -> dict[str, dict[int, float]]:
    """Return KL divergences and endpoint errors at numbers of steps; without a student those of lost samples."""
    lost = torch.full_like(noise, torch.inf)
    points = {n: lost if student is None else sample(student, noise, n) for n in steps}
    found = {f"kl_{bins}": {n: divergence(x, bins) for n, x in points.items()} for bins in BINS}
    found["endpoint"] = {n: endpoint_error(x, ends) for n, x in points.items()}
    return found


@dataclass(frozen=True)
class Run:
    """Settings of one student."""

    changes: dict[str, Any]
    steps: int
    seed: int = 0
    curve: int = 1


class Experiment:
    """All runs of one budget, each with its result in its folder."""

    def __init__(self, budget: Budget, folder: Path) -> None:
        self.budget, self.folder = budget, folder
        self.noise = torch.randn(budget.points, 2, generator=torch.Generator().manual_seed(NOISE_SEED))

    def teacher(self) -> tuple[Perceptron, dict[str, Any]]:
        """Return the trained teacher and the results of its solver."""
        folder = self.folder / "teacher"
        recipe = recipe_for(METHODS["flow_matching"], self.budget.teacher_steps, 0, 1)
        training = recipe.training.model_copy(update={"ema": (0.995,)})
        optimizer = recipe.optimizer.model_copy(update={"lr": TEACHER_RATE})
        recipe = recipe.model_copy(update={"training": training, "optimizer": optimizer})
        # Only prior and times of the closed form are used: the velocity comes from data.
        network = Perceptron(0, width=self.budget.width)
        save_recipe(recipe, folder)
        train(network, PlaneTeacher(closed_form().velocity, LinearClock()), recipe, folder)
        network = averages(folder, self.budget.width, 0.995)[self.budget.teacher_steps]
        found = self.reference("teacher", PlaneTeacher(diagonal(network), LinearClock()))
        return network, speed(folder, recipe) | found

    def reference(self, name: str, teacher: PlaneTeacher) -> dict[str, Any]:
        """Return the converged endpoints of a teacher, cached in a file, and their divergences."""
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            save_file({"ends": solved(teacher, self.noise, self.budget.solver_steps)}, file)
        ends = load_file(file)["ends"]
        return {"ends": ends} | {f"kl_{bins}": divergence(ends, bins) for bins in BINS}

    def student(self, name: str, run: Run, network: Perceptron, teacher: PlaneTeacher, ends: Tensor) -> dict[str, Any]:
        """Return the results of a student, which is trained and measured unless its file exists."""
        folder = self.folder / name
        recipe = recipe_for(run.changes, run.steps, run.seed, run.curve)
        save_recipe(recipe, folder)
        if (folder / "result.json").is_file():
            return _read(folder / "result.json")
        try:
            train(copy.deepcopy(network).requires_grad_(), teacher, recipe, folder)
        except TrainingDivergedError as error:
            print(f"{name}: {error}")
        students = averages(folder, self.budget.width, recipe.training.ema[0])
        last = students.get(run.steps)
        found: dict[str, Any] = speed(folder, recipe) | measure(last, self.noise, ends, STEPS)
        batch = recipe.training.batch_size
        if run.curve > 1:
            found["curve"] = [
                {"samples": step * batch} | measure(student, self.noise, ends, CURVE_STEPS)
                for step, student in students.items()
            ]
        if last is not None:
            save_file(last.state_dict(), folder / "average.safetensors")
        write_text(folder / "result.json", json.dumps(found | {"samples": run.steps * batch}))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return _read(folder / "result.json")

    def finished(self, name: str) -> Perceptron:
        """Return the averaged student of a finished run."""
        student = Perceptron(0, width=self.budget.width).requires_grad_(False)
        student.load_state_dict(load_file(self.folder / name / "average.safetensors"))
        return student


def outside(changes: dict[str, Any], network: Perceptron, teacher: PlaneTeacher, steps: int = 20) -> float:
    """Return the fraction of the time of training steps outside the networks' matrix products and activations."""
    recipe = recipe_for(changes, steps, 0, 1)
    student = copy.deepcopy(network).requires_grad_()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(student, teacher, recipe, Board(), Path(folder), Accelerator(cpu=True))
        with profile(activities=[ProfilerActivity.CPU]) as record:
            started = time.perf_counter()
            trainer.run()
            seconds = time.perf_counter() - started
    inside = sum(event.self_cpu_time_total for event in record.key_averages() if event.key in NETWORK_OPERATIONS)
    return 1 - inside / 1e6 / seconds


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def run_experiment(budget: Budget, folder: Path, names: list[str]) -> dict[str, Any]:
    """Run what is missing and return all results."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "budget.json"
    if written.is_file() and _read(written) != asdict(budget):
        sys.exit(f"{folder} has runs of another budget ({_read(written)}): choose another --output or remove it")
    write_text(written, json.dumps(asdict(budget)))
    bench = Experiment(budget, folder)
    network, about = bench.teacher()
    teacher = PlaneTeacher(diagonal(network), LinearClock())
    ends = about.pop("ends")
    # The long run first: it has the most important result if the command is interrupted.
    long = Run(METHODS["lagrangian"], budget.long_steps, curve=budget.curve)
    results: dict[str, Any] = {
        "budget": asdict(budget),
        "machine": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "steps": STEPS,
        "batch_size": load_recipe("checkerboard").training.batch_size,
        "teacher": about | {"euler": measure(Euler(network), bench.noise, ends, STEPS)},
        "long": bench.student("long", long, network, teacher, ends) | {"teacher": about},
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(budget.seeds):
        for name in names:
            run = Run(METHODS[name], budget.steps, seed)
            runs[name].append(bench.student(f"{name}-{seed}", run, network, teacher, ends))
            print(f"{name}, seed {seed}: KL at {STEPS}: {[round(v, 3) for v in runs[name][-1]['kl_50'].values()]}")
    exact = bench.reference("exact", closed_form())
    true_ends = exact.pop("ends")
    short = Run(METHODS["lagrangian"], budget.long_steps // 4, curve=budget.curve)
    results["exact"] = bench.student("exact-teacher", short, network, closed_form(), true_ends) | {"teacher": exact}
    results["runs"] = runs
    results["outside"] = {name: outside(METHODS[name], network, teacher) for name in names}
    # As read from a file: numbers of steps are text.
    plain: dict[str, Any] = json.loads(json.dumps(results))
    return plain


class Euler(LearnedFlowMap):
    """The teacher's velocity as a flow map: one Euler step per jump."""

    def __init__(self, network: Perceptron) -> None:
        super().__init__()
        self.network, self.clock, self.t_max = network, network.clock, network.t_max

    def mean_velocity_of_jump(self, x: Tensor, t: Tensor, h: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return the velocity at the start of the jump."""
        return self.network.mean_velocity_of_jump(x, t, torch.zeros_like(h), cond)


def pictures(results: dict[str, Any], folder: Path) -> None:
    """Plot the densities of every method and the curves of the long runs."""
    bench = Experiment(Budget(**results["budget"]), folder)
    network, about = bench.teacher()
    n = bench.budget.solver_steps
    rows = {
        "teacher": {f"{n} Heun steps": about["ends"]}
        | {f"{n} Euler": sample(Euler(network), bench.noise, n) for n in STEPS[:-1]}
    }
    names = {"long run": "long"} | {name: f"{name}-0" for name in results["runs"]}
    for title, name in names.items():
        if not (folder / name / "average.safetensors").is_file():
            print(f"{name} diverged and is not in the plot")
            continue
        student = bench.finished(name)
        rows[title] = {f"{n} step{'s' * (n > 1)}": sample(student, bench.noise, n) for n in STEPS}
    plot_densities(rows, folder / "checkerboard.png")
    curves = {"lagrangian, long run": results["long"], "the same, closed-form teacher": results["exact"]}
    plot_curves(
        {name: run["curve"] for name, run in curves.items()},
        {name: run["teacher"]["kl_50"] for name, run in curves.items()},
        folder / "checkerboard-curve.png",
    )
