"""Checks of the evaluation settings, made before anything long starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fmm_distill.errors import UserError
from fmm_distill.evaluation.clip import make_clip_scorer
from fmm_distill.evaluation.draws import NOISE_SEED
from fmm_distill.evaluation.features import check_features
from fmm_distill.evaluation.solvers import SOLVERS
from fmm_distill.teachers.codec import Pixels

if TYPE_CHECKING:
    from fmm_distill.config.settings import EvaluationSettings
    from fmm_distill.teachers.base import Teacher

__all__ = ["check_evaluation", "check_evaluation_steps", "image_shape"]


def image_shape(teacher: Teacher) -> tuple[int, ...]:
    """Return the shape of one decoded sample: channels, height and width of an image."""
    if isinstance(teacher.codec, Pixels):
        return teacher.event_shape
    return tuple(teacher.codec.decode(torch.zeros(1, *teacher.event_shape)).shape[1:])


def check_evaluation(settings: EvaluationSettings, teacher: Teacher) -> None:
    """Check that this teacher can be evaluated with these settings on this machine.

    Raises:
        UserError: on features or a CLIP model that are missing or don't fit, and on numbers of steps out of range.
    """
    if settings.features != "none":
        check_features(settings.features, image_shape(teacher))
    if settings.clip is not None:
        make_clip_scorer(settings.clip, teacher, NOISE_SEED, torch.device("cpu"))
    for name in dict.fromkeys(["steps", *(solver.setting for solver in SOLVERS)]):
        check_evaluation_steps(f"evaluation.{name}", getattr(settings, name), teacher)


def check_evaluation_steps(name: str, steps: tuple[int, ...], teacher: Teacher) -> None:
    """Check that the teacher's schedule has grids of these numbers of steps.

    Args:
        name: of the setting, for the message.

    Raises:
        UserError: if a number is out of range.
    """
    wrong = [n for n in steps if not 1 <= n <= teacher.schedule.num_timesteps]
    if wrong:
        raise UserError(
            f"{name}: expected 1 to {teacher.schedule.num_timesteps} steps, the teacher's number of timesteps; "
            f"got {', '.join(map(str, wrong))}"
        )
