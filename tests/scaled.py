"""Students whose weights change with the length of the jump, for the tests."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from fmm_distill.config.recipe import Recipe
from fmm_distill.data.samples import Images
from fmm_distill.run.given import Given
from fmm_distill.run.plan import open_student, open_teacher
from fmm_distill.student.scaled import ScaledWeights
from fmm_distill.student.student import Student
from fmm_distill.teachers.base import Teacher
from fmm_distill.training.trainer import Trainer

# Zero at first; the other factor of a low rank is random.
ZERO_AT_FIRST = ("jump_weight", "jump_bias", "jump_B", "diagonal_B")


def randomize(network: nn.Module, scale: float = 0.1) -> nn.Module:
    """Set the changes of the weights to random numbers of about this size relative to the layer's output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith(ZERO_AT_FIRST):
                size = max(1, value.shape[1:].numel()) ** -0.5
                value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * scale * size)
    return network


def scaled_student(teacher: Teacher, rank: int = 0, **changes: object) -> Student:
    """A student with random changes of its weights."""
    student = Student.from_teacher(teacher, scaled=ScaledWeights(rank=rank, **changes))
    randomize(student)
    return student


def points(teacher: Teacher, count: int = 2) -> tuple:
    """Points, and times t > r of jumps of different lengths, and conditions."""
    x = torch.randn(count, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.linspace(0.6, 0.9, count, dtype=torch.float64))
    r = teacher.schedule.time_at(torch.linspace(0.5, 0.1, count, dtype=torch.float64))
    spread = torch.arange(count, dtype=torch.float64) / count
    return x, t, r, None if teacher.conditions is None else teacher.conditions.pick(spread)


def one_by_one(student: Student, x, t, r, cond=None) -> torch.Tensor:
    """The mean velocities of a batch, each from a call of its own."""
    rows = [torch.tensor([i]) for i in range(len(x))]
    return torch.cat([student.mean_velocity(x[i], t[i], r[i], None if cond is None else cond.rows(i)) for i in rows])


def train(settings: dict, folder: Path, images: Images | None = None) -> Trainer:
    """Train by a recipe's settings, with the student and the teacher that a run would have."""
    recipe = Recipe.model_validate(settings)
    student, teacher = open_student(recipe, open_teacher(recipe), Given())
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=recipe.training.gradient_accumulation_steps)
    trainer = Trainer(student, teacher, recipe, images, folder, accelerator)
    trainer.run()
    return trainer


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The relative difference in the 2-norm."""
    return float((a - b).detach().norm() / b.detach().norm())
