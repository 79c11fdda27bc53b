"""Exploding and flow matching schedules; the discrete one is in test_time_axis."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from fmm_distill.core.schedules import Angular, FlowMatching, VarianceExploding
from fmm_distill.errors import UserError
from fmm_distill.export.schedulers import make_scheduler
from fmm_distill.teachers.scheduler import read_scheduler

SCHEDULES = {
    "karras": VarianceExploding(0.002, 80.0),
    "exponential": VarianceExploding(0.01, 50.0, rho=math.inf, network_input="sigma"),
    "atan": VarianceExploding(0.3, 500.0, rho=math.inf, network_input="atan"),
    "flow": FlowMatching(),
    "shifted": FlowMatching(3.0),
    "told before": FlowMatching(6.0, uses_unshifted_time=True),
    "one timestep": FlowMatching(3.0, 1),
    "angular": Angular(),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def inside(schedule, count=50):
    return schedule.time_at(torch.linspace(0, 1, count, dtype=torch.float64))


def test_times_run_from_one_end_to_the_other(schedule):
    t = inside(schedule)
    assert (t.diff() > 0).all()
    assert float(t[0]) == pytest.approx(schedule.t_min, rel=1e-12)
    assert float(t[-1]) == pytest.approx(schedule.t_max, rel=1e-12)


def test_rate_is_the_derivative_of_position(schedule):
    t = inside(schedule)[1:-1].requires_grad_()
    (slope,) = torch.autograd.grad(schedule.warp(t).sum(), t)
    torch.testing.assert_close(schedule.dwarp_dt(t.detach()), slope, rtol=1e-10, atol=0)


def test_position_counts_equal_shares_equally(schedule):
    places = schedule.warp(inside(schedule))
    steps = places.diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-9, atol=0)
    assert float(places[-1]) == pytest.approx(1)


def test_the_grid_is_uniform_and_ends_at_data(schedule):
    for steps in (1, 2, 7):
        times = schedule.grid(steps)
        assert len(times) == steps + 1
        assert float(times[0]) == pytest.approx(schedule.t_max)
        assert times[-1] == 0
        jumps = -schedule.warp(times).diff()
        torch.testing.assert_close(jumps, torch.full_like(jumps, 1 / steps), rtol=1e-9, atol=1e-12)
        assert schedule.is_uniform(steps)
    for wrong in (0, schedule.num_timesteps + 1):
        with pytest.raises(UserError, match=f"{wrong} sampling steps; expected 1 to {schedule.num_timesteps}"):
            schedule.grid(wrong)


def test_the_axis_is_sigma_over_alpha_and_sigma(schedule):
    t = inside(schedule)
    alpha, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(sigma / (alpha + sigma), t)
    torch.testing.assert_close(schedule.scale(t), alpha + sigma)


def test_below_t_min_the_network_is_told_t_min(schedule):
    t = torch.tensor([schedule.t_min / 3, schedule.t_min], dtype=torch.float64)
    told = schedule.network_time(t)
    torch.testing.assert_close(told[0], told[1])


def test_what_the_network_is_told_is_what_stock_schedulers_tell_it():
    edm = EDMEulerScheduler()
    edm.set_timesteps(9)
    sigma = edm.sigmas[:-1].double()
    t = (sigma / (1 + sigma)).clamp_min(SCHEDULES["karras"].t_min)
    torch.testing.assert_close(SCHEDULES["karras"].network_time(t), edm.timesteps.double(), rtol=1e-5, atol=1e-5)
    # Karras's levels are equal shares of the way.
    places = SCHEDULES["karras"].warp(t)
    torch.testing.assert_close(places, torch.linspace(1, 0, 9, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(SCHEDULES["shifted"].grid(4), flow.sigmas.double(), rtol=1e-6, atol=0)
    told = SCHEDULES["shifted"].network_time(flow.sigmas[:-1].double())
    torch.testing.assert_close(told, flow.timesteps.double(), rtol=1e-6, atol=0)
    before = SCHEDULES["told before"].network_time(SCHEDULES["told before"].grid(4)[:-1])
    torch.testing.assert_close(before, torch.tensor([1000.0, 750, 500, 250], dtype=torch.float64))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.0, 1.0)])
def test_ends_that_are_none(low, high):
    with pytest.raises(UserError, match="expected 0 < min < max"):
        VarianceExploding(low, high)


def test_the_time_of_a_scheduler_with_one_timestep_is_the_level():
    schedule, plain = FlowMatching(3.0, 1), FlowMatching(3.0, 1000)
    t = inside(plain)
    assert schedule.t_min == plain.t_min
    torch.testing.assert_close(schedule.network_time(t), t)
    torch.testing.assert_close(1000 * schedule.network_time(t), plain.network_time(t))
    assert len(schedule.grid(8)) == 9


def test_a_shift_that_is_none():
    with pytest.raises(UserError, match="shift is 0"):
        FlowMatching(0)


@pytest.mark.parametrize("levels", ["karras", "exponential"])
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_a_stock_scheduler_of_exploding_levels_makes_equal_jumps(levels, steps):
    spec = read_scheduler(EDMEulerScheduler(sigma_schedule=levels), "here")
    teacher = SimpleNamespace(schedule=spec.schedule, scheduler_config=spec.config)
    made = make_scheduler(teacher, spec.prediction, steps)
    made.set_timesteps(steps)
    grid = spec.schedule.grid(steps)
    torch.testing.assert_close(made.sigmas.double(), grid / (1 - grid), rtol=1e-5, atol=0)
    assert len(made.timesteps) == steps
    # Without the number of steps one jump more, which is almost empty.
    stock = make_scheduler(teacher, spec.prediction)
    stock.set_timesteps(2)
    assert float(stock.sigmas[1]) == pytest.approx(0.002)
