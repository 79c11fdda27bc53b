from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.core.time_axis import expand
from fmm_distill.errors import UserError
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student

STOCK = DDIMScheduler(timestep_spacing="trailing")
SCHEDULE = VariancePreserving(STOCK.alphas_cumprod)


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500, 1000])
def test_grid_that_divides_is_the_stock_one(steps):
    STOCK.set_timesteps(steps)
    times = SCHEDULE.grid(steps)
    assert torch.equal(times[:-1], SCHEDULE.time(STOCK.timesteps))
    assert times[-1] == 0
    # And its jumps are as long as one another, which the fold needs.
    lengths = -SCHEDULE.warp(times).diff()
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1 / steps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [3, 6, 7, 9, 11, 12, 15, 16, 30, 32, 47, 64, 99, 128, 300, 999])
def test_grid_that_does_not_divide_is_the_stock_one(steps):
    STOCK.set_timesteps(steps)
    times = SCHEDULE.grid(steps)
    assert torch.equal(times[:-1], SCHEDULE.time(STOCK.timesteps[:steps]))
    assert len(times) == steps + 1
    assert times[-1] == 0


@pytest.mark.parametrize("steps", [48, 96, 240, 61, 103])
def test_grid_where_the_stock_one_rounds_away(steps):
    # Stock counts down in steps of 1000 / N in floating point: 937.5 comes out below the half that it is, and now and
    # then there is an N + 1st timestep, -1. Ours stays within one timestep.
    STOCK.set_timesteps(steps)
    times = SCHEDULE.grid(steps)
    assert (SCHEDULE.timestep(times[:-1]) - STOCK.timesteps[:steps]).abs().max() <= 1 + 1e-9
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_wrong_number_of_steps(steps):
    with pytest.raises(UserError, match=f"{steps} sampling steps; expected 1 to 1000"):
        SCHEDULE.grid(steps)


@pytest.fixture
def student(teacher):
    student = Student.from_teacher(teacher)
    with torch.no_grad():
        student.network.jump_embedding[0].linear_2.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return student


@pytest.fixture
def noise(teacher):
    return torch.randn(3, *teacher.event_shape, generator=torch.Generator().manual_seed(1))


def test_one_step_is_one_jump_to_data(student, teacher, noise):
    t = torch.full((3,), student.schedule.t_max, dtype=torch.float64)
    with torch.no_grad():
        expected = student(teacher.prior(noise), t, 0 * t)
    assert torch.equal(sample(student, noise, 1), expected)
    assert not sample(student, noise, 1).requires_grad


def test_two_steps_are_two_jumps(student, teacher, noise):
    t = torch.full((3,), student.schedule.t_max, dtype=torch.float64)
    m = student.schedule.time(torch.full((3,), 499))
    with torch.no_grad():
        expected = student(student(teacher.prior(noise), t, m), m, 0 * t)
    assert torch.equal(sample(student, noise, 2), expected)
    assert not torch.allclose(expected, sample(student, noise, 1), atol=1e-3)


def test_samples_do_not_depend_on_their_neighbors(student, noise):
    alone = torch.cat([sample(student, noise[i : i + 1], 4) for i in range(3)])
    torch.testing.assert_close(sample(student, noise, 4), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_untrained_student_samples_as_the_stock_sampler_does(teacher, noise, steps):
    ddim = DDIMScheduler.from_config(teacher.scheduler_config, timestep_spacing="trailing", clip_sample=False)
    ddim.set_timesteps(steps)
    x = noise
    with torch.no_grad():
        for timestep in ddim.timesteps:
            x = ddim.step(teacher.network(x, timestep).sample, timestep, x).prev_sample
    # t_max to data without a second rescaling: at data the two coordinates are one.
    assert expand(teacher.schedule.scale(torch.zeros(1)), x).item() == 1
    torch.testing.assert_close(sample(Student.from_teacher(teacher), noise, steps), x, rtol=1e-4, atol=1e-4)
