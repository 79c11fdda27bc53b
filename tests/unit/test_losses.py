from __future__ import annotations

import copy
from itertools import pairwise
from typing import Literal, get_args, get_origin

import pytest
import torch

from fmm_distill.core.flow_map import FlowMap, diagonal
from fmm_distill.core.solvers import solve
from fmm_distill.core.time_axis import LinearClock, expand
from fmm_distill.losses import Jump, registered_losses, squared_norm
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
from tests.unit.losses_as_written import AS_WRITTEN, Net, teacher

VARIANTS = {
    "lagrangian": Lagrangian(),
    "lagrangian-none": Lagrangian(stop_gradient="nowhere"),
    "lagrangian-target": Lagrangian(stop_gradient="target"),
    "lagrangian-self": Lagrangian(velocity="self"),
    "lagrangian-self-none": Lagrangian(velocity="self", stop_gradient="nowhere"),
    "lagrangian-self-target": Lagrangian(velocity="self", stop_gradient="target"),
    "eulerian": Eulerian(),
    "eulerian-none": Eulerian(stop_gradient="nowhere"),
    "eulerian-teacher": Eulerian(stop_gradient="teacher_input"),
    "eulerian-scaled": Eulerian(tangent_scale=0.25),
    "eulerian-step": Eulerian(step=0.1),
    "eulerian-step-euler": Eulerian(step=0.1, solver="euler", tangent_scale=0.5),
    "eulerian-step-self": Eulerian(step=0.05, velocity="self", normalize_tangent=True),
    "eulerian-clamped": Eulerian(clamp_tangent=0.3),
    "eulerian-normalized": Eulerian(normalize_tangent=True),
    "eulerian-clamped-normalized": Eulerian(clamp_tangent=0.3, normalize_tangent=True),
    "eulerian-self": Eulerian(velocity="self"),
    "eulerian-self-none": Eulerian(velocity="self", stop_gradient="nowhere"),
    "eulerian-self-teacher": Eulerian(velocity="self", stop_gradient="teacher_input"),
    "progressive": Progressive(),
    "progressive-three": Progressive(pieces=3),
    "progressive-uniform": Progressive(middle="uniform"),
    "progressive-average": Progressive(target="average", middle="uniform"),
    "progressive-frozen": Progressive(target="frozen", pieces=3),
    "progressive-ode": Progressive(target="ode", middle="uniform"),
    "progressive-ode-euler": Progressive(target="ode", solver="euler", pieces=4),
    "flow_map_matching": FlowMapMatching(),
    "flow_map_matching-generate": FlowMapMatching(directions="generate"),
    "flow_matching": FlowMatching(),
    "flow_matching-data": FlowMatching(velocity="data"),
    "mean_flow": MeanFlow(),
    "mean_flow-clamped-normalized": MeanFlow(clamp_tangent=0.3, normalize_tangent=True),
    "mean_flow-improved": MeanFlow(improved=True),
    "mean_flow-improved-scaled": MeanFlow(improved=True, tangent_scale=0.5),
    "consistency": Consistency(),
    "consistency-data": Consistency(velocity="data"),
    "consistency-normalized": Consistency(normalize_tangent=True, tangent_scale=0.5),
    "consistency-step": Consistency(step=0.1),
    "consistency-step-data": Consistency(step=0.1, velocity="data"),
    "consistency-step-heun": Consistency(step=0.1, solver="heun"),
    "consistency-step-average": Consistency(step=0.1, target="average"),
    "consistency-step-normalized": Consistency(step=0.1, clamp_tangent=0.3, normalize_tangent=True),
    "consistency_trajectory": ConsistencyTrajectory(),
    "consistency_trajectory-student": ConsistencyTrajectory(target="student", solver_steps=3),
    "progressive_distillation": ProgressiveDistillation(),
    "progressive_distillation-student": ProgressiveDistillation(target="student"),
    "progressive_distillation-frozen": ProgressiveDistillation(target="frozen"),
    "progressive_distillation-ode": ProgressiveDistillation(target="ode"),
    "operator_regression": OperatorRegression(solver_steps=3),
    "terminal_velocity": TerminalVelocity(),
    "terminal_velocity-student": TerminalVelocity(target="student"),
}
# Losses of installed distributions, with their own settings.
OTHERS = {name: kind() for name, kind in registered_losses().items() if name not in BUILT_IN}
EVERY = pytest.mark.parametrize("settings", (VARIANTS | OTHERS).values(), ids=VARIANTS | OTHERS)
OURS = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def those(condition):
    """Parametrized over the variants of which it is true."""
    chosen = {name: settings for name, settings in VARIANTS.items() if condition(settings)}
    return pytest.mark.parametrize("settings", chosen.values(), ids=chosen)


def batch():
    """Points, times and shares: jumps longer and shorter than the steps of the variants, shares on either side."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.9, 0.95, 0.7, 0.45, 0.5], dtype=torch.float64)
    r = torch.tensor([0.2, 0.6, 0.65, 0.3, 0.1], dtype=torch.float64)
    share = torch.tensor([0.2, 0.6, 0.5, 0.9, 0.35], dtype=torch.float64)
    return x, t, r, share


def call(settings, flow_map, x, t, r, u, *, velocity=teacher, target_map=None, cond=None):
    """The loss, given what the trainer gives it; its target network is another net unless one is named."""
    target_map = None if settings.target_network is None else target_map or Net(1)
    if settings.velocity == "self":
        velocity = diagonal(flow_map)
    return settings(flow_map, velocity, Jump(x, t, r, cond, u, target_map))


def gradient(loss, flow_map):
    """All weights' gradients in one vector."""
    found = torch.autograd.grad(loss.sum(), list(flow_map.parameters()), retain_graph=True)
    return torch.cat([value.flatten() for value in found])


def same(a, b, flow_map, **tolerance):
    """Value and gradient are the same."""
    torch.testing.assert_close(a, b, **tolerance)
    torch.testing.assert_close(gradient(a, flow_map), gradient(b, flow_map), **tolerance)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_choice_of_every_loss_is_among_the_variants(name):
    for field, info in registered_losses()[name].model_fields.items():
        tried = {getattr(settings, field) for settings in VARIANTS.values() if settings.name == name}
        choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
        choices = (True, False) if info.annotation is bool else choices
        if field != "derivative":
            assert tried >= set(choices), field


@OURS
def test_value_and_gradient_are_as_written(settings):
    live, average = Net(), Net(1)
    still = copy.deepcopy(live).requires_grad_(False)
    expected = sum(squared_norm(part) for part in AS_WRITTEN[settings.name](settings, live, still, average, *batch()))
    loss = call(settings, live, *batch(), target_map=average)
    assert gradient(loss, live).norm() > 1e-3
    same(loss, expected, live, rtol=1e-5, atol=1e-7)


@EVERY
@pytest.mark.parametrize(
    ("dtype", "returned"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_is_one_number_a_sample_in_single_precision_or_the_samples(settings, dtype, returned):
    x, t, r, share = batch()
    loss = call(settings, Net().to(dtype), x.to(dtype), t, r, share, target_map=Net(1).to(dtype))
    assert loss.shape == (5,)
    assert loss.dtype == returned
    if dtype != torch.bfloat16:
        torch.testing.assert_close(loss.double(), call(settings, Net(), *batch()), rtol=1e-4, atol=1e-5)


@EVERY
def test_batch_is_its_samples_one_by_one(settings):
    flow_map = Net()
    # One of them on the diagonal.
    x, t, r, share = batch()
    r = torch.where(t == 0.5, t, r)
    alone = [call(settings, flow_map, *(value[i : i + 1] for value in (x, t, r, share))) for i in range(5)]
    same(call(settings, flow_map, x, t, r, share), torch.cat(alone), flow_map)


@EVERY
def test_condition_reaches_all_that_are_asked(settings):
    seen = []

    class Told(Net):
        def __init__(self, who, seed):
            super().__init__(seed)
            self.who = who

        def mean_velocity_of_jump(self, x, t, h, cond=None):
            seen.append((self.who, cond))
            return super().mean_velocity_of_jump(x, t, h)

    def told(x, t, cond=None):
        seen.append(("teacher", cond))
        return teacher(x, t)

    call(settings, Told("map", 0), *batch(), velocity=told, target_map=Told("copy", 1), cond="this")
    # A frozen copy stands for the teacher that it was.
    taught = not settings.needs_velocity_term and settings.target_network != "frozen"
    asked = {"map", *(["copy"] * (settings.target_network is not None)), *(["teacher"] * taught)}
    assert {who for who, _ in seen} == asked
    assert {what for _, what in seen} == {"this"}


@those(lambda settings: settings.differentiates)
def test_engines_agree(settings):
    flow_map = Net()
    loss = {
        engine: call(settings.model_copy(update={"derivative": engine}), flow_map, *batch(), target_map=Net(1))
        for engine in ("auto", "exact", "central")
    }
    assert torch.equal(loss["auto"], loss["exact"])
    assert not torch.equal(loss["central"], loss["exact"])
    # The part along the velocity is a difference to one side: half of its step, 1e-3, off.
    near = 1e-3 if settings.name == "eulerian" and settings.stop_gradient == "teacher_input" else 1e-4
    torch.testing.assert_close(loss["central"], loss["exact"], rtol=near, atol=near)
    central, exact = (gradient(loss[engine], flow_map) for engine in ("central", "exact"))
    # Beside a detached difference the gradient is that of a jump longer by 2e-3: 0.5 % off.
    assert (central - exact).norm() < (near if settings.keeps_graph else 1e-2) * exact.norm()


@EVERY
def test_of_a_jump_of_length_0_is_finite(settings):
    x, t, _, share = batch()
    flow_map = Net()
    loss = call(settings, flow_map, x, t, t, share)
    assert loss.isfinite().all()
    assert gradient(loss, flow_map).isfinite().all()


@those(lambda settings: settings.target_network is not None)
def test_no_gradient_reaches_the_copy(settings):
    other = Net(1)
    call(settings, Net(), *batch(), target_map=other).sum().backward()
    assert all(weight.grad is None for weight in other.parameters())


@those(lambda settings: settings.target_network is not None)
def test_without_an_average_the_map_is_its_own_target_and_as_good_as_frozen(settings):
    flow_map = Net()
    still = copy.deepcopy(flow_map).requires_grad_(False)
    loss = [
        settings(flow_map, teacher, Jump(*batch()[:3], None, batch()[3], other)) for other in (None, flow_map, still)
    ]
    same(loss[0], loss[1], flow_map, rtol=0, atol=0)
    same(loss[0], loss[2], flow_map, rtol=1e-12, atol=1e-14)


@OURS
def test_teacher_is_asked_for_a_graph_only_where_nothing_stops(settings):
    graphs = []

    def asked(x, t, cond=None):
        graphs.append(torch.is_grad_enabled())
        return teacher(x, t)

    call(settings, Net(), *batch(), velocity=asked)
    assert graphs == [getattr(settings, "stop_gradient", None) == "nowhere"] * len(graphs)


@EVERY
def test_leaves_no_gradient_behind_and_runs_without_a_graph(settings):
    flow_map = Net()
    loss = call(settings, flow_map, *batch())
    assert all(weight.grad is None for weight in flow_map.parameters())
    with torch.no_grad():
        torch.testing.assert_close(call(settings, flow_map, *batch()), loss)


# Where one loss is a setting of another.


@pytest.mark.parametrize("name", ["lagrangian", "eulerian", "consistency"])
@pytest.mark.parametrize("target", [{}, {"stop_gradient": "target"}], ids=str)
def test_diagonal_is_flow_matching(name, target):
    x, t, _, share = batch()
    flow_map = Net()
    settings = registered_losses()[name](**(target if name != "consistency" else {"step": 0.1} if target else {}))
    expected = call(FlowMatching(), flow_map, x, t, t, share)
    same(call(settings, flow_map, x, t, t, share), expected, flow_map)


STABILIZED = [{}, {"normalize_tangent": True}, {"clamp_tangent": 0.3, "tangent_scale": 0.5}]


@pytest.mark.parametrize("stabilized", STABILIZED, ids=str)
@pytest.mark.parametrize("name", ["mean_flow", "consistency"])
def test_mean_flow_and_continuous_consistency_are_eulerian(name, stabilized):
    flow_map = Net()
    expected = call(Eulerian(**stabilized), flow_map, *batch())
    same(call(registered_losses()[name](**stabilized), flow_map, *batch()), expected, flow_map, rtol=0, atol=0)


@pytest.mark.parametrize("target", ["student", "average", "frozen"])
def test_progressive_distillation_is_progressive_by_halves(target):
    flow_map = Net()
    expected = call(Progressive(target=target), flow_map, *batch())
    same(call(ProgressiveDistillation(target=target), flow_map, *batch()), expected, flow_map, rtol=0, atol=0)


def test_progressive_distillation_of_a_solver_is_progressive_by_euler_steps():
    flow_map = Net()
    expected = call(Progressive(target="ode", solver="euler"), flow_map, *batch())
    same(call(ProgressiveDistillation(target="ode"), flow_map, *batch()), expected, flow_map, rtol=0, atol=0)


def test_terminal_velocity_is_lagrangian_on_the_averages_diagonal_and_flow_matching_at_the_end():
    flow_map, average = Net(), Net(1)
    x, t, r, share = batch()
    v = teacher(x, t)
    moved = call(Lagrangian(), flow_map, x, t, r, share, velocity=diagonal(average))
    x_r = x - expand(t - r, x) * v
    taught = call(FlowMatching(), flow_map, x_r, r, r, share, velocity=lambda *_: v)
    same(call(TerminalVelocity(), flow_map, x, t, r, share, target_map=average), moved + taught, flow_map)


@those(lambda settings: settings.name == "consistency" and settings.step and not settings.normalize_tangent)
def test_gradient_of_consistency_is_the_published_ones_by_the_weight_it_says(settings):
    flow_map, average = Net(), Net(1)
    x, t, r, share = batch()
    s = torch.maximum(t - settings.step, r)
    x_s = solve(teacher, x, torch.stack([t, s]), method=settings.solver)
    ends = (average if settings.target == "average" else flow_map)(x_s, s, r).detach()
    published = squared_norm(flow_map(x, t, r) - ends)
    ours = (t - s) * (t - r) * call(settings, flow_map, x, t, r, share, target_map=average)
    torch.testing.assert_close(gradient(ours, flow_map), gradient(published, flow_map))


# Limits, with the order in which they are reached.


def orders(errors):
    return [torch.log2(before.norm() / after.norm()).item() for before, after in pairwise(errors)]


@pytest.mark.parametrize("stabilized", [{}, {"normalize_tangent": True}], ids=str)
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("kind", [Consistency, Eulerian])
def test_a_finite_step_tends_to_the_derivative(kind, solver, stabilized):
    flow_map = Net()
    limit = call(Eulerian(**stabilized), flow_map, *batch())
    losses = [call(kind(step=step, solver=solver, **stabilized), flow_map, *batch()) for step in (2e-3, 1e-3, 5e-4)]
    assert orders([loss - limit for loss in losses]) == pytest.approx([1, 1], abs=0.05)
    slopes = [gradient(loss, flow_map) - gradient(limit, flow_map) for loss in losses]
    assert orders(slopes) == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize(
    ("settings", "share"),
    [(Eulerian(velocity="self"), lambda e: 1 - e), (Lagrangian(velocity="self", stop_gradient="target"), float)],
    ids=["first-piece-vanishes", "last-piece-vanishes"],
)
def test_progressive_tends_to_the_self_distilled_losses_as_a_piece_vanishes(settings, share):
    flow_map = Net()
    x, t, r, _ = batch()
    limit = call(settings, flow_map, x, t, r, None)
    values, slopes = [], []
    for e in (2e-3, 1e-3, 5e-4):
        loss = call(Progressive(middle="uniform"), flow_map, x, t, r, torch.full_like(t, share(e)))
        values.append(loss / e**2 - limit)
        slopes.append(gradient(loss, flow_map) / e - gradient(limit, flow_map))
    assert orders(values) == pytest.approx([1, 1], abs=0.05)
    assert orders(slopes) == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize(
    ("settings", "order"), [(OperatorRegression, 4), (ConsistencyTrajectory, 2)], ids=["rk4", "heun"]
)
def test_error_of_the_solvers_target_falls_at_their_order(settings, order):
    flow_map = Net()
    x, t, r, _ = batch()
    losses = [call(settings(solver_steps=n), flow_map, x, t, r, torch.full_like(t, 0.1)) for n in (8, 16, 32, 512)]
    assert orders([loss - losses[-1] for loss in losses[:-1]]) == pytest.approx([order] * 2, abs=0.25)


# Worked out on paper.


class Constant(FlowMap):
    """``u = weight``: no derivatives, so that a loss can be worked out on paper."""

    clock = LinearClock()
    t_max = 1.0

    def __init__(self, weight):
        self.weight = weight

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        return self.weight + 0 * x


class Linear(Constant):
    """``u = weight x``, whose derivative along v is ``weight v``."""

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        return self.weight * x


def two(x, t, cond=None):
    return torch.full_like(x, 2.0)


X = torch.tensor([[1.0, 3.0], [2.0, -1.0]], dtype=torch.float64)
T, R = torch.tensor([0.9, 0.6], dtype=torch.float64), torch.tensor([0.4, 0.6], dtype=torch.float64)
S = torch.tensor([0.2, 0.7], dtype=torch.float64)


def parameter(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@those(
    lambda settings: not getattr(settings, "normalize_tangent", None) and not getattr(settings, "clamp_tangent", None)
)
def test_of_a_constant_field(settings):
    # The residual is u - v = 3, times a length of time where ends of jumps are compared; a map agrees with itself.
    one = torch.ones_like(T)
    jump, apart = {
        "operator_regression": (T - R, T - R),
        "consistency_trajectory": (T - R, (1 - S) * (T - R)),
    }.get(settings.name, (one, one))
    residual = 0 if settings.needs_velocity_term or settings.target_network == "frozen" else 3 * apart
    weight = parameter(5.0)
    loss = call(settings, Constant(weight), X, T, R, S, velocity=two, target_map=Constant(parameter(5.0)))
    torch.testing.assert_close(loss, residual**2 * one)
    loss.sum().backward()
    torch.testing.assert_close(weight.grad, (2 * residual * jump).sum())


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0])
def test_eulerian_tangent_scale(scale):
    # u - v + scale (t - r) weight v, with weight 0.5 and v 2.
    settings = Eulerian(tangent_scale=scale, derivative="exact")
    loss = call(settings, Linear(parameter(0.5)), X, T, R, S, velocity=two)
    residual = 0.5 * X - 2 + scale * (T - R).unsqueeze(1)
    torch.testing.assert_close(loss, residual.square().mean(1))


def test_eulerian_normalized_tangent():
    settings = Eulerian(normalize_tangent=True, derivative="exact")
    loss = call(settings, Linear(parameter(0.5)), X, T, R, S, velocity=two)
    residual = 0.5 * X - 2 + (T - R).unsqueeze(1)
    norm = residual.norm(dim=1)
    torch.testing.assert_close(loss, (norm / (norm + 0.1)).square() / 2)


def test_eulerian_without_a_stop_takes_the_gradient_through_the_derivative():
    gradients = {}
    for stop in ("nowhere", "target"):
        weight = parameter(0.5)
        settings = Eulerian(stop_gradient=stop, derivative="exact")
        call(settings, Linear(weight), X, T, R, S, velocity=two).sum().backward()
        gradients[stop] = weight.grad
    residual = 0.5 * X - 2 + (T - R).unsqueeze(1)
    torch.testing.assert_close(gradients["target"], (residual * X).sum())
    torch.testing.assert_close(gradients["nowhere"], (residual * (X + 2 * (T - R).unsqueeze(1))).sum())
