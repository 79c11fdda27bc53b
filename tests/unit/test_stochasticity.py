"""Sampling with fresh noise: with the exact map of a Gaussian every strength has the distribution of the data."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from diffusers import DDPMScheduler

from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import Angular, FlowMatching, VarianceExploding, VariancePreserving
from fmm_distill.errors import UserError
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.closed_form import Gaussian
from fmm_distill.teachers.closed_form.gaussian import deviation

MEAN, STD = 0.7, 0.3
SCHEDULES = {
    "flow": FlowMatching(),
    "shifted": FlowMatching(3.0),
    "discrete": VariancePreserving(DDPMScheduler().alphas_cumprod),
    "angular": Angular(),
    "exploding": VarianceExploding(0.002, 80.0),
}
# As many as make the coefficients of at most ten inputs certain.
COORDINATES = 64


class ExactStudent(Gaussian):
    """The flow map of a Gaussian on the schedule of a teacher."""

    def __init__(self, schedule):
        super().__init__(torch.tensor(MEAN, dtype=torch.float64), STD)
        self.schedule, self.parametrization = schedule, Parametrization(schedule, "flow_prediction")
        self.equal_jumps = nullcontext


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def coefficients(student, steps, stochasticity):
    """Return the factor of the start, the constant, and the factors of the fresh noises, of which a sample is the sum.

    Every step of the exact map is affine. All coordinates have the same coefficients, and the noises are known from
    the generator: the coefficients are the solution of a linear system.
    """
    noise = torch.randn(1, COORDINATES, generator=seeded(1), dtype=torch.float64)
    generator = seeded(2)
    x = sample(student, noise, steps, stochasticity=stochasticity, generator=generator)
    again, fresh = seeded(2), []
    while not torch.equal(again.get_state(), generator.get_state()):
        fresh.append(torch.randn(1, COORDINATES, generator=again, dtype=torch.float64))
        assert len(fresh) <= 10
    start = student.parametrization.prior(noise)
    inputs = torch.cat([start, torch.ones_like(start), *fresh]).T
    solution = torch.linalg.lstsq(inputs, x.T).solution
    assert float((inputs @ solution - x.T).abs().max()) < 1e-11
    factor, constant, *others = solution.flatten().tolist()
    return factor, constant, others


@pytest.mark.parametrize("stochasticity", [0.0, 0.1, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_samples_have_the_mean_and_the_variance_of_the_data(name, steps, stochasticity):
    student, t_max = ExactStudent(SCHEDULES[name]), SCHEDULES[name].t_max
    factor, constant, fresh = coefficients(student, steps, stochasticity)
    # The exact marginal at t_max, which the prior is or approximates.
    start = float(deviation(torch.tensor(t_max, dtype=torch.float64), STD))
    assert factor * (1 - t_max) * MEAN + constant == pytest.approx(MEAN, abs=1e-10)
    variance = (factor * start) ** 2 + sum(one**2 for one in fresh)
    assert variance == pytest.approx(STD**2, abs=1e-10)
    # One fresh noise per step, none in the last one, which ends in data.
    assert len(fresh) == (steps - 1 if stochasticity else 0)
    assert all(abs(one) > 1e-6 for one in fresh[-1:])


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0, 4.0])
def test_times_of_the_caller_that_end_before_data(stochasticity):
    student, end = ExactStudent(FlowMatching()), 0.2
    times = torch.tensor([1.0, 0.9, 0.55, end], dtype=torch.float64)
    factor, constant, fresh = coefficients(student, times, stochasticity)
    assert constant == pytest.approx((1 - end) * MEAN, abs=1e-10)
    variance = factor**2 + sum(one**2 for one in fresh)
    assert variance == pytest.approx(((1 - end) * STD) ** 2 + end**2, abs=1e-10)
    assert len(fresh) == (3 if stochasticity else 0)


def test_one_is_the_noise_of_the_ancestral_sampler():
    """The posterior of DDPM: x at r, given x at t and the data, in variables of unit signal."""
    student = ExactStudent(SCHEDULES["exploding"])
    student.std = 0.0  # A point: the data are known.
    t, r = 0.8, 0.5
    factor, _, (fresh,) = coefficients(student, torch.tensor([t, r], dtype=torch.float64), 1.0)
    before, after = t / (1 - t), r / (1 - r)
    # Of noise of the deviation sigma_t the part sigma_r^2 / sigma_t^2 remains.
    assert fresh / (1 - r) == pytest.approx(math.sqrt(after**2 * (before**2 - after**2) / before**2), abs=1e-10)
    assert factor * (1 - t) / (1 - r) * before**2 == pytest.approx(after**2, abs=1e-10)


def test_much_noise_is_consistency_sampling():
    student = ExactStudent(FlowMatching())
    noise = torch.randn(2, 3, generator=seeded(1), dtype=torch.float64)
    made = sample(student, noise, 2, stochasticity=1e9, generator=seeded(2))
    t, r = (torch.full((2,), time, dtype=torch.float64) for time in (1.0, 0.5))
    data = student(noise, t, 0 * t)
    middle = 0.5 * data + 0.5 * torch.randn(2, 3, generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(made, student(middle, r, 0 * r), rtol=0, atol=1e-14)


def test_two_steps_preserve_as_much_of_the_noise_as_one():
    student = ExactStudent(FlowMatching())
    student.std = 0.0
    one, two = (torch.tensor(times, dtype=torch.float64) for times in ([0.9, 0.3], [0.9, 0.6, 0.3]))
    assert coefficients(student, two, 0.7)[0] == pytest.approx(coefficients(student, one, 0.7)[0], abs=1e-10)


@pytest.fixture
def student(teacher):
    student = Student.from_teacher(teacher)
    with torch.no_grad():
        student.network.jump_embedding[0].linear_2.weight.normal_(0, 0.3, generator=seeded())
    return student


@pytest.fixture
def noise(teacher):
    return torch.randn(3, *teacher.event_shape, generator=seeded(1))


def test_without_it_no_random_number_is_drawn_and_no_bit_is_another(student, noise):
    generator, state = seeded(3), torch.get_rng_state()
    before = generator.get_state()
    made = sample(student, noise, 4, stochasticity=0.0, generator=generator)
    x, times = student.parametrization.prior(noise), student.schedule.grid(4)
    with torch.no_grad():
        for i in range(4):
            x = student(x, times[i].expand(3), times[i + 1].expand(3))
    assert torch.equal(made, x)
    assert torch.equal(made, sample(student, noise, 4))
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_step_has_no_fresh_noise(student, noise):
    assert torch.equal(sample(student, noise, 1, stochasticity=0.5), sample(student, noise, 1))


def test_generators_of_samples_make_each_sample_its_own(student, noise):
    together = sample(student, noise, 4, stochasticity=0.5, generator=[seeded(i) for i in range(3)])
    alone = [sample(student, noise[i : i + 1], 4, stochasticity=0.5, generator=seeded(i)) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert (together - sample(student, noise, 4)).abs().max() > 1e-2


def test_the_jumps_of_a_batch_have_one_length(student, noise):
    lengths, own = [], student.mean_velocity_of_jump

    def seen(x, t, h, cond=None):
        lengths.append(h)
        return own(x, t, h, cond)

    student.mean_velocity_of_jump = seen
    sample(student, noise, 4, stochasticity=0.5)
    assert len(lengths) == 4
    assert all(len(set(h.tolist())) == 1 for h in lengths)
    # The last step ends in data as it does without noise; the others are longer.
    assert [float(h[0]) > 0.25 + 1e-9 for h in lengths] == [True, True, True, False]


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_what_is_no_strength(student, noise, value):
    with pytest.raises(UserError, match=r"stochasticity: expected a finite number of at least 0, got -?\w+"):
        sample(student, noise, 2, stochasticity=value)


def test_generators_that_are_not_one_per_sample(student, noise):
    with pytest.raises(UserError, match="generator: expected one, or a list of 3, one per sample; got 2"):
        sample(student, noise, 2, stochasticity=0.5, generator=[seeded(), seeded()])
