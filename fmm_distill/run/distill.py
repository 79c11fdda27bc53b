"""The main job: teacher, student, training, evaluation, export, in one folder that explains itself."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fmm_distill.data.prepare import prepare_samples
from fmm_distill.evaluation.monitor import Monitor
from fmm_distill.evaluation.result import Evaluation, table
from fmm_distill.export.place import check_replaceable
from fmm_distill.io.files import write_text
from fmm_distill.io.lock import locked
from fmm_distill.run.finish import finish, how_to_load
from fmm_distill.run.folder import (
    PROMPTS,
    check_folder,
    check_images,
    check_prompts,
    make_folder,
    pinned,
    read_evaluation,
    steps_done,
    store_commits,
    store_inputs,
    take_changes,
)
from fmm_distill.run.inputs import with_paths
from fmm_distill.run.plan import describe, plan
from fmm_distill.run.trial import keep_trial, try_export
from fmm_distill.teachers.conditions import Embeddings
from fmm_distill.training.process import alone, first_process_logs, make_accelerator, on_first
from fmm_distill.training.trackers import tracked
from fmm_distill.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.run.plan import Plan
    from fmm_distill.student.student import Student

__all__ = ["distill"]

logger = logging.getLogger(__name__)


def distill(recipe: Recipe, output: Path | str, *, fresh: bool = False) -> Evaluation:
    """Distill, evaluate and export into the folder ``output``; the same call goes on where it was stopped.

    Args:
        fresh: remove what an earlier run left in ``output``.

    Raises:
        UserError: on input that can't be used, a folder of another recipe, a damaged checkpoint or a full disk.
        TrainingDivergedError: when the loss is no number any more.
    """
    with alone():
        return _distill(recipe, Path(output), fresh)


def _distill(recipe: Recipe, folder: Path, fresh: bool) -> Evaluation:
    recipe = with_paths(recipe)
    accelerator = make_accelerator(recipe, folder)
    with first_process_logs(accelerator):
        return _locked_run(recipe, folder, accelerator, fresh)


def _locked_run(recipe: Recipe, folder: Path, accelerator: Accelerator, fresh: bool) -> Evaluation:
    seen: dict[str, Any] = {}
    changes = check_folder(folder, recipe, fresh=fresh, seen=seen)
    # No process takes the folder before all have looked at it.
    accelerator.wait_for_everyone()
    finished = None if fresh or changes else read_evaluation(folder)
    if finished is not None:
        logger.info(f"{folder} is finished; --fresh starts again")
        logger.info(table(finished))
        logger.info(how_to_load(folder, recipe))
        return finished
    with ExitStack() as held:
        # The first process holds the lock for all.
        on_first(accelerator, lambda: held.enter_context(locked(folder, "a run")))
        # Another process may have worked here until it released the lock.
        changes = check_folder(folder, recipe, fresh=fresh, seen=seen)
        on_first(accelerator, lambda: check_replaceable(folder / "student"))
        _train(recipe, folder, changes, accelerator, fresh=fresh)
    return cast("Evaluation", read_evaluation(folder))


def _train(
    recipe: Recipe,
    folder: Path,
    changes: list[str],
    accelerator: Accelerator,
    *,
    fresh: bool,
) -> None:
    """Train, evaluate and export into a folder that is locked."""
    job = plan(recipe if fresh else pinned(recipe, folder))
    if not fresh:
        check_prompts(folder, job.teacher)
        check_images(folder, job.images)
    logger.info(describe(job))
    tried: list[str] = []

    def try_first() -> None:
        tried.append(try_export(recipe, job.student, job.teacher, folder, locked=True))

    on_first(accelerator, try_first)
    for change in changes:
        logger.info(f"changed  {change}")
    on_first(accelerator, lambda: _make(folder, recipe, job, changes, tried, fresh=fresh))
    samples = prepare_samples(recipe, job.teacher, job.images, folder, accelerator)
    trainer = Trainer(job.student, job.teacher, recipe, samples, folder, accelerator)
    average = partial(trainer.full_average, recipe.training.ema[0])
    watched = cast("Callable[[], Student]", average)
    monitor = Monitor(watched, job.teacher, recipe, job.reference, folder, accelerator)
    with tracked(accelerator, recipe, folder, steps_done(folder)):
        trainer.run(evaluate=monitor.reached)
        averages = {rate: trainer.full_average(rate) for rate in trainer.averages}
        if accelerator.is_main_process:
            job.student = cast("Student", trainer.plain.to(accelerator.device))
            finish(job, averages, folder, accelerator)
        accelerator.wait_for_everyone()


def _make(folder: Path, recipe: Recipe, job: Plan, changes: list[str], tried: list[str], *, fresh: bool) -> None:
    """Write what explains the run, and the digests of the exports that have passed."""
    make_folder(folder, recipe, fresh=fresh)
    if changes:
        take_changes(folder, recipe)
    store_commits(folder, job.teacher)
    store_inputs(folder, recipe, job.images)
    if isinstance(job.teacher.conditions, Embeddings):
        write_text(folder / PROMPTS, json.dumps(job.teacher.conditions.names, indent=0) + "\n")
    for digest in tried:
        keep_trial(folder, digest)
