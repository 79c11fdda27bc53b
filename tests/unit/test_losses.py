from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fmm_distill.flow_map import FlowMap
from fmm_distill.interpolant import LinearClock
from fmm_distill.losses import LOSSES, AnyLossSettings, EulerianSettings, LagrangianSettings, Weight, eulerian, weigh
from fmm_distill.losses.base import squared_norm


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


def velocity(x, t, cond=None):
    return torch.full_like(x, 2.0)


X = torch.tensor([[1.0, 3.0], [2.0, -1.0]], dtype=torch.float64)
T, R = torch.tensor([0.9, 0.6], dtype=torch.float64), torch.tensor([0.4, 0.6], dtype=torch.float64)


def parameter(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("stop", ["none", "target"])
def test_of_a_constant_field(name, stop):
    weight = parameter(5.0)
    settings = TypeAdapter(AnyLossSettings).validate_python({"name": name, "stop": stop, "derivative": "exact"})
    loss = LOSSES[name](Constant(weight), velocity, X, T, R, settings=settings)
    torch.testing.assert_close(loss, torch.full((2,), 9.0, dtype=torch.float64))
    loss.mean().backward()
    assert weight.grad.item() == pytest.approx(6)


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0])
def test_eulerian_tangent_scale(scale):
    # u - v + scale (t - r) weight v, with weight 0.5 and v 2.
    settings = EulerianSettings(tangent_scale=scale, derivative="exact")
    loss = eulerian(Linear(parameter(0.5)), velocity, X, T, R, settings=settings)
    residual = 0.5 * X - 2 + scale * (T - R).unsqueeze(1)
    torch.testing.assert_close(loss, residual.square().mean(1))


def test_eulerian_normalised_tangent():
    settings = EulerianSettings(normalise_tangent=True, derivative="exact")
    loss = eulerian(Linear(parameter(0.5)), velocity, X, T, R, settings=settings)
    residual = 0.5 * X - 2 + (T - R).unsqueeze(1)
    norm = residual.norm(dim=1)
    torch.testing.assert_close(loss, (norm / (norm + 0.1)).square() / 2)


def test_eulerian_without_a_stop_takes_the_gradient_through_the_derivative():
    gradients = {}
    for stop in ("none", "target"):
        weight = parameter(0.5)
        settings = EulerianSettings(stop=stop, derivative="exact")
        eulerian(Linear(weight), velocity, X, T, R, settings=settings).sum().backward()
        gradients[stop] = weight.grad
    residual = 0.5 * X - 2 + (T - R).unsqueeze(1)
    torch.testing.assert_close(gradients["target"], (residual * X).sum())
    torch.testing.assert_close(gradients["none"], (residual * (X + 2 * (T - R).unsqueeze(1))).sum())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("stop", ["none", "target"])
def test_diagonal_is_regression_on_the_velocity(name, stop):
    settings = TypeAdapter(AnyLossSettings).validate_python({"name": name, "stop": stop, "derivative": "exact"})
    loss = LOSSES[name](Linear(parameter(0.5)), velocity, X, T, T, settings=settings)
    torch.testing.assert_close(loss, (0.5 * X - 2).square().mean(1))


@pytest.mark.parametrize("name", LOSSES)
def test_condition_reaches_map_and_teacher(name):
    seen = []

    class Told(Linear):
        def mean_velocity_of_jump(self, x, t, h, cond=None):
            seen.append(("map", cond))
            return super().mean_velocity_of_jump(x, t, h)

    def told(x, t, cond=None):
        seen.append(("teacher", cond))
        return velocity(x, t)

    settings = TypeAdapter(AnyLossSettings).validate_python({"name": name, "derivative": "exact"})
    LOSSES[name](Told(parameter(0.5)), told, X, T, R, cond="this", settings=settings)
    assert {who for who, _ in seen} == {"map", "teacher"}
    assert {what for _, what in seen} == {"this"}


@pytest.mark.parametrize(("step", "share"), [(0, 0), (1, 0.08), (5, 0.4), (9, 0.72), (10, 0.8), (11, 0.8), (1000, 0.8)])
def test_eulerian_warm_up(step, share):
    settings = EulerianSettings(tangent_warmup_steps=10, tangent_scale=0.8)
    assert settings.at_step(step).tangent_scale == pytest.approx(share)
    assert settings.tangent_scale == 0.8


@pytest.mark.parametrize("settings", [EulerianSettings(), LagrangianSettings()])
def test_without_warm_up_every_step_is_alike(settings):
    assert settings.at_step(0) == settings


@pytest.mark.parametrize(
    "values",
    [
        {"name": "eulerian", "stop": "none", "normalise_tangent": True},
        {"name": "eulerian", "stop": "none", "tangent_warmup_steps": 5},
        {"name": "eulerian", "stop": "none", "tangent_scale": 0.5},
        {"name": "eulerian", "stop": "teacher"},
        {"name": "eulerian", "tangent_warmup_steps": -1},
        {"name": "eulerian", "tangent_scale": 1.5},
        {"name": "lagrangian", "normalise_tangent": True},
        {"name": "lagrangian", "stop": "nowhere"},
        {"name": "lagrangian", "derivative": "symbolic"},
        {"name": "lagrange"},
        {"stop": "none"},
    ],
    ids=str,
)
def test_invalid_settings(values):
    with pytest.raises(ValidationError):
        TypeAdapter(AnyLossSettings).validate_python(values)


@pytest.mark.parametrize("name", LOSSES)
def test_settings_are_found_by_name_and_frozen(name):
    settings = TypeAdapter(AnyLossSettings).validate_python({"name": name})
    assert settings.name == name
    with pytest.raises(ValidationError):
        settings.derivative = "exact"


@pytest.mark.parametrize("settings", [EulerianSettings, LagrangianSettings, Weight])
def test_every_setting_is_described(settings):
    assert all(field.description for field in settings.model_fields.values())


@pytest.mark.parametrize(("power", "constant"), [(0.5, 1e-3), (1, 0.1), (2, 1)])
def test_weigh(power, constant):
    loss = parameter([0.01, 0.5, 4.0])
    weighed = weigh(loss, Weight(power=power, constant=constant))
    expected = loss / (loss + constant) ** power
    torch.testing.assert_close(weighed, expected)
    # The weight itself is a constant to the gradient.
    (gradient,) = torch.autograd.grad(weighed.sum(), loss)
    torch.testing.assert_close(gradient, (loss.detach() + constant) ** -power)


def test_power_0_is_no_weight():
    loss = parameter([0.0, 0.5, 4.0])
    assert torch.equal(weigh(loss, Weight(power=0)), loss)


def test_weight_of_a_vanished_residual_is_finite():
    assert weigh(torch.zeros(2), Weight(power=2)).tolist() == [0, 0]


@pytest.mark.parametrize("values", [{"power": -1}, {"power": 3}, {"constant": 0}, {"scale": 1}])
def test_invalid_weights(values):
    with pytest.raises(ValidationError):
        Weight(**values)


def test_squared_norm_is_a_mean_in_single_precision():
    residual = torch.full((2, 3, 4, 4), 300.0, dtype=torch.float16)
    # 90000 is infinite in half precision.
    assert squared_norm(residual).tolist() == [90000, 90000]
    assert squared_norm(residual.double()).dtype == torch.float64
