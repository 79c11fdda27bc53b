"""Distribution matching of affine students of a Gaussian: every gradient is the derivative of what it is named after.

The generated distribution is Gaussian, so the critic has a closed form, and expectations are sums over nodes of a
quadrature: nothing is random. The derivatives are central differences of formulas in one variable.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fmm_distill.core.flow_map import LearnedFlowMap
from fmm_distill.core.time_axis import LinearClock
from fmm_distill.losses import (
    DistributionMatching,
    FlowGeneratorMatching,
    MatchingLoss,
    NoisedSamples,
    RealData,
    Rollout,
    ScoreIdentityDistillation,
    ScoreImplicitMatching,
    critic_loss,
    matching_losses,
)
from fmm_distill.teachers.closed_form import Gaussian

MEAN, STD = 0.7, 0.4
THETA = torch.tensor([0.45, 0.3, -0.2, -0.5, 0.25, 0.35], dtype=torch.float64)
# Number of steps and point of the grid at which the rollout leaves its first jump; jumps with gradient: all.
ROLLOUTS = [(1, 0, "all"), (2, 0, "all"), (2, 1, "all"), (3, 1, "all"), (1, 0, "last"), (4, 2, "last")]
GRIDS = {1: [1.0, 0.0], 2: [1.0, 0.55, 0.0], 3: [1.0, 0.7, 0.3, 0.0], 4: [1.0, 0.8, 0.5, 0.2, 0.0]}


class Affine(LearnedFlowMap):
    """A map that is affine in x, whose coefficients are affine in both times."""

    clock = LinearClock()
    t_max = 1.0

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta.clone())

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        t, h = t[:, None], h[:, None]
        slope, offset = self.theta[:3], self.theta[3:]
        return (slope[0] + slope[1] * t + slope[2] * (t - h)) * x + offset[0] + offset[1] * t + offset[2] * (t - h)


def jump(theta, t, r):
    """Factor and offset of one jump."""
    slope, offset = (float(part @ torch.tensor([1.0, t, r], dtype=torch.float64)) for part in (theta[:3], theta[3:]))
    return 1 - (t - r) * slope, -(t - r) * offset


def generated(theta, steps, k, gradient, early=None):
    """Mean and deviation of a rollout's samples; ``early`` are the parameters of jumps without gradient."""
    grid = GRIDS[steps]
    times = [grid[0]] + ([grid[k]] if k else [])
    if gradient == "all" and k < steps - 1:
        times.append(grid[k + 1])
    times.append(grid[-1])
    mean, std = 0.0, 1.0
    for i, (t, r) in enumerate(pairwise(times)):
        held = gradient == "last" and i < len(times) - 2 and early is not None
        factor, offset = jump(early if held else theta, t, r)
        mean, std = factor * mean + offset, factor * std
    return mean, abs(std)


def velocity(mean, std, t):
    """Slope and offset in x of the velocity at t of data N(mean, std^2), from a regression of eps - x_0 on x_t."""
    variance = (1 - t) ** 2 * std**2 + t**2
    slope = (t - (1 - t) * std**2) / variance
    return slope, -mean - slope * (1 - t) * mean


def marginal(mean, std, t):
    return (1 - t) * mean, np.sqrt((1 - t) ** 2 * std**2 + t**2)


TIMES = np.polynomial.legendre.leggauss(24)
NODES = np.polynomial.hermite_e.hermegauss(48)


def nodes(low=0.02, high=0.98):
    """Times of the noise and their weights, of the uniform distribution on [low, high]."""
    return low + (high - low) * (TIMES[0] + 1) / 2, TIMES[1] / 2


def normal():
    return NODES[0], NODES[1] / math.sqrt(2 * math.pi)


def expectation(loss, flow_map, steps, k, gradient, critic, teacher=None):
    """The mean of a loss over the noise of the samples, the fresh noise and the time."""
    (t, in_t), (z, in_z) = nodes(*loss.times), normal()
    index = np.stack(np.meshgrid(*(np.arange(len(part)) for part in (t, z, z)), indexing="ij")).reshape(3, -1)
    weight = torch.tensor(in_t[index[0]] * in_z[index[1]] * in_z[index[2]])
    start, noise = (torch.tensor(z[row])[:, None] for row in index[1:])
    rollout = Rollout(steps=(steps,), gradient=gradient)
    x_0 = rollout(flow_map, start, torch.tensor(GRIDS[steps], dtype=torch.float64), k)
    samples = NoisedSamples(x_0, noise, torch.tensor(t[index[0]]), None)
    return (weight * loss(samples, teacher or gaussian(MEAN, STD), critic)).sum()


def gaussian(mean, std):
    return Gaussian(torch.tensor([mean], dtype=torch.float64), std).velocity


def gradient_of(loss, rollout, critic=None, teacher=None):
    flow_map = Affine(THETA)
    critic = critic or gaussian(*generated(THETA, *rollout))
    expectation(loss, flow_map, *rollout, critic, teacher).backward()
    return flow_map.theta.grad.numpy()


def derivative(divergence, rollout):
    """Central differences of a function of the samples' mean and deviation, in the parameters of the student."""
    step, found = 1e-5, []
    for i in range(len(THETA)):
        change = torch.zeros_like(THETA)
        change[i] = step
        ends = [divergence(*generated(THETA + sign * change, *rollout, early=THETA)) for sign in (1, -1)]
        found.append((ends[0] - ends[1]) / (2 * step))
    return np.array(found)


def difference(mean, std, t):
    """Slope and offset of v_T - v_F."""
    (slope, offset), (other, start) = velocity(MEAN, STD, t), velocity(mean, std, t)
    return slope - other, offset - start


def squared(of, under, t):
    """E |v_T - v_F|^2 with v_F of one Gaussian and x_t of another."""
    slope, offset = difference(*of, t)
    center, spread = marginal(*under, t)
    return (slope * center + offset) ** 2 + slope**2 * spread**2


def pseudo_huber(constant):
    def mean_distance(of, under, t):
        z, in_z = normal()
        slope, offset = difference(*of, t)
        center, spread = marginal(*under, t)
        d = slope[:, None] * (center[:, None] + spread[:, None] * z) + offset[:, None]
        return ((np.sqrt(d**2 + constant**2) - constant) * in_z).sum(1)

    return mean_distance


def fisher(loss, distance, rollout):
    """The sum whose derivative is a loss of the family: v_F moves and x_t is held, plus A times the other way round."""
    now = generated(THETA, *rollout)
    t, weight = nodes(*loss.times)
    weight = weight * t**loss.time_power

    def total(mean, std):
        moved = (mean, std)
        return float((weight * (distance(moved, now, t) + loss.balance * distance(now, moved, t))).sum())

    return total


CASES = {
    "flow_generator_matching": (FlowGeneratorMatching(), squared),
    "score_implicit_matching": (ScoreImplicitMatching(constant=0.5), pseudo_huber(0.5)),
    "score_implicit_matching, squared": (ScoreImplicitMatching(distance="squared"), squared),
    "score_identity_distillation": (ScoreIdentityDistillation(weight="none"), squared),
    "A = 1, pseudo-Huber": (
        DistributionMatching(
            divergence="fisher", balance=1, distance="pseudo_huber", constant=0.5, weight="none", time_power=1
        ),
        pseudo_huber(0.5),
    ),
}


@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("name", CASES)
def test_a_gradient_of_the_fisher_family_is_the_derivative_of_its_divergence(name, rollout):
    loss, distance = CASES[name]
    found, expected = gradient_of(loss, rollout), derivative(fisher(loss, distance, rollout), rollout)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-8)


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_with_a_balance_of_1_it_is_the_complete_derivative(rollout):
    t, weight = nodes()

    def divergence(mean, std):
        return float((weight * squared((mean, std), (mean, std), t)).sum())

    found = gradient_of(FlowGeneratorMatching(), rollout)
    np.testing.assert_allclose(found, derivative(divergence, rollout), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_the_gradient_of_kl_is_that_of_the_reverse_divergence(rollout):
    loss = DistributionMatching(weight="none")
    t, weight = nodes(*loss.times)

    def divergence(mean, std):
        (center, spread), (other, scale) = marginal(mean, std, t), marginal(MEAN, STD, t)
        ratio = (spread / scale) ** 2
        reverse = ((ratio - np.log(ratio) - 1) + ((center - other) / scale) ** 2) / 2
        return float((weight * (t / (1 - t)) ** 2 * reverse).sum())

    found, expected = gradient_of(loss, rollout), derivative(divergence, rollout)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("name", ["kl", *CASES])
def test_no_gradient_where_the_samples_have_the_distribution_of_the_data(name, rollout):
    loss = DistributionMatching(weight="none") if name == "kl" else CASES[name][0]
    teacher = gaussian(*generated(THETA, *rollout))
    assert np.abs(gradient_of(loss, rollout, teacher=teacher)).max() < 1e-12
    # Whatever the samples' distribution is, the family's loss has mean 0 for a critic equal to the teacher.
    assert float(expectation(loss, Affine(THETA), *rollout, gaussian(MEAN, STD)).detach()) == pytest.approx(
        0, abs=1e-12
    )


@pytest.mark.parametrize(
    "loss", [DistributionMatching(weight="none"), FlowGeneratorMatching()], ids=lambda loss: loss.name
)
def test_a_sample_that_is_still_noisy_has_another_gradient(loss):
    """The trap of a rollout that stops after its random step: the test above fails for it."""
    rollout, flow_map = (3, 1, "all"), Affine(THETA)
    critic = gaussian(*generated(THETA, *rollout))

    class Stopped(Affine):
        def __call__(self, x, t, r, cond=None):
            return x if bool((r == 0).all()) else super().__call__(x, t, r, cond)

    stopped = Stopped(THETA)
    expectation(loss, flow_map, *rollout, critic).backward()
    expectation(loss, stopped, *rollout, critic).backward()
    assert (stopped.theta.grad - flow_map.theta.grad).abs().max() > 0.05


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_samples_are_at_the_end_of_the_grid(rollout):
    steps, k, gradient = rollout
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    grid = torch.tensor(GRIDS[steps], dtype=torch.float64)
    x_0 = Rollout(steps=(steps,), gradient=gradient)(Affine(THETA), z, grid, k)
    mean, std = generated(THETA, *rollout)
    assert std > 0
    torch.testing.assert_close(x_0.detach(), mean + std * z, rtol=1e-12, atol=1e-12)


REAL = RealData(a=0.85, b=0.7)
LINE, SPACING = np.linspace(-12, 12, 4801, retstep=True)


def mixture(p, t, real=REAL):
    """Density that both velocities are compared on, and the critic's optimum, at points of the line."""
    densities, velocities = [], []
    for mean, std in (p, (MEAN, STD)):
        center, spread = marginal(mean, std, t)
        densities.append(np.exp(-(((LINE - center) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi)))
        slope, offset = velocity(mean, std, t)
        velocities.append(slope * LINE + offset)
    density = real.a * densities[0] + (1 - real.a) * densities[1]
    flux = real.b * densities[0] * velocities[0] + (1 - real.b) * densities[1] * velocities[1]
    # Far from both, every density underflows.
    return density, flux / np.maximum(density, 1e-300), velocities[1]


def optimum(p, real=REAL):
    """The critic's optimum as a velocity field with a graph in x."""

    def field(x, t, cond=None):
        t, total, flux = t[:, None], 0.0, 0.0
        for (mean, std), a, b in ((p, real.a, real.b), ((MEAN, STD), 1 - real.a, 1 - real.b)):
            variance = (1 - t) ** 2 * std**2 + t**2
            density = (-((x - (1 - t) * mean) ** 2) / (2 * variance)).exp() / variance.sqrt()
            slope = (t - (1 - t) * std**2) / variance
            total = total + a * density
            flux = flux + b * density * (slope * (x - (1 - t) * mean) - mean)
        return flux / total

    return field


def test_with_images_the_gradient_is_that_of_the_difference_on_the_mixture():
    rollout, loss = (2, 0, "all"), FlowGeneratorMatching(real=REAL)
    t, weight = nodes(*loss.times)

    def divergence(mean, std):
        total = 0.0
        for time, in_time in zip(t, weight, strict=True):
            density, best, of_data = mixture((mean, std), time)
            total += in_time * float((density * (of_data - best) ** 2).sum()) * SPACING
        return total

    found = gradient_of(loss, rollout, critic=optimum(generated(THETA, *rollout)))
    expected = derivative(divergence, rollout)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def noised(mean, std, t):
    """Every pair of nodes of clean samples and noise at a time, and its weight."""
    z, in_z = normal()
    clean, noise = (part.reshape(-1, 1) for part in np.meshgrid(mean + std * z, z, indexing="ij"))
    weight = torch.tensor(np.outer(in_z, in_z).reshape(-1))
    time = torch.full((len(clean),), t, dtype=torch.float64)
    return NoisedSamples(torch.tensor(clean), torch.tensor(noise), time, None), weight


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("real", [None, REAL], ids=["generated", "with images"])
def test_the_critics_loss_has_its_minimum_at_its_optimum(real, t):
    p = (-0.4, 0.9)
    samples, weight = noised(*p, t)
    images = noised(MEAN, STD, t)[0] if real else None
    best = optimum(p) if real else gaussian(*p)

    def mean_loss(change, size):
        def critic(x, time, cond=None):
            return best(x, time) + size * change(x)

        return float((weight * critic_loss(critic, samples, images, real)).sum())

    for change in (torch.ones_like, lambda x: x, torch.sin, lambda x: x**2):
        here, ends = mean_loss(change, 0.0), [mean_loss(change, size) for size in (0.1, -0.1)]
        # A parabola in the size: equal ends mean that its minimum is at 0.
        assert ends[0] == pytest.approx(ends[1], rel=1e-5)
        assert min(ends) > here + 1e-4


def test_every_loss_of_the_package_is_tested_here():
    classes = {type(loss) for loss, _ in CASES.values()}
    assert classes == set(matching_losses().values())
    assert all(issubclass(kind, MatchingLoss) for kind in classes)
