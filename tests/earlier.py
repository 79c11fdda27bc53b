"""Students that others start from, as runs and as exports, made without training."""

from __future__ import annotations

from pathlib import Path

import torch

from fmm_distill.config.recipe import Recipe
from fmm_distill.export.manifest import make_manifest, write_manifest
from fmm_distill.export.write import write_student
from fmm_distill.io.files import write_text
from fmm_distill.run.folder import store_commits, store_inputs
from fmm_distill.run.given import Given
from fmm_distill.run.inputs import with_paths
from fmm_distill.run.marker import mark
from fmm_distill.run.plan import open_student, open_teacher
from fmm_distill.student.student import Student
from fmm_distill.teachers.base import Teacher
from fmm_distill.training import checkpoint
from fmm_distill.training.ema import trained_state


def recipe_of(teacher: Path | str, settings: dict) -> Recipe:
    loss = {"name": "lagrangian", "stop_gradient": "target"}
    return with_paths(Recipe.model_validate({"teacher": str(teacher), "loss": loss} | settings))


def untrained(recipe: Recipe) -> tuple[Student, Teacher]:
    """The student of a recipe as its training begins, and its teacher."""
    return open_student(recipe, open_teacher(recipe), Given())


def trained(recipe: Recipe, seed: int = 1) -> tuple[Student, Teacher]:
    """A student with random changes of all that is trained, and its teacher."""
    student, teacher = untrained(recipe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in student.parameters():
            if value.requires_grad:
                size = 0.1 * max(1, value.shape[1:].numel()) ** -0.5
                value.add_(torch.randn(value.shape, generator=generator) * size)
    return student.eval(), teacher


def save_run(folder: Path, recipe: Recipe, student: Student, teacher: Teacher, step: int = 7) -> Path:
    """A run that was stopped after a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    store_commits(folder, teacher)
    store_inputs(folder, recipe, None)
    state = {name: value.detach().clone() for name, value in trained_state(student).items()}
    last = {name: torch.zeros_like(value) for name, value in state.items()}
    average = state | {"n_averaged": torch.tensor(step)}
    tensors = {"student": last, "optimizer": {}} | {"ema-0.999": average}
    plain = {"non_finite_steps": {"skipped": 0, "lr_scale": 1.0}}
    checkpoint.save(folder / "checkpoints", checkpoint.Checkpoint(step, tensors, plain), 1)
    return folder


def save_export(folder: Path, recipe: Recipe, student: Student, teacher: Teacher) -> Path:
    """An exported folder without pipelines of fixed numbers of steps."""
    folder.mkdir(parents=True)
    exported = write_student(student, teacher, folder, ())
    write_manifest(folder, make_manifest(student, teacher, recipe, (), exporter=exported.exporter))
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    return folder


SAVE = {"run": save_run, "export": save_export}
