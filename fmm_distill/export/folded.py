"""The student for one number of steps as a stock pipeline: no code of ours, nothing left but the teacher's classes."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any, cast

import diffusers

from fmm_distill.core.schedules import Angular, FlowMatching, VariancePreserving
from fmm_distill.errors import UserError
from fmm_distill.export.schedulers import stock_scheduler
from fmm_distill.student.fold import fold
from fmm_distill.teachers.codec import LatentCodec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.schedules import Schedule
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["check_steps", "folded_pipeline", "jump_scheduler", "stock_times", "why_not_folded"]


def why_not_folded(teacher: Teacher) -> str | None:
    """Why no stock pipeline takes a folded student of this teacher; None where one does."""
    if isinstance(teacher.schedule, Angular):
        return "of the stock schedulers IPNDM alone has these noise levels, and its steps mix several calls: no jumps"
    if not isinstance(teacher.schedule, VariancePreserving | FlowMatching):
        return "no stock pipeline walks a variance-exploding schedule by one step a jump"
    if teacher.folder is None and teacher.config["out_channels"] != teacher.config["in_channels"]:
        return "no stock pipeline of UNet2DModel leaves out a learned variance"
    if teacher.folder is None and teacher.conditions is not None:
        return "no stock pipeline gives UNet2DModel a class"
    if isinstance(teacher.schedule, FlowMatching) and (needed := _not_of_flows(teacher)) is not None:
        return f"its pipeline needs a scheduler with {needed}, which the stock scheduler of flow models does not have"
    if isinstance(teacher.schedule, FlowMatching) and isinstance(teacher.codec, LatentCodec) and teacher.folder is None:
        return "no stock pipeline decodes a VQModel after a flow"
    return None


def _not_of_flows(teacher: Teacher) -> str | None:
    """A member of its scheduler that a pipeline of discrete schedules needs; the stock flow scheduler lacks both.

    Solvers that have all members round the timesteps that the network is conditioned on: their steps are no exact
    jumps.
    """
    if teacher.folder is None:
        return None
    index = json.loads((teacher.folder / "model_index.json").read_text(encoding="utf-8"))
    code = inspect.getsource(getattr(diffusers, index["_class_name"]))
    if "FlowMatchEulerDiscreteScheduler" in code:
        # It is made for that one, and treats others apart.
        return None
    for name in ("init_noise_sigma", "scale_model_input"):
        if f"self.scheduler.{name}" in code and f'hasattr(self.scheduler, "{name}")' not in code:
            return name
    return None


def check_steps(steps: Iterable[int], schedule: Schedule) -> None:
    """Refuse numbers of steps that the stock DDIM scheduler does not walk: it steps by whole parts of the timesteps."""
    wrong = [n for n in steps if not 1 <= n <= schedule.num_timesteps or not schedule.is_uniform(n)]
    if wrong:
        raise UserError(
            f"export.steps {', '.join(map(str, wrong))}: wanted divisors of the teacher's {schedule.num_timesteps} "
            "timesteps (the any-step pipeline takes every number)"
        )


def jump_scheduler(student: Student, teacher: Teacher, steps: int | None = None) -> Any:  # noqa: ANN401 diffusers
    """The stock scheduler whose steps are the student's jumps.

    For a flow model of ``steps`` the stock grid, which ends in an almost empty step, is stretched so that its last
    level is that of equal steps.
    """
    stretched = isinstance(student.schedule, FlowMatching) and steps is not None and steps > 1
    terminal = float(student.schedule.grid(cast("int", steps))[-2]) if stretched else None
    return stock_scheduler(teacher, student.prediction, terminal)


def stock_times(student: Student, scheduler: Any, steps: int) -> Float[Tensor, " points"]:  # noqa: ANN401 diffusers
    """The times between which the stock scheduler's steps jump, data at the end."""
    if isinstance(student.schedule, VariancePreserving):
        return student.schedule.grid(steps)
    scheduler.set_timesteps(steps)
    times: Tensor = scheduler.sigmas.double()
    return times


def folded_pipeline(student: Student, teacher: Teacher, steps: int) -> Any:  # noqa: ANN401 a diffusers class
    """The teacher's stock pipeline with the student of ``steps`` folded into its network."""
    scheduler = jump_scheduler(student, teacher, steps)
    network = fold(student, teacher, stock_times(student, scheduler, steps))
    if isinstance(teacher.codec, LatentCodec):
        return diffusers.LDMPipeline(unet=network, scheduler=scheduler, vqvae=teacher.codec.autoencoder)
    # DDIMPipeline makes a DDIMScheduler of every scheduler, with the levels that this one can make.
    kind = diffusers.DDIMPipeline if type(scheduler) is diffusers.DDIMScheduler else diffusers.DDPMPipeline
    return kind(unet=network, scheduler=scheduler)
