"""Distance and weight: values, gradients, and what the learned weight settles at."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from fmm_distill.losses.weighting import Distance, LearnedWeight, Weight, measure, weigh


@pytest.mark.parametrize("settings", [Distance, Weight], ids=lambda settings: settings.__name__)
def test_every_setting_is_described(settings):
    assert all(field.description for field in settings.model_fields.values())


@pytest.mark.parametrize(("power", "constant"), [(0.5, 1e-3), (1, 0.1), (2, 1)])
def test_weigh(power, constant):
    loss = torch.tensor([0.01, 0.5, 4.0], requires_grad=True)
    weighed = weigh(loss, Weight(power=power, constant=constant))
    expected = loss / (loss + constant) ** power
    torch.testing.assert_close(weighed, expected)
    # The weight itself is a constant to the gradient.
    (gradient,) = torch.autograd.grad(weighed.sum(), loss)
    torch.testing.assert_close(gradient, (loss.detach() + constant) ** -power)


def test_power_0_is_no_weight():
    loss = torch.tensor([0.0, 0.5, 4.0])
    assert torch.equal(weigh(loss, Weight(power=0)), loss)


def test_weight_of_a_vanished_residual_is_finite():
    assert weigh(torch.zeros(2), Weight(power=2)).tolist() == [0, 0]


def test_no_weight():
    loss = torch.tensor([0.0, 0.5, 4.0])
    assert torch.equal(weigh(loss, Weight(kind="none")), loss)


def test_squared_metric_is_the_mean_square():
    squared = torch.tensor([0.0, 0.5, 4.0])
    assert torch.equal(measure(squared, Distance()), squared)


def test_pseudo_huber_is_square_near_zero_and_linear_far():
    c = 0.5
    residual = torch.tensor([1e-5, 0.5, 1e5], dtype=torch.float64)
    value = measure(residual.square(), Distance(kind="pseudo_huber", constant=c))
    expected = [1e-10 / (2 * c), (0.5**2 + c**2) ** 0.5 - c, 1e5 - c]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0)


def test_pseudo_huber_has_half_the_gradient_of_the_adaptive_weight_of_power_half():
    squared = torch.tensor([1e-4, 0.01, 3.0], dtype=torch.float64, requires_grad=True)
    (huber,) = torch.autograd.grad(measure(squared, Distance(kind="pseudo_huber", constant=0.2)).sum(), squared)
    (adaptive,) = torch.autograd.grad(weigh(squared, Weight(power=0.5, constant=0.04)).sum(), squared)
    torch.testing.assert_close(huber, adaptive / 2)


def test_learned_weight_starts_as_none():
    loss = torch.tensor([0.1, 2.0])
    assert torch.equal(LearnedWeight()(loss, torch.tensor([0.3, 1.0]), torch.tensor([0.1, 0.0])), loss)


def test_learned_weight_settles_at_the_logarithm_of_the_mean_loss():
    """Where the loss is 0.01 for short jumps and 4 for long ones, each with noise, both end up counting 1."""
    generator = torch.Generator().manual_seed(0)
    weight = LearnedWeight()
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.01)
    start, end = torch.tensor([0.9, 0.9]).repeat(64), torch.tensor([0.8, 0.1]).repeat(64)
    mean = torch.tensor([0.01, 4.0]).repeat(64)
    for _ in range(1000):
        loss = mean * 2 * torch.rand(128, generator=generator)
        optimizer.zero_grad()
        weight(loss, start, end).mean().backward()
        optimizer.step()
    ones = torch.ones(2)
    w = torch.log(1 / (weight(2 * ones, start[:2], end[:2]) - weight(ones, start[:2], end[:2])))
    torch.testing.assert_close(w.exp(), mean[:2], rtol=0.15, atol=0)


def test_learned_weight_stops_no_gradient():
    loss = torch.tensor([0.1, 2.0], requires_grad=True)
    weight = LearnedWeight()
    torch.nn.init.constant_(weight.linear.bias, 1.0)
    weight(loss, torch.tensor([0.3, 1.0]), torch.tensor([0.1, 0.0])).sum().backward()
    torch.testing.assert_close(loss.grad, torch.full((2,), -1.0).exp())


def test_learned_weight_tells_the_two_ends_apart():
    weight = LearnedWeight()
    torch.nn.init.normal_(weight.linear.weight, generator=torch.Generator().manual_seed(0))
    a, b = torch.tensor([0.7]), torch.tensor([0.2])
    assert len({weight(torch.zeros(1), *ends).item() for ends in ((a, b), (b, a), (a, a), (b, b))}) == 4


@pytest.mark.parametrize(
    "values",
    [
        {"power": -1},
        {"power": 3},
        {"constant": 0},
        {"scale": 1},
        {"kind": "none", "power": 1},
        {"kind": "learned", "constant": 0.1},
        {"kind": "huber"},
    ],
    ids=str,
)
def test_invalid_weights(values):
    with pytest.raises(ValidationError):
        Weight(**values)


@pytest.mark.parametrize(
    "values", [{"constant": 0.1}, {"kind": "pseudo_huber", "constant": 0}, {"kind": "l1"}], ids=str
)
def test_invalid_metrics(values):
    with pytest.raises(ValidationError):
        Distance(**values)
