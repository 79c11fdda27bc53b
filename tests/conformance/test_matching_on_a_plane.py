"""The second stage with small networks on a plane: samples of one mode move to the two modes of the teacher."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fmm_distill.core.flow_map import LearnedFlowMap
from fmm_distill.core.time_axis import LinearClock
from fmm_distill.losses import NoisedSamples, Rollout, critic_loss, matching_losses
from fmm_distill.teachers.closed_form import Gaussian, TwoModes

TRUTH = TwoModes(torch.tensor([0.8, 0.6]), 0.25)
# The map that the student starts as has the mean of the data, and about its mean variance.
START = Gaussian(torch.zeros(2), 0.75)
# Both distributions are compared with noise of this deviation, for which a sample of points has a density.
BLUR = 0.15
GRIDS = {steps: torch.linspace(1, 0, steps + 1, dtype=torch.float64) for steps in (1, 2, 4)}


def change(inputs: int) -> nn.Sequential:
    """A network that returns 0 until it is trained."""
    network = nn.Sequential(nn.Linear(inputs, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    return network


class Student(LearnedFlowMap):
    clock = LinearClock()
    t_max = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.network = change(4)

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        times = torch.stack([t, h], 1).float()
        return START.mean_velocity_of_jump(x, *times.T) + self.network(torch.cat([x, times], 1))


class Critic(nn.Module):
    """A network that starts as the teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.network = change(3)

    def forward(self, x, t, cond=None):
        return teacher(x, t) + self.network(torch.cat([x, t[:, None].float()], 1))


def teacher(x, t, cond=None):
    return TRUTH.velocity(x, t.float())


def averaged(network, decay):
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)


def noised(loss, x_0):
    t = loss.times_at(LinearClock(), torch.rand(len(x_0), dtype=torch.float64))
    return NoisedSamples(x_0, torch.randn_like(x_0), t, None)


def match(student: Student, loss, steps: int = 200, warmup: int = 100, batch: int = 256) -> AveragedModel:
    """The second stage: the critic alone, then two of its updates before each step of the student."""
    torch.manual_seed(1)
    draws = torch.Generator().manual_seed(2)
    critic, rollout = Critic(), Rollout(steps=tuple(GRIDS))
    # The latest weights of the critic follow single batches.
    average, steady = averaged(student, 0.95), averaged(critic, 0.9)
    optimizers = [torch.optim.Adam(module.parameters(), lr=3e-3, betas=(0.0, 0.99)) for module in (student, critic)]

    def samples():
        number, k = rollout.draw(draws)
        return noised(loss, rollout(student, torch.randn(batch, 2), GRIDS[number], k))

    def update(module, of, value):
        of.zero_grad()
        value.mean().backward()
        of.step()
        module.update_parameters(student if module is average else critic)

    for step in range(-warmup, steps):
        for _ in range(1 if step < 0 else 2):
            with torch.no_grad():
                generated = samples()
            update(steady, optimizers[1], critic_loss(critic, generated))
        if step >= 0:
            update(average, optimizers[0], loss(samples(), teacher, steady))
    return average


def log_density(x, points, variance):
    """Log density of equally likely Gaussians around points."""
    squares = (x[:, None] - points).square().sum(2)
    return (-squares / (2 * variance)).logsumexp(1) - math.log(len(points) * 2 * math.pi * variance)


@torch.no_grad()
def divergence(student, steps: int, count: int = 4000) -> float:
    """The Kullback-Leibler divergence of blurred samples from blurred data: a lower bound of that of the samples."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2 * count, 2, generator=generator)
    for t, r in pairwise(GRIDS[steps]):
        x = student(x, t.float().expand(len(x)), r.float().expand(len(x)))
    # Half of the samples make the density, the other half the mean.
    points, fresh = x.split(count)
    fresh = fresh + BLUR * torch.randn(fresh.shape, generator=generator)
    modes = torch.stack([TRUTH.center, -TRUTH.center])
    of_data = log_density(fresh, modes, TRUTH.std**2 + BLUR**2)
    return float((log_density(fresh, points, BLUR**2) - of_data).mean())


def test_the_divergence_of_the_truth_is_near_0():
    assert abs(divergence(TRUTH, 1)) < 0.03


@pytest.mark.parametrize("name", matching_losses())
def test_samples_move_to_the_data_at_every_number_of_steps(name):
    torch.manual_seed(0)
    student = Student()
    before = [divergence(student, steps) for steps in GRIDS]
    average = match(student, matching_losses()[name]())
    after = [divergence(average.module, steps) for steps in GRIDS]
    assert min(before) > 2
    assert all(late < early / 2 for early, late in zip(before, after, strict=True))
