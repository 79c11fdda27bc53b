from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from scipy.interpolate import PchipInterpolator

from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.core.time_axis import LinearClock, expand, velocity_from_prediction
from fmm_distill.errors import UserError

EVERY = pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])


def schedule_of(beta_schedule: str, **changes: object) -> VariancePreserving:
    return VariancePreserving(DDPMScheduler(beta_schedule=beta_schedule, **changes).alphas_cumprod)


def inside(schedule: VariancePreserving, count: int = 20001) -> torch.Tensor:
    return torch.linspace(0, schedule.t_max, count, dtype=torch.float64)


@EVERY
def test_knots_are_exact(beta_schedule):
    schedule = schedule_of(beta_schedule)
    timesteps = torch.arange(-1, 1000)
    torch.testing.assert_close(schedule.timestep(schedule.time(timesteps)), timesteps.double(), rtol=0, atol=1e-10)


@EVERY
def test_alpha_sigma_at_the_knots_are_the_schedulers(beta_schedule):
    scheduler = DDPMScheduler(beta_schedule=beta_schedule)
    schedule = VariancePreserving(scheduler.alphas_cumprod)
    alpha, sigma = schedule.alpha_sigma(schedule.time(torch.arange(1000)))
    products = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(alpha.square(), products, rtol=1e-10, atol=0)
    torch.testing.assert_close(sigma.square(), 1 - products, rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.scale(schedule.time(torch.arange(1000))), alpha + sigma)


@EVERY
def test_range(beta_schedule):
    schedule = schedule_of(beta_schedule)
    assert schedule.num_timesteps == 1000
    assert schedule.time(torch.tensor([-1, 0, 999])).tolist() == [0, schedule.t_min, schedule.t_max]
    assert 0 < schedule.t_min < schedule.t_max < 1
    assert schedule.timestep(torch.zeros(1)).item() == -1


@EVERY
def test_timestep_increases(beta_schedule):
    schedule = schedule_of(beta_schedule)
    t = inside(schedule)
    assert (schedule.timestep(t).diff() > 0).all()
    assert (schedule.dwarp_dt(t) > 0).all()


@EVERY
def test_timestep_is_the_monotone_cubic(beta_schedule):
    schedule = schedule_of(beta_schedule)
    knots = schedule.time(torch.arange(-1, 1000))
    reference = PchipInterpolator(knots.numpy(), torch.arange(-1, 1000).numpy())
    # The two rules differ at the first and last slope alone, so in the first and last interval.
    t = inside(schedule)
    t = t[(t >= knots[1]) & (t <= knots[-2])]
    torch.testing.assert_close(schedule.timestep(t), torch.from_numpy(reference(t.numpy())), rtol=0, atol=1e-8)


@EVERY
def test_rate_is_the_derivative_of_position(beta_schedule):
    schedule = schedule_of(beta_schedule)
    t = schedule.time(torch.arange(0, 999, 7)) + 1e-4 * torch.rand(143, dtype=torch.float64)
    step = 1e-9
    difference = (schedule.warp(t + step) - schedule.warp(t - step)) / (2 * step)
    torch.testing.assert_close(schedule.dwarp_dt(t), difference, rtol=1e-4, atol=1e-4)


@EVERY
def test_once_differentiable_across_the_knots(beta_schedule):
    schedule = schedule_of(beta_schedule)
    knots = schedule.time(torch.arange(0, 999))
    before, after = schedule.dwarp_dt(knots - 1e-13), schedule.dwarp_dt(knots + 1e-13)
    torch.testing.assert_close(before, after, rtol=1e-5, atol=0)
    # Not so for piecewise-linear interpolation, whose kinks this rules out.
    assert (schedule.time(torch.arange(-1, 1000)).diff().diff().abs() > 1e-9).any()


def test_position_is_the_share_of_timesteps():
    schedule = schedule_of("linear")
    position = schedule.warp(schedule.time(torch.tensor([-1, 499, 999])))
    torch.testing.assert_close(position, torch.tensor([-0.001, 0.499, 0.999], dtype=torch.float64))
    torch.testing.assert_close(schedule.dwarp_dt(torch.tensor([0.5]).float()), schedule.dwarp_dt(torch.tensor([0.5])))
    assert schedule.dwarp_dt(torch.tensor([0.5])).dtype == torch.float64


@pytest.mark.parametrize("count", [2, 3, 50])
def test_short_schedules(count):
    schedule = schedule_of("linear", num_train_timesteps=count)
    timesteps = torch.arange(-1, count)
    torch.testing.assert_close(schedule.timestep(schedule.time(timesteps)), timesteps.double(), rtol=0, atol=1e-10)
    assert (schedule.timestep(inside(schedule)).diff() > 0).all()


@pytest.mark.parametrize(
    "products",
    [
        torch.linspace(0.1, 0.9, 10),
        torch.linspace(0.9, -0.1, 10),
        torch.linspace(1.0, 0.1, 10),
        torch.tensor([0.9, 0.5, 0.5, 0.1]),
        torch.tensor([0.9, float("nan"), 0.1]),
        torch.tensor([0.5]),
    ],
    ids=["increasing", "negative", "one", "flat", "nan", "single"],
)
def test_unusable_schedules_are_refused(products):
    with pytest.raises(UserError, match="alphas_cumprod"):
        VariancePreserving(products)


def test_zero_terminal_snr_ends_in_pure_noise():
    schedule = VariancePreserving(DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod)
    assert schedule.t_max == 1
    end = torch.ones(1, dtype=torch.float64)
    assert [float(value) for value in schedule.alpha_sigma(end)] == [0, 1]
    assert schedule.scale(end) == 1
    timesteps = torch.arange(-1, 1000)
    torch.testing.assert_close(schedule.timestep(schedule.time(timesteps)), timesteps.double(), rtol=0, atol=1e-9)
    assert schedule.dwarp_dt(end).isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_velocity_from_prediction(prediction):
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(5, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    angle = torch.linspace(0.1, 1.4, 5, dtype=torch.float64)
    alpha, sigma = angle.cos(), angle.sin()
    a, s = expand(alpha, data), expand(sigma, data)
    output = {"epsilon": noise, "sample": data, "v_prediction": a * noise - s * data}[prediction]
    v = velocity_from_prediction(prediction, output, a * data + s * noise, alpha, sigma)
    torch.testing.assert_close(v, noise - data)


def test_expand_takes_shape_and_dtype():
    like = torch.zeros(2, 3, 4, 5)
    times = expand(torch.tensor([1.0, 2.0], dtype=torch.float64), like)
    assert times.shape == (2, 1, 1, 1)
    assert times.dtype == torch.float32
    assert (like + times)[1].unique().item() == 2


def test_linear_clock():
    t = torch.rand(3, dtype=torch.float64)
    assert torch.equal(LinearClock().warp(t), t)
    assert torch.equal(LinearClock().dwarp_dt(t), torch.ones_like(t))


def test_tables_stay_on_the_device_of_the_teacher(teacher):
    own = copy.deepcopy(teacher)
    own.to("meta")
    assert own.schedule.timestep(torch.ones(2, device="meta")).device.type == "meta"
    assert own.schedule.timestep(torch.ones(2)).device.type == "cpu"
    assert {kind.type for kind in own.schedule._tables} == {"cpu", "meta"}
