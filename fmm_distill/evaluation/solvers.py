"""The fast solvers of a teacher's ODE that its student is compared with: one record per solver.

Schedulers are those of diffusers, made from the teacher's own configuration with trailing spacing. On schedules that
diffusers' fast solvers don't know, Euler's and Heun's methods run on the teacher's own grid.
"""

from __future__ import annotations

import inspect
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

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.config.settings import EvaluationSettings
    from fmm_distill.evaluation.draws import SampleDraws
    from fmm_distill.teachers.base import Teacher

    Run = Callable[[Teacher, SampleDraws, int], Float[Tensor, "batch *event"]]

__all__ = ["SOLVERS", "Solver", "describe_solvers", "solvers_of", "steps_within"]

_UNSUPPORTED = "not available for this noise schedule"


@dataclass(frozen=True)
class Solver:
    """A solver of the teacher's ODE.

    Attributes:
        name: of its rows.
        label: of the protocol.
        setting: the field of the evaluation settings with its numbers of steps.
        why_not: returns the reason why it can't solve this teacher's ODE, or None.
        run: solves from the draws in a number of steps.
        calls_per_step: network calls of a step; a solver with two makes one in its last step.
    """

    name: str
    label: str
    setting: str
    why_not: Callable[[Teacher], str | None]
    run: Run
    calls_per_step: int = 1

    def steps_within(self, calls: int) -> int:
        """Return the largest number of steps with at most so many network calls."""
        return (calls + self.calls_per_step - 1) // self.calls_per_step


def solvers_of(teacher: Teacher) -> dict[str, Solver]:
    """Return the solver of each setting that this teacher supports, by the setting's name."""
    found: dict[str, Solver] = {}
    for solver in SOLVERS:
        if solver.setting not in found and solver.why_not(teacher) is None:
            found[solver.setting] = solver
    return found


def steps_within(teacher: Teacher, calls: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return settings of solvers with at most these numbers of network calls, each number of steps once.

    A teacher with guidance by two predictions calls its network twice per evaluation, with two guidances three times.
    """
    each = 1 if teacher.guidance is None else teacher.guidance.calls
    evaluations = tuple(dict.fromkeys(max(1, count // each) for count in calls))
    # Solvers of one setting have the same number of calls per step.
    solvers = {solver.setting: solver for solver in SOLVERS}
    return {
        setting: tuple(dict.fromkeys(solver.steps_within(count) for count in evaluations))
        for setting, solver in solvers.items()
    }


def describe_solvers(teacher: Teacher, settings: EvaluationSettings) -> str:
    """Return the protocol's line: solvers with rows, and the reasons why others have none."""
    requested = [name for name in dict.fromkeys(solver.setting for solver in SOLVERS) if getattr(settings, name)]
    if not requested:
        return "none requested"
    found = solvers_of(teacher)
    labels = [found[name].label for name in requested if name in found]
    missing: dict[str, list[str]] = {}
    for name in requested:
        if name not in found:
            missing.setdefault(_why_missing(name, teacher), []).append(name.removesuffix("_steps"))
    line = ", ".join(labels) or "none"
    if labels and isinstance(teacher.schedule, VariancePreserving):
        line = f"diffusers' {line}, timestep_spacing=trailing, otherwise as configured (clip_sample={_clips(teacher)})"
    return "; ".join([line, *(f"without {', '.join(names)}: {reason}" for reason, names in missing.items())])


def _why_missing(setting: str, teacher: Teacher) -> str:
    reasons = [solver.why_not(teacher) for solver in SOLVERS if solver.setting == setting]
    return next((reason for reason in reasons if reason and reason != _UNSUPPORTED), _UNSUPPORTED)


def _is_cogvideox(teacher: Teacher) -> bool:
    """Return whether only the schedulers of CogVideoX reproduce the teacher's noise levels."""
    return str(teacher.scheduler_config.get("_class_name")).startswith("CogVideoX")


def _why_no_stock(teacher: Teacher) -> str | None:
    if not isinstance(teacher.schedule, VariancePreserving) or _is_cogvideox(teacher):
        return _UNSUPPORTED
    return None


def _why_no_cogvideox(teacher: Teacher) -> str | None:
    known = isinstance(teacher.schedule, VariancePreserving) and _is_cogvideox(teacher)
    return None if known else _UNSUPPORTED


def _why_no_stock_heun(teacher: Teacher) -> str | None:
    if (reason := _why_no_stock(teacher)) is not None:
        return reason
    if teacher.schedule.t_max >= 1:
        return "HeunDiscreteScheduler divides by the signal, and this schedule ends in pure noise"
    try:
        HeunDiscreteScheduler.from_config(teacher.scheduler_config)
    except NotImplementedError as error:
        return first_line(error)
    return None


def _why_no_euler(teacher: Teacher) -> str | None:
    return _UNSUPPORTED if isinstance(teacher.schedule, VariancePreserving) else None


def _why_no_heun(teacher: Teacher) -> str | None:
    return None if isinstance(teacher.schedule, FlowMatching) else _UNSUPPORTED


def _on_grid(method: Any) -> Run:  # noqa: ANN401 a literal
    """Return a method on the teacher's own grid; Euler's is what diffusers' Euler scheduler of its kind does."""

    def run(teacher: Teacher, draws: SampleDraws, steps: int) -> Tensor:
        times = teacher.schedule.grid(steps).to(draws.noise.device)
        return solve(teacher.velocity, teacher.prior(draws.noise), times, method=method, cond=draws.cond)

    return run


def _scheduler(kind: Any, **options: Any) -> Run:  # noqa: ANN401 a diffusers class and its options
    """Return the teacher under a stock scheduler, with ``options`` on top of the teacher's own configuration."""
    has_clipping = "clip_sample" in inspect.signature(kind).parameters

    def run(teacher: Teacher, draws: SampleDraws, steps: int) -> Tensor:
        schedule: Any = teacher.schedule
        # Whatever the network predicts, the scheduler is given the guided teacher's denoised sample.
        settings = {"prediction_type": "sample", "timestep_spacing": "trailing"} | options
        if has_clipping:
            # The scheduler's own default may be to clip.
            settings["clip_sample"] = _clips(teacher)
        scheduler = kind.from_config(teacher.scheduler_config | settings)
        scheduler.set_timesteps(steps, device=draws.noise.device)
        x = draws.noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            t = schedule.time(timestep.long()).to(x.device).expand(len(x))
            on_axis = scheduler.scale_model_input(x, timestep) / expand(schedule.scale(t), x)
            velocity = teacher.velocity(on_axis, t, draws.cond)
            as_noise = settings["prediction_type"] == "epsilon"
            output = on_axis + expand(1 - t, x) * velocity if as_noise else on_axis - expand(t, x) * velocity
            x = scheduler.step(output, timestep, x).prev_sample
        return x

    return run


def _clips(teacher: Teacher) -> bool:
    """Return whether the teacher's own scheduler clips samples; schedulers without the setting don't."""
    return bool(teacher.scheduler_config.get("clip_sample", False))


# Order 2, which diffusers recommends for guided sampling; likewise for UniPC.
_DPMSOLVER = _scheduler(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", solver_order=2)
# HeunDiscreteScheduler accepts no denoised samples.
_STOCK_HEUN = _scheduler(HeunDiscreteScheduler, prediction_type="epsilon")
_UNIPC = _scheduler(UniPCMultistepScheduler, solver_order=2, solver_type="bh2")
# Of the solvers of one setting, the first that supports the teacher has the rows.
SOLVERS = (
    Solver("teacher-ddim", "DDIMScheduler", "ddim_steps", _why_no_stock, _scheduler(DDIMScheduler)),
    Solver(
        "teacher-ddim",
        "CogVideoXDDIMScheduler",
        "ddim_steps",
        _why_no_cogvideox,
        _scheduler(CogVideoXDDIMScheduler),
    ),
    Solver("teacher-euler", "Euler's method on the teacher's grid", "ddim_steps", _why_no_euler, _on_grid("euler")),
    Solver("teacher-dpmsolver++", "DPMSolverMultistepScheduler (2M)", "dpmsolver_steps", _why_no_stock, _DPMSOLVER),
    Solver("teacher-unipc", "UniPCMultistepScheduler (order 2, bh2)", "unipc_steps", _why_no_stock, _UNIPC),
    Solver("teacher-heun", "HeunDiscreteScheduler", "heun_steps", _why_no_stock_heun, _STOCK_HEUN, 2),
    Solver("teacher-heun", "Heun's method on the teacher's grid", "heun_steps", _why_no_heun, _on_grid("heun"), 2),
)
