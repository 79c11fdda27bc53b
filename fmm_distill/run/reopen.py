"""Reopen a run: load its student at the newest checkpoint, plot samples of it, or export it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.torch_state import own_state
from fmm_distill.errors import UserError
from fmm_distill.evaluation.gallery import Gallery
from fmm_distill.evaluation.pictures import plot_samples
from fmm_distill.export.place import check_replaceable
from fmm_distill.io.files import writing
from fmm_distill.run.finish import Trained, export_student
from fmm_distill.run.folder import (
    check_files,
    check_images,
    pinned,
    read_evaluation,
    steps_exported,
    stored_recipe,
)
from fmm_distill.run.given import Given, check_given
from fmm_distill.run.plan import Plan, at_guidance, plan, with_evaluation
from fmm_distill.run.prompts import prompts_of_run
from fmm_distill.student.sampling import check_stochasticity
from fmm_distill.training import checkpoint
from fmm_distill.training.ema import load_trained

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fmm_distill.evaluation.result import Evaluation
    from fmm_distill.export.agreement import Agreement


__all__ = ["draw_run", "export_run", "open_run"]


@own_state()
def open_run(
    folder: Path | str,
    guidance: float | None = None,
    evaluation: Mapping[str, Any] | None = None,
    given: Given | None = None,
) -> Plan:
    """Open the teacher of a run, and its averaged student at the newest checkpoint.

    The average is the one that the run's evaluation chose or, without an evaluation, the first of ``training.ema``. A
    finished run with early stopping is opened at the step that it exported.

    Args:
        guidance: scale of guidance that replaces the recipe's, for a run with ``guidance.range``.
        evaluation: settings of the evaluation that replace the recipe's.
        given: teacher and network of a run that was started from Python with objects of the caller.

    Raises:
        UserError: if the folder is not a run, has no checkpoint, or holds weights of another network, or if the scale
            is outside of the range.
    """
    folder, given = Path(folder), given or Given()
    recipe = at_guidance(with_evaluation(stored_recipe(folder), evaluation, str(folder)), guidance)
    recipe = given.name_in(recipe)
    # Before the teacher is opened, which can take minutes.
    measured = read_evaluation(folder)
    path, stored = _exported(folder, measured)
    check_files(folder, recipe)
    job = plan(pinned(recipe, folder), prompts_of_run(folder, recipe), given)
    check_images(folder, job.images)
    check_given(folder, recipe, job.teacher)
    rate = recipe.training.ema[0] if measured is None else measured.protocol["ema"]
    average = stored.tensors.get(checkpoint.average_name(rate), {})
    try:
        # The counter of the average is no weight of the student.
        weights = {name: value for name, value in average.items() if name != "n_averaged"}
        load_trained(job.student, job.student, weights)
    except KeyError as error:
        raise UserError(
            f"{path}: expected the weights of this recipe's student, got those of another network or of an earlier "
            "version of fmm_distill; distill again into another --output"
        ) from error
    return job


def _exported(folder: Path, measured: Evaluation | None) -> tuple[Path, checkpoint.Checkpoint]:
    """Return the checkpoint that a run exports: the one that early stopping chose, or the newest."""
    step = None if measured is None else measured.protocol.get("exported_step")
    if step is not None:
        return checkpoint.load_step(folder / "checkpoints", step)
    found = checkpoint.newest_complete(folder / "checkpoints")
    if found is None:
        raise UserError(f"{folder} has no checkpoint yet; run the same distillation command to continue it")
    return found


@own_state()
def draw_run(
    folder: Path | str,
    steps: tuple[int, ...],
    count: int,
    seed: int,
    picture: Path,
    guidance: float | None = None,
    stochasticity: float = 0.0,
) -> None:
    """Plot samples of a run's averaged student and of its teacher's ODE, with the same noise in each column.

    Args:
        stochasticity: strength of the fresh noise in the student's steps.
    """
    # Before the teacher is opened, which can take minutes.
    check_stochasticity(stochasticity)
    job = open_run(folder, guidance)
    solver_steps = job.recipe.evaluation.endpoint_solver_steps
    gallery = Gallery(job.teacher, solver_steps, count, seed, torch.device("cpu"))
    rows = gallery.rows(job.student, steps, stochasticity)
    with writing(picture):
        plot_samples(rows, picture)


@own_state()
def export_run(
    folder: Path | str, target: Path | str, steps: tuple[int, ...] | None = None, guidance: float | None = None
) -> dict[str, Agreement]:
    """Export a run's averaged student as pipelines, at the newest checkpoint or the one that early stopping chose.

    Args:
        steps: numbers of steps that get a pipeline each; None: the recipe's.
        guidance: scale of guidance that replaces the recipe's, for a run with ``guidance.range``.

    Returns:
        The agreement of each reloaded pipeline with the student.

    Raises:
        UserError: if the folder is not a run or has no checkpoint, or the target has files that no export wrote.
    """
    folder, target = Path(folder), Path(target)
    # Before the teacher is opened, which can take minutes.
    check_replaceable(target)
    job = open_run(folder, guidance)
    folded = job.recipe.export.steps if steps is None else steps
    # The run's evaluation describes the recipe's scale of guidance alone.
    evaluation = None if guidance is not None else read_evaluation(folder)
    return export_student(job, target, folded, Trained(folder, steps_exported(folder), evaluation))
