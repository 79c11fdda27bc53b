"""Compare DDIM samples of a student that changes its prediction type with those of its teacher, after the regression.

    python examples/train_digits_teacher.py --prediction epsilon --output epsilon-digits
    python -m experiments.prediction epsilon-digits --set student.regression_steps=100

The recipe is ``digits``; the cosine decay of its learning rate ends with the regression. Samples are those of the stock
solver from the same noise.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler

from fmm_distill.config.recipe import load_recipe
from fmm_distill.core.draws import draw
from fmm_distill.data.starting_points import StartingPoints, teacher_jump
from fmm_distill.run.plan import plan
from fmm_distill.student.fold import stock_part
from fmm_distill.training.trainer import Trainer

if TYPE_CHECKING:
    from diffusers import UNet2DModel
    from torch import Tensor

    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

TIMESTEPS = (0, 200, 400, 600, 800, 900, 999)


@torch.no_grad()
def ddim(network: UNet2DModel, folder: Path, prediction: str, noise: Tensor, steps: int) -> Tensor:
    """Return samples of the stock solver with trailing spacing."""
    settings = {"prediction_type": prediction, "timestep_spacing": "trailing"}
    solver = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", **settings)
    solver.set_timesteps(steps)
    x = noise
    for timestep in solver.timesteps:
        x = solver.step(network(x, timestep).sample, timestep, x).prev_sample
    return x


def root_mean_square(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


@torch.no_grad()
def epsilon_errors(student: Student, teacher: Teacher) -> dict[int, float]:
    """Return the error of the student's velocity as an error of epsilon: multiplied by alpha / (alpha + sigma)."""
    draws, errors = draw(1, 0, 64, teacher.event_shape), {}
    for timestep in TIMESTEPS:
        t = teacher.schedule.time(torch.full((64,), timestep))
        x = StartingPoints(teacher, teacher_jump(teacher))(draws, t)
        error = root_mean_square(student.mean_velocity(x, t, t) - teacher.velocity(x, t))
        errors[timestep] = error * (1 - t[0].item())
    return errors


def main() -> None:
    logging.basicConfig(level="INFO", format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--set", dest="changes", action="append", default=[])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--ddim-steps", type=int, default=50)
    arguments = parser.parse_args()
    changes = ["student.prediction=v_prediction", "matching=null"]
    changes += ["training.steps=1", "training.checkpoint_every=100000"]
    recipe = load_recipe("digits", [*changes, *arguments.changes], teacher=str(arguments.teacher))
    job = plan(recipe)
    noise = torch.randn(arguments.samples, *job.teacher.event_shape, generator=torch.Generator().manual_seed(7))

    def samples(network: UNet2DModel, prediction: str) -> Tensor:
        return ddim(network, arguments.teacher, prediction, noise, arguments.ddim_steps)

    expected = samples(job.teacher.network, job.teacher.prediction)
    start = samples(stock_part(job.student.network), job.student.prediction)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(job.student, job.teacher, recipe, job.images, Path(folder), Accelerator(cpu=True))
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    student = trainer.averaged_student(recipe.training.ema[0])
    found = {
        "regression_steps": recipe.student.regression_steps,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "teacher_rms": root_mean_square(expected),
        "rms_at_start": root_mean_square(start - expected),
        "rms": root_mean_square(samples(stock_part(student.network), student.prediction) - expected),
        "epsilon_errors": epsilon_errors(student, job.teacher),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
