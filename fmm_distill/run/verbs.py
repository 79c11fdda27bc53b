"""The verbs ``evaluate`` and ``publish`` from Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmm_distill.run.evaluate import EvaluationRequest, EvaluationTarget, measure_target, open_target
from fmm_distill.run.given import Given
from fmm_distill.run.publish import pack
from fmm_distill.run.publish import publish as send
from fmm_distill.run.reopen import open_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from fmm_distill.evaluation.result import Evaluation
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.velocity_field import KnownVelocity

__all__ = ["evaluate", "publish"]


def evaluate(
    source: Path | str,
    *,
    settings: Mapping[str, Any] | None = None,
    against_teacher: bool = True,
    also: tuple[str, ...] = (),
    report: Path | str | None = None,
    teacher: Teacher | KnownVelocity | None = None,
    student: nn.Module | None = None,
) -> Evaluation | None:
    """Measure the student of a run, of an exported folder or of the Hub next to its teacher.

    It is the verb ``fmm-distill evaluate``.

    Args:
        settings: evaluation settings that differ from the recipe's, such as ``{"steps": [1, 2], "samples": 512}``.
        against_teacher: with rows of the teacher's solvers and of its own pipeline.
        also: other pipelines or students to measure, by id or folder.
        report: a folder for pictures and ``report.html``.
        teacher: the teacher of a run that got it from Python.
        student: the network of such a run's student, where it got one.

    Returns:
        The evaluation; None in processes other than the first.

    Raises:
        UserError: if the source can't be opened, or can't be measured with these settings.
    """
    request = EvaluationRequest(against_teacher=against_teacher, also=also, evaluation=dict(settings or {}))
    if teacher is None:
        target = open_target(str(source), request)
    else:
        job = open_run(source, evaluation=request.evaluation, given=Given(teacher, student))
        target = EvaluationTarget(
            str(source), job.student, job.teacher, job.recipe.evaluation, job.reference, knows_ode=against_teacher
        )
    return measure_target(target, request, None if report is None else Path(report))


def publish(
    source: Path | str,
    repo: str,
    *,
    branch: str | None = None,
    steps: tuple[int, ...] | None = None,
    private: bool = False,
    force: bool = False,
) -> str:
    """Put the student of a run, or an exported folder, on the Hub in one commit.

    It is the verb ``fmm-distill publish``.

    Args:
        repo: owner/name of the repository, which is created if it is not there.
        steps: numbers of steps whose pipelines are sent; None: all.
        private: make a new repository private.
        force: write over a repository that has something else in it.

    Returns:
        The address of the commit.

    Raises:
        UserError: if there is no verified export, or the Hub refuses it.
    """
    upload = pack(Path(source), repo, branch, steps)
    return send(upload, repo, branch, private=private, force=force)
