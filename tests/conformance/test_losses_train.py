"""Every loss, minimized by a small network on a mixture, leads to that mixture's closed-form flow map."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn

from fmm_distill.core.flow_map import FlowMap, diagonal
from fmm_distill.core.time_axis import LinearClock, expand
from fmm_distill.losses import (
    Jump,
    Loss,
)
from fmm_distill.losses.consistency import Consistency
from fmm_distill.losses.consistency_trajectory import ConsistencyTrajectory
from fmm_distill.losses.eulerian import Eulerian
from fmm_distill.losses.flow_map_matching import FlowMapMatching
from fmm_distill.losses.flow_matching import FlowMatching
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.losses.mean_flow import MeanFlow
from fmm_distill.losses.operator_regression import OperatorRegression
from fmm_distill.losses.progressive import Progressive
from fmm_distill.losses.progressive_distillation import ProgressiveDistillation
from fmm_distill.losses.registry import BUILT_IN
from fmm_distill.losses.terminal_velocity import TerminalVelocity
from fmm_distill.teachers.closed_form import TwoModes
from fmm_distill.training.ema import averaged
from tests.conformance.truths import TRUTHS
from tests.slow import with_slow

# In float32, where the small network is quickest.
TRUTH = TwoModes(TRUTHS["modes-plane"][0].center.float(), TRUTHS["modes-plane"][0].std)


class Network(nn.Module, FlowMap):
    """A small perceptron of x, t and the jump's length."""

    clock = LinearClock()
    t_max = 1.0

    def __init__(self):
        super().__init__()
        sizes = (4, 64, 64, 64)
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(64, 2))

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        return self.layers(torch.cat([x, t.unsqueeze(1), h.unsqueeze(1)], 1))

    def forward(self, *jump):
        return FlowMap.__call__(self, *jump)


def anywhere(first, second, kind):
    """The triangle, and jumps from noise in half of the batch."""
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    return torch.where(kind < 0.5, 1.0, t), torch.where(kind < 0.5, second, r)


def from_noise(first, second, kind):
    return torch.ones_like(first), second


def to_data(first, second, kind):
    return torch.where(kind < 0.25, 1.0, first), torch.zeros_like(first)


def nowhere(first, second, kind):
    return first, first


def dyadic(first, second, kind):
    """1, 2, 4 or 8 jumps from noise to data: one of them."""
    count = torch.exp2((4 * first).floor())
    interval = (second * count).floor()
    return (interval + 1) / count, interval / count


@dataclass(frozen=True)
class Case:
    """A loss in its published use, and the error that training reaches.

    Attributes:
        bound: for the root mean square distance from the true endpoint, in data of standard deviation 0.87 a value.
        pairs: where jumps start and end.
        beside: the share of the batch that goes to flow matching.
        jumps: how many equal jumps lead from noise to data.
        steps: how long it trains.
        regression_steps: how long it learns the teacher's velocity first, as a copy of the teacher has: the end of an
            untrained jump is off the path, and a student that follows its own velocity there may run away.
    """

    settings: Loss
    bound: float
    pairs: object = anywhere
    beside: float = 0.0
    jumps: int = 1
    steps: int = 300
    regression_steps: int = 0


BATCH = 256
CASES = {
    "lagrangian": Case(Lagrangian(), 0.12),
    "lagrangian-none": Case(Lagrangian(stop_gradient="nowhere"), 0.11),
    "lagrangian-target": Case(Lagrangian(stop_gradient="target"), 0.10),
    "lagrangian-self": Case(Lagrangian(velocity="self"), 0.14, beside=0.5, regression_steps=100),
    "eulerian-none": Case(Eulerian(stop_gradient="nowhere"), 0.19),
    "eulerian-teacher": Case(Eulerian(stop_gradient="teacher_input"), 0.19),
    "eulerian-target": Case(Eulerian(stop_gradient="target"), 0.19),
    "eulerian-normalized": Case(Eulerian(normalize_tangent=True), 0.19, steps=600),
    "eulerian-self": Case(Eulerian(velocity="self"), 0.17, beside=0.5),
    "progressive-half": Case(Progressive(), 0.15, beside=0.5),
    "progressive-uniform": Case(Progressive(middle="uniform"), 0.15, beside=0.5),
    "progressive-average": Case(Progressive(target="average"), 0.15, beside=0.5),
    "progressive-ode": Case(Progressive(target="ode", pieces=4), 0.17),
    "flow_map_matching": Case(FlowMapMatching(), 0.18),
    "mean_flow": Case(MeanFlow(), 0.19, steps=500),
    "mean_flow-improved": Case(MeanFlow(improved=True), 0.19, steps=500),
    "consistency-continuous": Case(Consistency(), 0.10, to_data),
    "consistency-step": Case(Consistency(step=0.05, solver="heun"), 0.11, to_data),
    "consistency-average": Case(Consistency(step=0.05, solver="heun", target="average"), 0.19, to_data),
    "consistency-data": Case(Consistency(step=0.05, velocity="data"), 0.16, to_data),
    "consistency-data-continuous": Case(Consistency(velocity="data"), 0.14, to_data),
    "consistency_trajectory": Case(ConsistencyTrajectory(), 0.16, steps=600),
    "consistency_trajectory-student": Case(ConsistencyTrajectory(target="student"), 0.15, steps=600),
    "progressive_distillation-ode": Case(ProgressiveDistillation(target="ode"), 0.15, dyadic, jumps=8),
    "progressive_distillation-student": Case(ProgressiveDistillation(target="student"), 0.15, dyadic, 0.5),
    "progressive_distillation-average": Case(ProgressiveDistillation(), 0.15, dyadic, 0.5),
    "operator_regression": Case(OperatorRegression(solver_steps=4), 0.13, from_noise),
    "terminal_velocity-student": Case(TerminalVelocity(target="student"), 0.15, regression_steps=100),
    "terminal_velocity": Case(TerminalVelocity(), 0.15),
}
# Each loss, each place of the stopped gradient, each target and each source of the velocity. That every case has its
# minimum at the truth is tested in ``test_losses_at_truth``.
SOON = [
    *("lagrangian", "lagrangian-target", "lagrangian-self", "eulerian-none", "eulerian-target", "progressive-half"),
    *("progressive-average", "progressive-ode", "flow_map_matching", "mean_flow", "consistency-continuous"),
    *("consistency-average", "consistency-data", "consistency_trajectory", "progressive_distillation-student"),
    *("progressive_distillation-ode", "operator_regression", "terminal_velocity"),
]
# Flow matching trains no jump: its error is that of the velocity.
DIAGONAL_CASES = {
    "flow_matching-teacher": Case(FlowMatching(), 0.30, nowhere),
    "flow_matching-data": Case(FlowMatching(velocity="data"), 0.35, nowhere),
}


def mixture(batch, generator):
    sign = torch.randint(0, 2, (batch, 1), generator=generator) * 2.0 - 1
    return sign * TRUTH.center + TRUTH.std * torch.randn(batch, 2, generator=generator)


def network_of(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network()


def loss_of(network, average, settings, data, noise, t, r, share):
    sample = expand(1 - t, data) * data + expand(t, data) * noise
    velocity = {"teacher": TRUTH.velocity, "data": lambda x, t, cond=None: noise - data, "self": diagonal(network)}
    target_map = average if settings.target_network == "average" else None
    return settings(network, velocity[settings.velocity], Jump(sample, t, r, None, share, target_map))


def fit(network, case, generator):
    average = averaged(network, 0.95)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, case.steps)
    main = BATCH - round(case.beside * BATCH)
    for _ in range(case.steps):
        data, noise = mixture(BATCH, generator), torch.randn(BATCH, 2, generator=generator)
        first, second, kind, share = torch.rand(4, BATCH, generator=generator)
        draws = (data, noise, *case.pairs(first, second, kind), share)
        loss = loss_of(network, average.module, case.settings, *(part[:main] for part in draws)).sum()
        if case.beside:
            draws = (data, noise, *nowhere(first, second, kind), share)
            beside = loss_of(network, average.module, FlowMatching(), *(part[main:] for part in draws))
            loss = loss + beside.sum()
        optimizer.zero_grad()
        (loss / BATCH).backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(network)


def trained(case, seed=0):
    generator = torch.Generator().manual_seed(seed)
    network = network_of(seed)
    if case.regression_steps:
        fit(network, Case(FlowMatching(), 0, nowhere, steps=case.regression_steps), generator)
    fit(network, case, generator)
    return network


@torch.no_grad()
def endpoint_error(network, jumps):
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(99))
    x, times = noise, torch.linspace(1, 0, jumps + 1)
    for t, r in pairwise(times):
        x = network(x, t.expand(2000), r.expand(2000))
    exact = TRUTHS["modes-plane"][0](noise.double(), torch.ones(2000).double(), torch.zeros(2000).double())
    return (x - exact).square().mean().sqrt().item()


@torch.no_grad()
def velocity_error(network):
    generator = torch.Generator().manual_seed(99)
    t, data = torch.rand(2000, generator=generator), mixture(2000, generator)
    x = expand(1 - t, data) * data + expand(t, data) * torch.randn(2000, 2, generator=generator)
    return (diagonal(network)(x, t) - TRUTH.velocity(x, t)).square().mean().sqrt().item()


@pytest.mark.parametrize("name", with_slow(CASES, SOON))
def test_one_jump_from_noise_learns_the_exact_endpoint(name):
    case = CASES[name]
    error = endpoint_error(trained(case), case.jumps)
    assert error < case.bound
    assert error < endpoint_error(network_of(0), case.jumps) / 2


@pytest.mark.parametrize("name", DIAGONAL_CASES)
def test_the_diagonal_learns_the_velocity(name):
    case = DIAGONAL_CASES[name]
    error = velocity_error(trained(case))
    assert error < case.bound
    assert error < velocity_error(network_of(0)) / 2


def test_every_loss_is_trained():
    assert {case.settings.name for case in [*map(CASES.get, SOON), *DIAGONAL_CASES.values()]} == set(BUILT_IN)
