"""Every loss vanishes at the true flow map, its gradient too, and neither does anywhere near it."""

from __future__ import annotations

import pytest
import torch

from fmm_distill.flow_map import FlowMap
from fmm_distill.interpolant import expand
from fmm_distill.losses import LOSSES, EulerianSettings, LagrangianSettings
from tests.conformance.truths import TRUTHS, start

SETTINGS = {
    "lagrangian-teacher": LagrangianSettings(stop="teacher", derivative="exact"),
    "lagrangian-none": LagrangianSettings(stop="none", derivative="exact"),
    "lagrangian-target": LagrangianSettings(stop="target", derivative="exact"),
    "eulerian-none": EulerianSettings(stop="none", derivative="exact"),
    "eulerian-target": EulerianSettings(stop="target", derivative="exact"),
    "eulerian-normalised": EulerianSettings(stop="target", normalise_tangent=True, derivative="exact"),
}
EVERY = [pytest.mark.parametrize("setting", SETTINGS), pytest.mark.parametrize("name", TRUTHS)]


class Perturbed(FlowMap):
    """The true map, pushed off by ``theta`` times a smooth field of x, t and h."""

    def __init__(self, truth, theta):
        self.truth, self.clock, self.t_max = truth, truth.clock, truth.t_max
        self.theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        push = torch.sin(x + expand(t, x)) + expand(h, x) * torch.cos(2 * x) + 0.3
        return self.truth.mean_velocity_of_jump(x, t, h, cond) + self.theta * push


def loss_of(flow_map, truth, setting, x, t, r):
    settings = SETTINGS[setting]
    return LOSSES[settings.name](flow_map, truth.velocity, x, t, r, settings=settings)


@EVERY[0]
@EVERY[1]
def test_vanishes_at_the_truth(name, setting):
    truth, x, t, _, r = start(name)
    flow_map = Perturbed(truth, 0.0)
    loss = loss_of(flow_map, truth, setting, x, t, r)
    assert loss.shape == (8,)
    assert loss.dtype == torch.float64
    assert loss.max() < 1e-8
    (gradient,) = torch.autograd.grad(loss.mean(), flow_map.theta)
    assert gradient.abs() < 1e-8


@EVERY[0]
@EVERY[1]
def test_does_not_vanish_beside_it(name, setting):
    truth, x, t, _, r = start(name)
    flow_map = Perturbed(truth, 0.1)
    loss = loss_of(flow_map, truth, setting, x, t, r)
    assert loss.mean() > 1e-4
    (gradient,) = torch.autograd.grad(loss.mean(), flow_map.theta)
    assert gradient > 1e-3


@EVERY[0]
@EVERY[1]
def test_a_step_down_the_gradient_returns_to_the_truth(name, setting):
    """The sign that training needs: from either side theta moves towards 0."""
    truth, x, t, _, r = start(name)
    flow_map = Perturbed(truth, -0.1)
    (gradient,) = torch.autograd.grad(loss_of(flow_map, truth, setting, x, t, r).mean(), flow_map.theta)
    assert gradient < -1e-3


@pytest.mark.parametrize("setting", ["lagrangian-none", "eulerian-none"])
def test_gradient_without_stops_is_the_derivative_of_the_loss(setting):
    truth, x, t, _, r = start("modes-plane")

    def mean(theta):
        return loss_of(Perturbed(truth, theta), truth, setting, x, t, r).mean()

    flow_map = Perturbed(truth, 0.1)
    (gradient,) = torch.autograd.grad(loss_of(flow_map, truth, setting, x, t, r).mean(), flow_map.theta)
    difference = (mean(0.1 + 1e-5) - mean(0.1 - 1e-5)) / 2e-5
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-8)


def test_stopping_at_the_teacher_keeps_the_loss_and_drops_its_input_from_the_gradient():
    truth, x, t, _, r = start("gaussian-narrow")
    gradients, losses = [], []
    for setting in ("lagrangian-none", "lagrangian-teacher", "lagrangian-target"):
        flow_map = Perturbed(truth, 0.1)
        loss = loss_of(flow_map, truth, setting, x, t, r).mean()
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, flow_map.theta)[0].item())
    assert losses[1:] == pytest.approx(losses[:1] * 2)
    assert len({round(gradient, 6) for gradient in gradients}) == 3


@pytest.mark.parametrize("setting", SETTINGS)
def test_central_differences_give_the_same_loss(setting):
    truth, x, t, _, r = start("modes-plane")
    settings = SETTINGS[setting].model_copy(update={"derivative": "central"})
    flow_map = Perturbed(truth, 0.1)
    central = LOSSES[settings.name](flow_map, truth.velocity, x, t, r, settings=settings)
    torch.testing.assert_close(central, loss_of(flow_map, truth, setting, x, t, r), rtol=1e-3, atol=1e-6)
