"""The losses as their papers write them: jumps, differences of jumps, and a frozen copy where gradients stop.

Each takes settings, the map, its frozen copy, an average, and the batch, and returns the residuals whose squared
norms are the loss.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from fmm_distill.core.flow_map import FlowMap, diagonal
from fmm_distill.core.solvers import solve
from fmm_distill.core.time_axis import expand


class Square:
    """A clock that is not the time itself."""

    def warp(self, t):
        return t.square()

    def dwarp_dt(self, t):
        return 2 * t


class Net(FlowMap, nn.Module):
    """A smooth map of events of shape [2, 3] with weights, the same ones for the same seed."""

    clock = Square()
    t_max = 1.0

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64) / 2)
        self.time = nn.Parameter(torch.randn(2, 6, generator=generator, dtype=torch.float64))

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        flat = x.flatten(1)
        return torch.tanh(flat @ self.mix + expand(t, flat) * self.time[0] + expand(h, flat) * self.time[1]).view_as(x)


def teacher(x, t, cond=None):
    return torch.sin(2 * x + expand(t, x)) - 0.5 * x.flip(-1)


TINY = 1e-4


def moving_end(flow_map, x, t, r):
    return (flow_map(x, t, r + TINY) - flow_map(x, t, r - TINY)) / (2 * TINY)


def moving_start(flow_map, x, t, r, v, rate=1):
    return (flow_map(x + TINY * v, t + rate * TINY, r) - flow_map(x - TINY * v, t - rate * TINY, r)) / (2 * TINY)


def steady(g, settings):
    if settings.clamp_tangent:
        g = g.clamp(-settings.clamp_tangent, settings.clamp_tangent)
    if settings.normalize_tangent:
        g = torch.stack([sample / (sample.square().sum().sqrt() + 0.1) for sample in g])
    return g


def lagrangian_as_written(settings, live, still, average, x, t, r, share):
    v = {"teacher": teacher, "self": diagonal(live if settings.stop_gradient == "nowhere" else still)}[
        settings.velocity
    ]
    if settings.stop_gradient == "target":
        u, u_still = live.mean_velocity(x, t, r), still.mean_velocity(x, t, r)
        return [u - u_still + moving_end(still, x, t, r) - v(still(x, t, r), r)]
    return [moving_end(live, x, t, r) - v((live if settings.stop_gradient == "nowhere" else still)(x, t, r), r)]


def eulerian_as_written(settings, live, still, average, x, t, r, share):
    stop = getattr(settings, "stop_gradient", "target")
    v = diagonal(live if stop == "nowhere" else still)(x, t) if settings.velocity == "self" else teacher(x, t)
    if stop == "nowhere":
        return [moving_start(live, x, t, r, v)]
    if stop == "teacher_input":
        return [moving_start(live, x, t, r, torch.zeros_like(x)) + moving_start(still, x, t, r, v, rate=0)]
    u, u_still = live.mean_velocity(x, t, r), still.mean_velocity(x, t, r)
    unscaled = u_still - v
    if getattr(settings, "step", 0) and settings.name == "eulerian":
        s = torch.maximum(t - settings.step / live.clock.dwarp_dt(t), r)
        field = diagonal(still) if settings.velocity == "self" else teacher
        x_s = solve(field, x, torch.stack([t, s]), method=settings.solver)
        whole = (still(x_s, s, r) - still(x, t, r)) / expand(t - s, x)
    else:
        whole = -moving_start(still, x, t, r, v)
    return [u - u_still + steady(unscaled + settings.tangent_scale * (whole - unscaled), settings)]


def progressive_as_written(settings, live, still, average, x, t, r, share):
    source = {"student": still, "average": average, "frozen": average, "ode": teacher}[settings.target]
    pieces, middle = getattr(settings, "pieces", 2), getattr(settings, "middle", "half")
    times = [r + share * (t - r)] if middle == "uniform" else [t + (r - t) * i / pieces for i in range(1, pieces)]
    end = x
    for a, b in pairwise([t, *times, r]):
        if settings.target == "ode":
            method = getattr(settings, "solver", "euler")
            end = solve(teacher, end, torch.stack([a, b]), method=method)
        else:
            end = source(end, a, b)
    return [live.mean_velocity(x, t, r) - (x - end) / expand(t - r, x)]


def flow_map_matching_as_written(settings, live, still, average, x, t, r, share):
    v = teacher(x, t)
    x_r = x - expand(t - r, x) * v
    back = (share > 0.5) & (settings.directions == "both")
    (a, b), x_a = torch.where(back, torch.stack([t, r]), torch.stack([r, t])), torch.where(expand(back, x) > 0, x, x_r)
    y = live(x_a, a, b)
    return [moving_end(live, y, b, a) - v, live(y, b, a) - x_a]


def flow_matching_as_written(settings, live, still, average, x, t, r, share):
    return [live.mean_velocity(x, t, t) - teacher(x, t)]


def mean_flow_as_written(settings, live, still, average, x, t, r, share):
    if not settings.improved:
        return eulerian_as_written(settings, live, still, average, x, t, r, share)
    v = still.mean_velocity(x, t, t)
    change = v - still.mean_velocity(x, t, r) - moving_start(still, x, t, r, v)
    return [live.mean_velocity(x, t, r) + settings.tangent_scale * change - teacher(x, t)]


def consistency_as_written(settings, live, still, average, x, t, r, share):
    if not settings.step:
        return eulerian_as_written(settings, live, still, average, x, t, r, share)
    s = torch.maximum(t - settings.step, r)
    x_s = solve(teacher, x, torch.stack([t, s]), method=settings.solver)
    later = average if settings.target == "average" else still
    u, u_still = live.mean_velocity(x, t, r), still.mean_velocity(x, t, r)
    start = x - expand(t - r, x) * u_still
    jump = x_s - expand(s - r, x) * later.mean_velocity(x_s, s, r)
    return [u - u_still + steady((jump - start) / expand(t - s, x), settings)]


def consistency_trajectory_as_written(settings, live, still, average, x, t, r, share):
    source = average if settings.target == "average" else still
    s, zero = r + share * (t - r), torch.zeros_like(r)
    times = torch.stack([t + (s - t) * i / settings.solver_steps for i in range(settings.solver_steps + 1)])
    x_s = solve(teacher, x, times, method="heun")
    return [source(live(x, t, r), r, zero) - source(source(x_s, s, r), r, zero)]


def operator_regression_as_written(settings, live, still, average, x, t, r, share):
    times = torch.stack([t + (r - t) * i / settings.solver_steps for i in range(settings.solver_steps + 1)])
    return [live(x, t, r) - solve(teacher, x, times, method="rk4")]


def terminal_velocity_as_written(settings, live, still, average, x, t, r, share):
    source = average if settings.target == "average" else still
    v = teacher(x, t)
    x_r = x - expand(t - r, x) * v
    return [moving_end(live, x, t, r) - source.mean_velocity(still(x, t, r), r, r), live.mean_velocity(x_r, r, r) - v]


AS_WRITTEN = {
    "lagrangian": lagrangian_as_written,
    "eulerian": eulerian_as_written,
    "progressive": progressive_as_written,
    "flow_map_matching": flow_map_matching_as_written,
    "flow_matching": flow_matching_as_written,
    "mean_flow": mean_flow_as_written,
    "consistency": consistency_as_written,
    "consistency_trajectory": consistency_trajectory_as_written,
    "progressive_distillation": progressive_as_written,
    "operator_regression": operator_regression_as_written,
    "terminal_velocity": terminal_velocity_as_written,
}
