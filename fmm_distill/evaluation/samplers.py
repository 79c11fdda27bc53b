"""What is compared: a student's jumps, and its teacher under stock fast solvers; pipelines are in ``stock``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from fmm_distill.core.schedules import FlowMatching, VariancePreserving
from fmm_distill.core.solvers import solve
from fmm_distill.core.time_axis import expand
from fmm_distill.errors import first_line
from fmm_distill.student.sampling import sample

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.config.settings import EvaluationSettings
    from fmm_distill.evaluation.draws import SampleDraws
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["Sampler", "about_solvers", "of_students", "of_teacher", "steps_within"]


@dataclass(frozen=True)
class Sampler:
    """A way from noise to samples.

    Attributes:
        name: of its rows.
        steps: as its scheduler counts them.
        network: whose calls are counted.
        run: samples of the draws.
        makes_images: it gives decoded images of range -1 to 1, not samples to decode.
        follows_ode: it goes where the teacher's ODE goes, so that the way to the ODE's end is its error.
    """

    name: str
    steps: int
    network: nn.Module
    run: Callable[[SampleDraws], Float[Tensor, "batch *event"]]
    makes_images: bool = False
    follows_ode: bool = True


def of_students(students: Mapping[str, Student], steps: tuple[int, ...], *, follows_ode: bool = True) -> list[Sampler]:
    """One sampler a student and number of steps.

    Args:
        students: the name of their rows to each.
    """

    def jumps(student: Student, count: int) -> Callable[[SampleDraws], Tensor]:
        return lambda draws: sample(student, draws.noise, count, draws.cond)

    return [
        Sampler(name, count, student.network, jumps(student, count), follows_ode=follows_ode)
        for name, student in students.items()
        for count in steps
    ]


def of_teacher(teacher: Teacher, settings: EvaluationSettings) -> list[Sampler]:
    """One sampler a solver of the teacher and number of steps; ``about_solvers`` says which there are."""
    return [
        Sampler(name, steps, teacher.network, run)
        for name, numbers in _numbers_of(teacher, settings).items()
        for steps in numbers
        if (run := _solver(teacher, name, steps)) is not None
    ]


def steps_within(teacher: Teacher, calls: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The settings of solvers with at most these numbers of network calls, each once.

    A teacher that is guided by two answers is asked twice a step; Heun's method asks twice but in its last step.
    """
    each = 2 if teacher.guidance is not None else 1
    plain = tuple(dict.fromkeys(max(1, count // each) for count in calls))
    heun = tuple(dict.fromkeys((count + 1) // 2 for count in plain))
    return {"ddim_steps": plain, "dpmsolver_steps": plain, "unipc_steps": plain, "heun_steps": heun}


def _numbers_of(teacher: Teacher, settings: EvaluationSettings) -> dict[str, tuple[int, ...]]:
    first = "teacher-ddim" if isinstance(teacher.schedule, VariancePreserving) else "teacher-euler"
    return {
        first: settings.ddim_steps,
        "teacher-dpmsolver++": settings.dpmsolver_steps,
        "teacher-unipc": settings.unipc_steps,
        "teacher-heun": settings.heun_steps,
    }


def _solver(teacher: Teacher, name: str, steps: int) -> Callable[[SampleDraws], Tensor] | None:
    """A solver of the teacher; None: it has none of this name."""
    schedule = teacher.schedule
    if name == "teacher-euler":
        return lambda draws: _along_grid(teacher, draws, steps, "euler")
    if isinstance(schedule, FlowMatching):
        if name == "teacher-heun":
            return lambda draws: _along_grid(teacher, draws, steps, "heun")
        return None
    if not isinstance(schedule, VariancePreserving):
        return None
    if _has_own_levels(teacher):
        own: Any = CogVideoXDDIMScheduler
        return _stock(teacher, own, steps) if name == "teacher-ddim" else None
    if name == "teacher-heun":
        return _stock(teacher, HeunDiscreteScheduler, steps) if _why_no_heun(teacher) is None else None
    kinds = {
        "teacher-ddim": DDIMScheduler,
        "teacher-dpmsolver++": DPMSolverMultistepScheduler,
        "teacher-unipc": UniPCMultistepScheduler,
    }
    return _stock(teacher, kinds[name], steps)


def _has_own_levels(teacher: Teacher) -> bool:
    """Whether only the schedulers of CogVideoX make the teacher's noise levels."""
    return str(teacher.scheduler_config.get("_class_name")).startswith("CogVideoX")


def _why_no_heun(teacher: Teacher) -> str | None:
    if teacher.schedule.t_max >= 1:
        return "no Heun: its scheduler divides by the signal, and this schedule ends in noise alone"
    try:
        HeunDiscreteScheduler.from_config(teacher.scheduler_config)
    except NotImplementedError as error:
        return f"no Heun: {first_line(error)}"
    return None


def _along_grid(teacher: Teacher, draws: SampleDraws, steps: int, method: Any) -> Tensor:  # noqa: ANN401 a literal
    """A method on the teacher's own grid; Euler's is what the stock Euler scheduler of its kind does."""
    times = teacher.schedule.grid(steps).to(draws.noise.device)
    return solve(teacher.velocity, teacher.prior(draws.noise), times, method=method, cond=draws.cond)


def _stock(teacher: Teacher, kind: Any, steps: int) -> Callable[[SampleDraws], Tensor]:  # noqa: ANN401 a class
    """The teacher under a stock scheduler, as diffusers makes it from the teacher's own configuration."""
    schedule: Any = teacher.schedule
    # The guided teacher's denoised sample, whatever its network predicts.
    settings: dict[str, Any] = {"prediction_type": "sample", "timestep_spacing": "trailing"}
    if kind is DPMSolverMultistepScheduler:
        settings |= {"algorithm_type": "dpmsolver++", "solver_order": 2}
    elif kind is UniPCMultistepScheduler:
        settings |= {"solver_order": 2, "solver_type": "bh2"}
    else:
        settings |= {"clip_sample": _clips(teacher)}
    heun = kind is HeunDiscreteScheduler
    if heun:
        settings |= {"prediction_type": "epsilon"}

    def run(draws: SampleDraws) -> Tensor:
        scheduler = kind.from_config(teacher.scheduler_config | settings)
        scheduler.set_timesteps(steps, device=draws.noise.device)
        x = draws.noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            t = schedule.time(timestep.long()).to(x.device).expand(len(x))
            on_axis = scheduler.scale_model_input(x, timestep) / expand(schedule.scale(t), x)
            velocity = teacher.velocity(on_axis, t, draws.cond)
            # x0_hat, or eps_hat where the scheduler takes no other.
            told = on_axis + expand(1 - t, x) * velocity if heun else on_axis - expand(t, x) * velocity
            x = scheduler.step(told, timestep, x).prev_sample
        return x

    return run


def _clips(teacher: Teacher) -> bool:
    """Whether the teacher's own scheduler clips its samples; schedulers that have no such setting don't."""
    return bool(teacher.scheduler_config.get("clip_sample", False))


def about_solvers(teacher: Teacher, settings: EvaluationSettings) -> str:
    """Which solvers the teacher's rows are of, and which of those that were asked for it can't have."""
    asked = {name for name, numbers in _numbers_of(teacher, settings).items() if numbers}
    if not asked:
        return "none was asked for"
    missing = sorted(name for name in asked if _solver(teacher, name, 1) is None)
    why = _why_no_heun(teacher) if isinstance(teacher.schedule, VariancePreserving) else None
    reason = why if missing == ["teacher-heun"] and why else "this schedule has none"
    left_out = f"; not {', '.join(name.removeprefix('teacher-') for name in missing)}: {reason}" if missing else ""
    if not isinstance(teacher.schedule, VariancePreserving):
        return f"Euler's method, and Heun's where it is asked for, on the teacher's own grid{left_out}"
    if _has_own_levels(teacher):
        return f"diffusers' CogVideoXDDIMScheduler, timestep_spacing=trailing{left_out}"
    stock = {
        "teacher-ddim": "DDIMScheduler",
        "teacher-dpmsolver++": "DPMSolverMultistepScheduler (2M)",
        "teacher-unipc": "UniPCMultistepScheduler (order 2, bh2)",
        "teacher-heun": "HeunDiscreteScheduler",
    }
    names = ", ".join(text for name, text in stock.items() if name in asked - set(missing))
    return (
        f"diffusers' {names}, timestep_spacing=trailing, the rest as in the teacher's configuration "
        f"(clip_sample={_clips(teacher)}){left_out}"
    )
