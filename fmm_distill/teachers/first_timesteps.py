"""A teacher on the first of its timesteps, counted from data.

Near pure noise the data that an epsilon prediction implies, ``(x - sigma eps) / alpha``, have its error times
``sigma / alpha``: 157 at the last timestep of the linear schedule, 24 at timestep 799. A network that was trained
briefly has its largest errors there, and its ODE leaves the range of images. Normal noise at an earlier timestep is off
by ``alpha`` times the data, which a few percent of alpha hide in the noise of low resolutions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import diffusers

from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from fmm_distill.teachers.base import Teacher

__all__ = ["on_first_timesteps"]


def on_first_timesteps(teacher: Teacher, count: int | None) -> Teacher:
    """Return the teacher with a time axis that ends at timestep ``count - 1``; itself for None.

    Its scheduler has the same noise levels up to there and no others, so that solvers, students and exports start there
    too.

    Raises:
        UserError: if the teacher has no discrete schedule of stock betas, or not that many timesteps.
    """
    if count is None:
        return teacher
    schedule, config = teacher.schedule, teacher.scheduler_config
    if not isinstance(schedule, VariancePreserving) or not config or "snr_shift_scale" in config:
        raise UserError(
            f"timesteps: expected null for {teacher.source}, which has no discrete schedule of betas, got {count}; "
            "try --set timesteps=null"
        )
    if not 2 <= count <= schedule.num_timesteps:
        raise UserError(
            f"timesteps: expected 2 to {schedule.num_timesteps}, the timesteps of {teacher.source}, got {count}; try "
            "--set timesteps=null for all of them"
        )
    if count == schedule.num_timesteps:
        return teacher
    betas = diffusers.DDIMScheduler.from_config(config).betas[:count]
    # The betas are the final ones: nothing rescales them again.
    changes: dict[str, Any] = {"trained_betas": betas.tolist(), "num_train_timesteps": count}
    config = config | changes | {"rescale_betas_zero_snr": False}
    parametrization = replace(teacher.parametrization, schedule=VariancePreserving((1 - betas.double()).cumprod(0)))
    return replace(teacher, parametrization=parametrization, scheduler_config=config)
