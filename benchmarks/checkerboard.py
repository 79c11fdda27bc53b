"""Every loss on the checkerboard: one teacher, one network, the same samples seen; KL divergence and endpoint error.

    python -m benchmarks.checkerboard --output runs/checkerboard

Trains the teacher by flow matching, then a student by each loss and seed with the package's own trainer, measures each
and writes ``checkerboard.md``, ``checkerboard.json`` and ``checkerboard.png``. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from benchmarks.plane import Board, Perceptron, PlaneTeacher
from fmm_distill import checkpoint
from fmm_distill.recipe import Recipe, load_recipe, parse
from fmm_distill.trainer import Trainer

STEPS = (1, 2, 4, 8, 16)
BINS = (50, 48)
NOISE_SEED = 2026
UNIFORM = {"prior": 0, "data": 1}
# The velocity, for a loss that alone teaches the student none or not at every time.
BESIDE = {"loss": {"name": "flow_matching"}, "share": 0.5, "pairs": UNIFORM}

METHODS: dict[str, dict[str, Any]] = {
    "lagrangian": {"loss": {"name": "lagrangian", "stop": "target"}},
    "lagrangian-teacher": {"loss": {"name": "lagrangian", "stop": "teacher"}},
    "lagrangian-none": {"loss": {"name": "lagrangian", "stop": "none"}},
    "lagrangian-self": {"loss": {"name": "lagrangian", "velocity": "self"}, "also": [BESIDE]},
    "eulerian": {"loss": {"name": "eulerian"}},
    "eulerian-none": {"loss": {"name": "eulerian", "stop": "none"}},
    "progressive-half": {"loss": {"name": "progressive"}, "also": [BESIDE]},
    "progressive-uniform": {"loss": {"name": "progressive", "middle": "uniform"}, "also": [BESIDE]},
    "progressive_distillation": {
        "loss": {"name": "progressive_distillation"},
        "also": [BESIDE],
        "pairs": {"dyadic": 4, "prior": 0},
    },
    "consistency": {"loss": {"name": "consistency"}, "also": [BESIDE], "pairs": UNIFORM},
    "consistency_trajectory": {"loss": {"name": "consistency_trajectory"}, "also": [BESIDE]},
    "operator_regression": {
        "loss": {"name": "operator_regression", "solver_steps": 4},
        "also": [BESIDE],
        "pairs": {"prior": 1},
    },
    "mean_flow": {"loss": {"name": "mean_flow"}},
    "flow_map_matching": {"loss": {"name": "flow_map_matching"}},
    "terminal_velocity": {"loss": {"name": "terminal_velocity"}},
    "flow_matching": {"loss": {"name": "flow_matching"}, "pairs": UNIFORM},
}


@dataclass(frozen=True)
class Budget:
    """How much of everything.

    Attributes:
        width: units in each of the four hidden layers.
        teacher_steps, steps: optimiser steps of the teacher and of each student.
        long_steps: of the one long Lagrangian run, and of the one with the closed-form teacher.
        seeds: students of each loss.
        solver_steps: Heun steps of the teacher's ODE, the reference.
        points: samples in a histogram.
        curve: how many times a student is measured on its way.
    """

    width: int = 512
    teacher_steps: int = 6000
    steps: int = 1000
    long_steps: int = 8000
    seeds: int = 3
    solver_steps: int = 200
    points: int = 64_000
    curve: int = 4


QUICK = Budget(width=128, teacher_steps=1500, steps=300, long_steps=1200, seeds=1, solver_steps=50)


def recipe_for(changes: dict[str, Any], steps: int, seed: int, curve: int) -> Recipe:
    """The checkerboard recipe with other settings in some of its groups."""
    base = load_recipe("checkerboard").model_dump(mode="json", exclude_unset=True)
    training = base["training"] | {"steps": steps, "seed": seed}
    training |= {"checkpoint_every": max(steps // curve, 1), "keep_checkpoints": curve + 1}
    pairs = base.get("pairs", {}) | changes.get("pairs", {})
    return parse(base | changes | {"training": training, "pairs": pairs}, "checkerboard")


def train(student: Perceptron, teacher: PlaneTeacher, recipe: Recipe, folder: Path) -> dict[str, float]:
    """Train to the last step, from the newest checkpoint in ``folder``; gives the time that the steps took."""
    folder.mkdir(parents=True, exist_ok=True)
    Trainer(student, teacher, recipe, Board(), folder, Accelerator(cpu=True), print).run()
    records = [json.loads(line) for line in (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [record["images_per_second"] for record in records]
    seconds = sum(recipe.training.batch_size / rate for rate in rates)
    return {"seconds": seconds, "samples_per_second": statistics.median(rates)}


def averages(folder: Path, width: int) -> dict[int, Perceptron]:
    """The averaged student at each checkpoint, by its step."""
    students = {}
    for path in sorted((folder / "checkpoints").glob("step-*")):
        kept = checkpoint.load(path)
        student = Perceptron(0, width=width).requires_grad_(False)
        ema = kept.tensors["ema"].items()
        student.load_state_dict({key.removeprefix("module."): value for key, value in ema if key != "n_averaged"})
        students[kept.step] = student
    return students


def measure(student: Perceptron, noise: Tensor, ends: Tensor, steps: tuple[int, ...]) -> dict[str, dict[int, float]]:
    """KL divergences and the endpoint error (root mean square, in data's standard deviations) at numbers of steps."""
    points = {n: sample(student, noise, n) for n in steps}
    found = {f"kl_{bins}": {n: divergence(x, bins) for n, x in points.items()} for bins in BINS}
    found["endpoint"] = {n: (x - ends).square().mean().sqrt().item() for n, x in points.items()}
    return found
