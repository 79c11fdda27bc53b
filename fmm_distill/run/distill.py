"""A run: teacher, student, training, evaluation and export, in one folder that explains itself."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fmm_distill.config.recipe import parse as make_recipe
from fmm_distill.config.settings import OptimizerSettings
from fmm_distill.data.prepare import prepare_samples
from fmm_distill.evaluation.monitor import Monitor
from fmm_distill.evaluation.result import Evaluation, table
from fmm_distill.export.place import check_replaceable
from fmm_distill.io.lock import locked
from fmm_distill.run.finish import finish, how_to_load
from fmm_distill.run.folder import (
    check_folder,
    check_images,
    make_folder,
    pinned,
    read_evaluation,
    steps_done,
    store_commits,
    store_inputs,
    take_changes,
)
from fmm_distill.run.given import Given, check_given, check_optimizer_of_run, keep_given
from fmm_distill.run.inputs import with_paths
from fmm_distill.run.plan import plan
from fmm_distill.run.prompts import check_prompts, store_prompts
from fmm_distill.run.trial import keep_trial, try_export
from fmm_distill.training.process import alone, first_process_logs, make_accelerator, on_first
from fmm_distill.training.trackers import tracked
from fmm_distill.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.losses.base import Loss
    from fmm_distill.run.plan import Plan
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.velocity_field import KnownVelocity
    from fmm_distill.training.callbacks import Callback
    from fmm_distill.training.optimizer import OptimizerFactory

__all__ = ["distill"]

logger = logging.getLogger(__name__)


def distill(  # noqa: PLR0913 the objects from Python, each optional
    recipe: Recipe,
    output: Path | str,
    *,
    teacher: Teacher | KnownVelocity | None = None,
    student: nn.Module | None = None,
    loss: Loss | None = None,
    optimizer: OptimizerSettings | OptimizerFactory | None = None,
    callbacks: Sequence[Callback] = (),
    fresh: bool = False,
) -> Evaluation:
    """Distill, evaluate and export into the folder ``output``; the same call resumes a run that was stopped.

    Args:
        teacher: a teacher from Python in place of ``recipe.teacher``: a ``Teacher``, or any object with
            ``velocity(x, t, cond=None)`` and ``event_shape`` (arXiv 2406.07507 distills any known velocity field).
        student: the network that the student starts from; None: a copy of the teacher's. A velocity field needs one: a
            diffusers network, or a ``LearnedFlowMap``.
        loss: the main loss, in place of ``recipe.loss``; a class of your own need not be registered.
        optimizer: settings in place of ``recipe.optimizer``, or a function from a list of parameters to a
            ``torch.optim.Optimizer``, which the same call has to pass again to resume.
        callbacks: objects whose hooks the trainer calls in the first process (``training.callbacks.Callback``).
        fresh: remove the files of an earlier run in ``output``.

    Returns:
        The evaluation of the student next to its teacher.

    Raises:
        UserError: on input that can't be used, a folder of another recipe, a damaged checkpoint or a full disk.
        TrainingDivergedError: when losses or gradients stay non-finite.
    """
    changes: dict[str, Any] = {} if loss is None else {"loss": loss}
    factory = optimizer
    if isinstance(optimizer, OptimizerSettings):
        changes["optimizer"], factory = optimizer, None
    given = Given(teacher, student, cast("OptimizerFactory | None", factory), tuple(callbacks))
    with alone():
        recipe = given.name_in(with_paths(_changed(recipe, changes)))
        return Distillation(recipe, Path(output), given, fresh=fresh).run()


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """Return the recipe with other values of some fields, checked together with the rest."""
    if not changes:
        return recipe
    # Validated again, since a loss can require settings of other groups.
    fields = {name: getattr(recipe, name) for name in recipe.model_fields_set}
    return make_recipe(fields | changes, "distill()")


class Distillation:
    """One run of a recipe in a folder, in each of the processes that were launched together.

    Args:
        recipe: with absolute paths.
        given: the objects from Python.
        fresh: remove the files of an earlier run in the folder.
    """

    def __init__(self, recipe: Recipe, folder: Path, given: Given, *, fresh: bool = False) -> None:
        self.recipe, self.folder, self.given, self.fresh = recipe, folder, given, fresh
        self.accelerator = make_accelerator(recipe, folder)
        # Digests of the inputs, which the second look at the folder takes from the first.
        self._digests: dict[str, Any] = {}
        self.changes: list[str] = []

    def run(self) -> Evaluation:
        """Train, evaluate and export, unless that is done already; return the evaluation."""
        with first_process_logs(self.accelerator):
            return self._run()

    def _run(self) -> Evaluation:
        self._check_folder()
        # No process takes the folder before all have looked at it.
        self.accelerator.wait_for_everyone()
        finished = None if self.fresh or self.changes else read_evaluation(self.folder)
        if finished is not None:
            logger.info(f"{self.folder} is finished; --fresh starts again")
            logger.info(table(finished))
            logger.info(how_to_load(self.folder, self.recipe))
            return finished
        with ExitStack() as held:
            # The first process holds the lock for all.
            on_first(self.accelerator, lambda: held.enter_context(locked(self.folder, "a run")))
            # Another process may have worked here until it released the lock.
            self._check_folder()
            on_first(self.accelerator, lambda: check_replaceable(self.folder / "student"))
            self._train(self._planned())
        return cast("Evaluation", read_evaluation(self.folder))

    def _check_folder(self) -> None:
        self.changes = check_folder(self.folder, self.recipe, fresh=self.fresh, seen=self._digests)

    def _planned(self) -> Plan:
        """Open and check everything, try the export, and write the files that explain the run."""
        recipe = self.recipe if self.fresh else pinned(self.recipe, self.folder)
        job = plan(recipe, given=self.given)
        if not self.fresh:
            check_prompts(self.folder, job.teacher)
            check_images(self.folder, job.images)
            check_given(self.folder, self.recipe, job.teacher)
            check_optimizer_of_run(self.folder, job.optimizer)
        logger.info(str(job))
        passed: list[str] = []
        on_first(self.accelerator, lambda: passed.append(self._try_export(job)))
        for change in self.changes:
            logger.info(f"changed  {change}")
        on_first(self.accelerator, lambda: self._make_folder(job, passed))
        return job

    def _try_export(self, job: Plan) -> str:
        return try_export(self.recipe, job.student, job.teacher, self.folder, locked=True)

    def _make_folder(self, job: Plan, passed: list[str]) -> None:
        """Write the files that explain the run, and the digests of the exports that have passed."""
        folder = self.folder
        make_folder(folder, self.recipe, fresh=self.fresh)
        if self.changes:
            take_changes(folder, self.recipe)
        store_commits(folder, job.teacher, None if job.earlier is None else job.earlier.commit)
        # Before training: a later call compares its inputs with those that the first step saw.
        store_inputs(folder, self.recipe, job.images)
        keep_given(folder, self.recipe, job.teacher, None if self.given.optimizer is None else job.optimizer)
        store_prompts(folder, job.teacher)
        for digest in passed:
            keep_trial(folder, digest)

    def _train(self, job: Plan) -> None:
        """Train to the last step, then evaluate and export in the first process."""
        recipe, folder, accelerator = self.recipe, self.folder, self.accelerator
        samples = prepare_samples(recipe, job.teacher, job.images, folder, accelerator)
        trainer = Trainer(
            job.student, job.teacher, recipe, samples, folder, accelerator, optimizer=self.given.optimizer
        )
        average = cast("Callable[[], Student]", partial(trainer.full_average, recipe.training.ema[0]))
        monitor = Monitor(average, job.teacher, recipe, job.reference, folder, accelerator)
        with tracked(accelerator, recipe, folder, steps_done(folder)):
            trainer.run(self.given.callbacks, monitor.reached)
            exported = trainer.load_exported()
            averages = {rate: trainer.full_average(rate) for rate in trainer.averages}
            if accelerator.is_main_process:
                job.student = cast("Student", trainer.plain.to(accelerator.device))
                finish(job, averages, folder, accelerator, exported)
            accelerator.wait_for_everyone()
