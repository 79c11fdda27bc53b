"""The first step of a recorded pipeline, compared with ours: names, signs and scales that agree with it are right."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import diffusers
import torch

from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import FlowMatching, VariancePreserving
from fmm_distill.core.time_axis import expand
from fmm_distill.teachers.prompted.call import scheduler_times

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.schedules import Schedule
    from fmm_distill.teachers.prompted.call import RecordedCall
    from fmm_distill.teachers.recording import Recording
    from fmm_distill.teachers.scheduler import ScheduleSpec

__all__ = ["euler_scheduler", "is_changed_between_steps", "step_error"]

# Their first step is an Euler step on the time axis: solvers of higher order start with one, too.
_EULER_FIRST = (
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
# Switches that change a step, and the values that turn them off.
_PLAIN = {"clip_sample": False, "stochastic_sampling": False, "thresholding": False}


def euler_scheduler(scheduler: Any, schedule: Schedule) -> Any | None:  # noqa: ANN401 diffusers classes
    """Return a stock scheduler with the same levels whose first step is an Euler step; None: that of this one is."""
    name, config = type(scheduler).__name__, scheduler.config
    if name in _EULER_FIRST:
        changes = {key: value for key, value in _PLAIN.items() if config.get(key, value) != value}
        if "sde" in config.get("algorithm_type", ""):
            changes["algorithm_type"] = config["algorithm_type"].removeprefix("sde-")
        return type(scheduler).from_config(config, **changes) if changes else None
    if isinstance(schedule, VariancePreserving):
        kind = diffusers.CogVideoXDDIMScheduler if name.startswith("CogVideoX") else diffusers.DDIMScheduler
        made = kind.from_config(config, timestep_spacing="trailing", **_PLAIN)
        if "variance_type" in config:
            # Some pipelines split a learned variance off unless their scheduler takes it, which this one does not.
            made.register_to_config(variance_type="fixed_small")
        return made
    return diffusers.EDMEulerScheduler.from_config(config)


@torch.no_grad()
def step_error(
    recording: Recording, spec: ScheduleSpec, call: RecordedCall, network: nn.Module, cond: Conditioning
) -> float:
    """Return the difference between the network's second input and our Euler step from the first one.

    It is relative to the length of the step, so that a velocity of the wrong sign has an error of 2.
    """
    parametrization = Parametrization(spec.schedule, spec.prediction, call, spec.sigma_data)
    t, r = _first_times(recording, spec)
    own = scheduler_times(recording, spec)[0].float()
    (x, start), (after, end) = (
        _on_axis(parametrization, call.sample_of(each.arguments), time)
        for each, time in zip(recording.calls, (t, r), strict=False)
    )

    def at_own_time(network: nn.Module, x: Tensor, time: Tensor, cond: Conditioning | None, h: Tensor | None) -> Tensor:
        # Schedulers round timesteps to integers: the network gets the time of its pipeline.
        return call(network, x, own.expand(len(x)), cond, h)

    velocity = replace(parametrization, call=at_own_time).velocity(network, x, start, cond)
    moved = x - expand(start - end, x) * velocity
    return float((moved - after).abs().max() / (after - x).abs().max())


def is_changed_between_steps(recording: Recording) -> bool:
    """Return whether the second step does not start from what the scheduler returned in the first."""
    after, sample = recording.steps[0].after, recording.steps[1].sample
    return after is not None and after.shape == sample.shape and not torch.equal(after, sample)


def _on_axis(parametrization: Parametrization, given: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Return a network's input in the coordinates of the time axis, and its time, one per sample."""
    time = torch.full((len(given),), t, dtype=torch.float64)
    spread, sigma = parametrization.sigma_data, parametrization.schedule.alpha_sigma(time)[1]
    # The input of a preconditioned network is divided by the standard deviation of the samples.
    size = torch.ones_like(sigma) if spread is None else (sigma.square() + spread**2).sqrt()
    return given.float() * expand(size / parametrization.schedule.scale(time), given.float()), time


def _first_times(recording: Recording, spec: ScheduleSpec) -> tuple[float, float]:
    """Return the times of the first two calls of the network."""
    schedule, steps = spec.schedule, recording.steps[:2]
    levels = recording.sigmas[:2]
    if isinstance(schedule, FlowMatching):
        t, r = (1 - sigma if spec.inverted else sigma for sigma in levels)
        return t, r
    if levels:
        # Noise levels are sigma / alpha, in schedulers of variance-preserving teachers too.
        t, r = (1.0 if math.isinf(sigma) else sigma / (1 + sigma) for sigma in levels)
        return t, r
    timesteps = torch.tensor([step.timestep for step in steps]).round().long()
    t, r = cast("VariancePreserving", schedule).time(timesteps).tolist()
    return t, r
