"""Every loss vanishes at the true flow map, its gradient too, and neither does anywhere near it."""

from __future__ import annotations

import pytest
import torch

from fmm_distill.core.flow_map import FlowMap, diagonal
from fmm_distill.core.time_axis import expand
from fmm_distill.data.starting_points import interpolant_velocity
from fmm_distill.losses import Jump, registered_losses
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
from tests.conformance.truths import TRUTHS, samples, start

EXACT = {"derivative": "exact"}
SETTINGS = {
    "lagrangian-teacher": Lagrangian(stop_gradient="teacher_input", **EXACT),
    "lagrangian-none": Lagrangian(stop_gradient="nowhere", **EXACT),
    "lagrangian-target": Lagrangian(stop_gradient="target", **EXACT),
    "eulerian-none": Eulerian(stop_gradient="nowhere", **EXACT),
    "eulerian-teacher": Eulerian(stop_gradient="teacher_input", **EXACT),
    "eulerian-target": Eulerian(stop_gradient="target", **EXACT),
    "eulerian-normalized": Eulerian(stop_gradient="target", normalize_tangent=True, **EXACT),
    "eulerian-clamped": Eulerian(stop_gradient="target", clamp_tangent=0.5, **EXACT),
    "flow_matching": FlowMatching(),
    "consistency-limit": Consistency(normalize_tangent=True, **EXACT),
    "progressive-half": Progressive(),
    "progressive-three": Progressive(pieces=3),
    "progressive-uniform": Progressive(middle="uniform"),
    "progressive_distillation": ProgressiveDistillation(target="student"),
}
SELF = {
    **{
        f"lagrangian-self-{stop}": Lagrangian(velocity="self", stop_gradient=stop, **EXACT)
        for stop in ("teacher_input", "nowhere", "target")
    },
    **{
        f"eulerian-self-{stop}": Eulerian(velocity="self", stop_gradient=stop, **EXACT)
        for stop in ("teacher_input", "nowhere", "target")
    },
}
# Solvers stand in the targets of these: what is left at the true map falls with the order of the solver.
SOLVED = {
    "progressive-euler": (lambda n: Progressive(target="ode", solver="euler", pieces=n), 1),
    "progressive-heun": (lambda n: Progressive(target="ode", solver="heun", pieces=n), 2),
    "consistency_trajectory": (lambda n: ConsistencyTrajectory(target="student", solver_steps=n), 2),
    "operator_regression": (lambda n: OperatorRegression(solver_steps=n), 4),
}
DATA = {
    "flow_matching": FlowMatching(velocity="data"),
    "mean_flow": MeanFlow(**EXACT),
    "mean_flow-improved": MeanFlow(improved=True, **EXACT),
    "flow_map_matching": FlowMapMatching(**EXACT),
    "flow_map_matching-generate": FlowMapMatching(directions="generate", **EXACT),
    "terminal_velocity": TerminalVelocity(target="student", **EXACT),
    "consistency-limit": Consistency(velocity="data", **EXACT),
}
SELF_DERIVED = list(SELF)
SELF |= {
    "progressive-own": Progressive(middle="uniform"),
    "progressive_distillation-own": ProgressiveDistillation(target="student"),
}
OURS = SETTINGS | SELF | DATA
# Losses of installed distributions that learn from the teacher.
SETTINGS |= {
    name: kind()
    for name, kind in registered_losses().items()
    if name not in BUILT_IN and not (kind().needs_data or kind().needs_velocity_term)
}
DERIVED = [name for name, settings in SETTINGS.items() if settings.differentiates]
EVERY = [pytest.mark.parametrize("setting", SETTINGS), pytest.mark.parametrize("name", TRUTHS)]


class Perturbed(FlowMap):
    """The true map, pushed off by ``theta`` times a smooth field of x, t and h."""

    def __init__(self, truth, theta):
        self.truth, self.clock, self.t_max = truth, truth.clock, truth.t_max
        self.theta = torch.as_tensor(theta, dtype=torch.float64).clone().requires_grad_()

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        push = torch.sin(x + expand(t, x)) + expand(h, x) * torch.cos(2 * x) + 0.3
        return self.truth.mean_velocity_of_jump(x, t, h, cond) + expand(self.theta, x) * push


def loss_of(flow_map, truth, setting, x, t, r):
    # What a frozen map teaches is the truth's; beside it a map's own jumps agree with themselves no worse.
    frozen = truth if setting in SETTINGS else None
    return value_of((SETTINGS | SELF)[setting], flow_map, truth.velocity, x, t, r, frozen)


def value_of(settings, flow_map, velocity, x, t, r, frozen=None):
    if settings.velocity == "self":
        velocity = diagonal(flow_map)
    u = torch.linspace(0.1, 0.9, len(t), dtype=t.dtype)
    return settings(flow_map, velocity, Jump(x, t, r, None, u, frozen))


def test_every_loss_of_this_package_stands_in_a_table():
    tables = [*OURS.values(), *(make(2) for make, _ in SOLVED.values())]
    assert {settings.name for settings in tables} == set(BUILT_IN)


@pytest.mark.parametrize("setting", SETTINGS | SELF)
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


@pytest.mark.parametrize("setting", DERIVED)
def test_central_differences_give_the_same_loss(setting):
    truth, x, t, _, r = start("modes-plane")
    settings = SETTINGS[setting].model_copy(update={"derivative": "central"})
    flow_map = Perturbed(truth, 0.1)
    central = value_of(settings, flow_map, truth.velocity, x, t, r)
    torch.testing.assert_close(central, loss_of(flow_map, truth, setting, x, t, r), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("setting", [*DERIVED, *SELF_DERIVED])
def test_central_differences_vanish_at_the_truth_to_their_accuracy(setting):
    truth, x, t, _, r = start("modes-plane")
    settings = (SETTINGS | SELF)[setting]
    central = settings.model_copy(update={"derivative": "central"})
    assert value_of(central, Perturbed(truth, 0.0), truth.velocity, x, t, r).max() < 1e-6


@pytest.mark.parametrize("name", ["gaussian-narrow", "modes-plane"])
@pytest.mark.parametrize("setting", SOLVED)
def test_what_a_solver_leaves_at_the_truth_falls_with_its_order(name, setting):
    make, order = SOLVED[setting]
    truth, x, t, _, r = start(name, batch=64)
    few, many = (
        value_of(make(n), Perturbed(truth, 0.0), truth.velocity, x, t, r).sqrt().mean().item() for n in (32, 64)
    )
    assert few / many == pytest.approx(2**order, rel=0.15)
    flow_map = Perturbed(truth, 0.0)
    (gradient,) = torch.autograd.grad(value_of(make(256), flow_map, truth.velocity, x, t, r).mean(), flow_map.theta)
    away = Perturbed(truth, 0.1)
    (restoring,) = torch.autograd.grad(value_of(make(256), away, truth.velocity, x, t, r).mean(), away.theta)
    assert restoring > 1e-3
    assert gradient.abs() < 0.05 * restoring


def expected_gradient(loss_of_map, truth, batch):
    """Mean and standard error of the gradient in theta at the true map, from the samples' own gradients."""
    flow_map = Perturbed(truth, torch.zeros(batch))
    (each,) = torch.autograd.grad(loss_of_map(flow_map).sum(), flow_map.theta)
    return each.mean().item(), each.std().item() / batch**0.5


@pytest.mark.parametrize("name", ["gaussian-narrow", "gaussian-unit", "modes-plane"])
@pytest.mark.parametrize("setting", DATA)
def test_losses_from_data_are_stationary_at_the_truth_in_expectation(name, setting):
    batch = 20000
    truth, data, noise, t, r = samples(name, batch)
    x = expand(1 - t, data) * data + expand(t, data) * noise
    velocity = interpolant_velocity(noise, data)
    mean, error = expected_gradient(lambda m: value_of(DATA[setting], m, velocity, x, t, r), truth, batch)
    assert abs(mean) < 4 * error
    # A wrong sign of v, or a derivative left out, moves the mean by more than this.
    assert error < 0.1


@pytest.mark.parametrize("form", ["right", "derivative-at-the-end", "eulerian-right", "eulerian-mixed-times"])
def test_the_two_published_errors_fail_where_the_right_formulas_hold(form):
    """The residuals that public codes had wrong do not vanish in expectation at the true map of a Gaussian."""
    batch = 20000
    truth, data, noise, t, r = samples("gaussian-narrow", batch)
    at = {time: expand(1 - s, data) * data + expand(s, data) * noise for time, s in (("t", t), ("r", r))}
    c = noise - data

    def in_target(x, start, end):
        return torch.func.jvp(lambda s: truth(x, start, s), (end,), (torch.ones_like(end),))[1]

    def in_source(x, start, end):
        return torch.func.jvp(lambda s: truth(x, s, end), (start,), (torch.ones_like(start),))[1]

    def push(x, start, end, along):
        return torch.func.jvp(lambda y: truth(y, start, end), (x,), (along,))[1]

    z, y = truth(at["t"], t, r), truth(at["r"], r, t)
    residual = {
        "right": lambda: in_target(at["t"], t, r) - truth.velocity(z, r),
        "derivative-at-the-end": lambda: in_target(z, t, r) - truth.velocity(z, r),
        "eulerian-right": lambda: push(y, t, r, in_source(at["r"], r, t)) + c,
        "eulerian-mixed-times": lambda: push(at["r"], t, r, in_source(z, r, t)) + c,
    }[form]()
    # Against functions of the point that a residual may depend on: its conditional mean, not its mean alone.
    where = at["t"] if form in ("right", "derivative-at-the-end") else at["r"]
    product = (residual * torch.sin(3 * where + expand(t, where))).mean(1)
    mean, error = product.mean().item(), product.std().item() / batch**0.5
    if form in ("right", "eulerian-right"):
        assert abs(mean) < 4 * error + 1e-9
    else:
        assert abs(mean) > 8 * error
