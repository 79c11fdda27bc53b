"""Steps of stock schedulers, compared with Euler steps on the time axis."""

from __future__ import annotations

from itertools import pairwise

import diffusers
import torch
from torch.overrides import TorchFunctionMode

from fmm_distill.core.schedules import FlowMatching, VariancePreserving
from fmm_distill.core.time_axis import expand
from fmm_distill.teachers.stepped_samples import from_stepped


def euler_of(pipeline, teacher):
    """The stock scheduler of first order with the teacher's levels."""
    config = teacher.scheduler_config
    if isinstance(teacher.schedule, VariancePreserving):
        if "CogVideoX" in config["_class_name"]:
            return diffusers.CogVideoXDDIMScheduler.from_config(config, timestep_spacing="trailing")
        plain = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True}
        made = diffusers.DDIMScheduler.from_config(config, timestep_spacing="trailing", **plain)
        # A pipeline that splits a learned variance off unless its scheduler takes it.
        made.register_to_config(variance_type="fixed_small")
        return made
    if isinstance(teacher.schedule, FlowMatching):
        if type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
            return pipeline.scheduler
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=teacher.schedule.shift)
    return diffusers.EDMEulerScheduler.from_config(config)


def times_of(scheduler, schedule):
    """The scheduler's levels on the axis, data last."""
    if isinstance(schedule, VariancePreserving):
        return [*schedule.time(scheduler.timesteps.long()).tolist(), 0.0]
    sigmas = scheduler.sigmas.double()
    if isinstance(schedule, FlowMatching):
        return (1 - sigmas if scheduler.config.get("invert_sigmas") else sigmas).tolist()
    return (sigmas / (1 + sigmas)).tolist()


def check_steps(seen, teacher, scheduler, cond):
    """All steps but the last of a recorded run are Euler steps of the teacher's velocity."""
    times, event = times_of(scheduler, teacher.schedule), teacher.event_shape
    for i, (t, r) in enumerate(pairwise(times[:-1])):
        x, after = (from_stepped(seen.steps[k].sample, event, teacher.pipeline.positions) for k in (i, i + 1))
        start, end = (torch.full((len(x),), time, dtype=torch.float64) for time in (t, r))
        on_axis = x.float() / expand(teacher.schedule.scale(start), x.float())
        moved = on_axis - expand(start - end, on_axis) * teacher.velocity(on_axis, start, cond)
        ours = moved * expand(teacher.schedule.scale(end), moved)
        assert (ours - after).abs().max() < 1e-5 * after.abs().max().clamp_min(1)


class InDouble(TorchFunctionMode):
    """What a stock network casts to float32 in its forward stays in float64, so that differences have their digits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 or arg is torch.bfloat16 else arg for arg in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
