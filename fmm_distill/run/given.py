"""The objects that Python passes to a run next to its recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from fmm_distill.errors import UserError
from fmm_distill.io.files import write_text
from fmm_distill.io.reading import read_mapping
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.velocity_field import as_teacher
from fmm_distill.training.checkpoint import newest_state
from fmm_distill.training.train_state import check_same_optimizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.teachers.velocity_field import KnownVelocity
    from fmm_distill.training.callbacks import Callback
    from fmm_distill.training.optimizer import OptimizerFactory

__all__ = ["PYTHON", "Given", "check_given", "check_optimizer_of_run", "keep_given"]

# The prefix of ``recipe.teacher`` in a run whose teacher came from Python.
PYTHON = "python:"
_FILE = "python.json"
_TODO = "remove it, and the run takes the teacher and the optimizer that it is given"
# Two machines round differently; another teacher differs by far more.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Given:
    """A teacher, a network for the student, an optimizer and callbacks, each as an object; None: the recipe's.

    Attributes:
        teacher: a ``Teacher``, or any object with ``velocity`` and ``event_shape`` (``KnownVelocity``).
        student: the network that the student starts from, or a ``LearnedFlowMap``.
        optimizer: makes the optimizer of a list of parameters.
        callbacks: are called by the trainer in the first process.
    """

    teacher: Teacher | KnownVelocity | None = None
    student: nn.Module | None = None
    optimizer: OptimizerFactory | None = None
    callbacks: Sequence[Callback] = ()

    def name_in(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the teacher's name, by which its run is recognized.

        Raises:
            UserError: if the recipe names a teacher of Python that is not given, has settings for opening a teacher
                that is given, or has an earlier student to start from next to a network.
        """
        if self.student is not None and recipe.student.init is not None:
            raise UserError(
                f"student.init: expected none with a network for the student from Python, got {recipe.student.init}; "
                "leave one of them out"
            )
        if self.teacher is None:
            if recipe.teacher.startswith(PYTHON):
                raise UserError(
                    f"teacher {recipe.teacher}: expected the teacher itself, which this run was given in Python; pass "
                    "teacher=... again"
                )
            return recipe
        guidance, prompts = recipe.guidance, recipe.prompts
        settings: dict[str, Any] = {"revision": recipe.revision, "variant": recipe.variant, "pipeline": recipe.pipeline}
        settings |= {"ip_adapter.source": recipe.ip_adapter.source}
        settings |= {"guidance.weaker": guidance.weaker, "prompts.file": prompts.file}
        if unused := [name for name, value in (settings | {"prompts.dataset": prompts.dataset}).items() if value]:
            raise UserError(f"{unused[0]}: expected none with a teacher from Python; leave it out")
        name = self.teacher.source if isinstance(self.teacher, Teacher) else type(self.teacher).__qualname__
        return recipe.model_copy(update={"teacher": f"{PYTHON}{name.removeprefix(PYTHON)}"})

    def open_teacher(self, recipe: Recipe) -> Teacher | None:
        """Return the teacher that was given, guided as the recipe has it; None: none was given.

        Raises:
            UserError: if it is no velocity field, or can't be guided.
        """
        if self.teacher is None:
            return None
        teacher, settings = as_teacher(self.teacher), recipe.guidance
        guidance = Guidance(settings.scale, settings.interval, settings.range, settings.image_scale)
        if not guidance.is_off:
            guidance.check(teacher.conditions, teacher.source)
            teacher.guidance = guidance
        return teacher


@torch.no_grad()
def _velocity(teacher: Teacher) -> list[float]:
    """Return numbers that identify a teacher: mean, size and first entry of its velocity at two fixed points.

    A closed form has no weights to compare.
    """
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.tensor([0.3, 0.8], dtype=torch.float64))
    device = next(iter(teacher.network.parameters()), torch.empty(0)).device
    cond = teacher.conditioned_on(torch.tensor([0.0, 0.5], dtype=torch.float64))
    cond = None if cond is None else cond.to(device)
    v = teacher.velocity(x.to(device), t.to(device), cond).flatten(1).double().cpu()
    return cast("list[float]", torch.cat([v.mean(1), v.square().mean(1).sqrt(), v[:, 0]]).tolist())


def keep_given(folder: Path, recipe: Recipe, teacher: Teacher, optimizer: str | None) -> None:
    """Write the numbers that identify a teacher from Python, and the optimizer's class, each once.

    Args:
        optimizer: the class of an optimizer from Python; None: it is the recipe's.
    """
    before = _read(folder)
    found: dict[str, Any] = {}
    if recipe.teacher.startswith(PYTHON) and "velocity" not in before:
        found["velocity"] = _velocity(teacher)
    if optimizer is not None and "optimizer" not in before:
        found["optimizer"] = optimizer
    if found:
        write_text(folder / _FILE, json.dumps(before | found) + "\n")


def check_optimizer_of_run(folder: Path, optimizer: str) -> None:
    """Refuse to continue with an optimizer of another class than the run began with.

    Its state is another one's, and the recipe does not name an optimizer from Python.

    Args:
        optimizer: the name of the class.

    Raises:
        UserError: if the run in ``folder`` began with another one.
    """
    check_same_optimizer(_read(folder).get("optimizer"), optimizer)
    newest = newest_state(folder / "checkpoints")
    # In the second stage the state is that of matching.optimizer.
    if newest is not None and "critic_optimizer" not in newest.state:
        check_same_optimizer(newest.state["optimizer"].get("name"), optimizer)


def _read(folder: Path) -> dict[str, Any]:
    return read_mapping(folder / _FILE, todo=_TODO) if (folder / _FILE).is_file() else {}


def check_given(folder: Path, recipe: Recipe, teacher: Teacher) -> None:
    """Refuse to continue with another teacher from Python than the run began with.

    Raises:
        UserError: if its velocity differs.
    """
    if not recipe.teacher.startswith(PYTHON) or "velocity" not in _read(folder):
        return
    before = torch.tensor(read_mapping(folder / _FILE, {"velocity": list}, todo=_TODO)["velocity"], dtype=torch.float64)
    now = torch.tensor(_velocity(teacher), dtype=torch.float64)
    if before.shape != now.shape or (now - before).abs().max() > _TOLERANCE * before.abs().max().clamp_min(1):
        raise UserError(
            f"teacher: expected the one that the run in {folder} began with, got one of another velocity; pass that "
            "one, or choose another output"
        )
