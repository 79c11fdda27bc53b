"""The adapter around a network that is right in closed form is right on the axis."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.core.solvers import endpoint, solve
from fmm_distill.core.time_axis import expand
from fmm_distill.errors import UserError
from tests.conformance.truths import PREDICTIONS, SCHEDULES, TRUTHS, exact_teacher

ORDERS = {"euler": 1, "heun": 2, "rk4": 4}


def along_the_axis(name, schedule, batch=60):
    """Points of the path at times over all of [t_min, t_max], both ends included."""
    truth, shape = TRUTHS[name]
    generator = torch.Generator().manual_seed(1)
    t = torch.linspace(schedule.t_min, schedule.t_max, batch, dtype=torch.float64)
    noise = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    center = truth.mean if name.startswith("gaussian") else truth.center
    return truth, center * expand(1 - t, noise) + expand((t**2 + ((1 - t) * truth.std) ** 2).sqrt(), noise) * noise, t


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["gaussian-image", "gaussian-narrow", "modes-plane", "modes-apart"])
def test_velocity(name, prediction, beta_schedule):
    teacher = exact_teacher(name, beta_schedule, prediction)
    truth, x, t = along_the_axis(name, teacher.schedule)
    torch.testing.assert_close(teacher.velocity(x, t), truth.velocity(x, t), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_velocity_in_single_precision(prediction, beta_schedule):
    # A noise prediction is amplified by 1/alpha at t_max (157 linear, 20 000 cosine), a sample prediction by
    # 1/sigma at t_min (about 100): rounding of 1e-7 grows by that much.
    teacher = exact_teacher("gaussian-image", beta_schedule, prediction)
    truth, x, t = along_the_axis("gaussian-image", teacher.schedule)
    single = teacher.velocity(x.float(), t)
    assert single.dtype == torch.float32
    amplification = {"epsilon": 1 / (1 - t), "sample": 1 / t, "v_prediction": torch.ones_like(t)}[prediction]
    error = (single - truth.velocity(x, t)).abs().flatten(1).amax(1)
    assert (error < 5e-6 * amplification + 1e-5).all()


@pytest.mark.parametrize("method", ORDERS)
@pytest.mark.parametrize(
    ("name", "prediction", "beta_schedule"),
    [
        ("gaussian-image", "epsilon", "linear"),
        ("modes-plane", "sample", "scaled_linear"),
        ("modes-plane", "v_prediction", "squaredcos_cap_v2"),
    ],
)
def test_solvers_reach_the_endpoint_with_their_order(name, prediction, beta_schedule, method):
    teacher = exact_teacher(name, beta_schedule, prediction)
    schedule, (truth, shape) = teacher.schedule, TRUTHS[name]
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ends = torch.full((2, 6), schedule.t_max, dtype=torch.float64)
    ends[1] = schedule.t_min
    exact = truth(x, ends[0], ends[1])

    def error(steps):
        times = torch.linspace(schedule.t_max, schedule.t_min, steps + 1, dtype=torch.float64)
        return (solve(teacher.velocity, x, times, method=method) - exact).norm()

    coarse, fine = error(40), error(80)
    assert coarse / fine == pytest.approx(2 ** ORDERS[method], rel=0.25)
    assert fine < {"euler": 0.2, "heun": 1e-3, "rk4": 1e-7}[method]


def test_endpoint_ends_with_the_denoised_sample():
    teacher = exact_teacher("modes-plane", "linear", "epsilon")
    truth, shape = TRUTHS["modes-plane"]
    schedule = teacher.schedule
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t_max, t_min = (torch.full((6,), time, dtype=torch.float64) for time in (schedule.t_max, schedule.t_min))
    last = truth(x, t_max, t_min)
    expected = truth.denoise(last, 1 - t_min, t_min)
    torch.testing.assert_close(endpoint(teacher.velocity, schedule, x, 60), expected, rtol=1e-5, atol=1e-5)
    # And that is data, but for the step that is straight.
    torch.testing.assert_close(expected, truth(x, t_max, 0 * t_max), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_euler_step_is_the_stock_ddim_step(prediction, beta_schedule, steps):
    teacher = exact_teacher("gaussian-image", beta_schedule, prediction)
    schedule = teacher.schedule
    ddim = DDIMScheduler(
        beta_schedule=beta_schedule, prediction_type=prediction, timestep_spacing="trailing", clip_sample=False
    )
    # The stock step in double precision: it takes roots of these.
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    ddim.final_alpha_cumprod = ddim.final_alpha_cumprod.double()
    ddim.set_timesteps(steps)
    stock = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = teacher.prior(stock)
    for timestep in ddim.timesteps:
        output = teacher.network(stock, timestep.double().expand(2)).sample
        stock = ddim.step(output, timestep, stock).prev_sample
        t, r = schedule.time(timestep.expand(2)), schedule.time((timestep - 1000 // steps).expand(2))
        x = solve(teacher.velocity, x, torch.stack([t[0], r[0]]), method="euler")
        torch.testing.assert_close(x * expand(schedule.scale(r), x), stock, rtol=1e-7, atol=1e-7)
    assert r[0] == 0


def test_prior_is_the_teachers_own_start():
    teacher = exact_teacher("gaussian-image", "linear", "epsilon")
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    t_max = torch.full((2,), teacher.schedule.t_max, dtype=torch.float64)
    torch.testing.assert_close(teacher.prior(noise) * expand(teacher.schedule.scale(t_max), noise), noise)


def test_unconditional_teacher_refuses_a_condition():
    teacher = exact_teacher("modes-plane", "linear", "epsilon")
    with pytest.raises(UserError, match="cond: expected none, got one"):
        teacher.velocity(torch.zeros(1, 2), torch.ones(1) / 2, Conditioning({"class_labels": torch.zeros(1)}))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_below_the_first_timestep_the_network_is_told_timestep_0(prediction):
    teacher = exact_teacher("modes-plane", "linear", prediction)
    seen = []
    teacher.network.register_forward_pre_hook(lambda module, args: seen.append(args[1].clone()))
    t = torch.tensor([teacher.schedule.t_min / 2, teacher.schedule.t_min, teacher.schedule.t_max], dtype=torch.float64)
    teacher.velocity(torch.zeros(3, 2, dtype=torch.float64), t)
    assert seen[0].tolist() == [0, 0, 999]
