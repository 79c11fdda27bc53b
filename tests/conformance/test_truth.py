"""The closed-form maps themselves: what every other test here stands on."""

from __future__ import annotations

import pytest
import torch
from torchdiffeq import odeint

from fmm_distill.core.time_axis import expand
from tests.conformance.truths import TRUTHS, start

EVERY = pytest.mark.parametrize("name", TRUTHS)


@EVERY
def test_map_solves_the_ode(name):
    truth, x, t, _, r = start(name)
    # One interval for the whole batch: rescale time to s in [0, 1].
    solution = odeint(
        lambda s, y: -expand(t - r, y) * truth.velocity(y, t - s * (t - r)),
        x,
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        method="dopri5",
        rtol=1e-10,
        atol=1e-12,
    )[-1]
    torch.testing.assert_close(truth(x, t, r), solution, rtol=1e-7, atol=1e-8)


@EVERY
def test_composition(name):
    truth, x, t, m, r = start(name)
    torch.testing.assert_close(truth(truth(x, t, m), m, r), truth(x, t, r), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in TRUTHS if name.startswith("gaussian")])
def test_identity(name):
    truth, x, t, _, _ = start(name)
    assert torch.equal(truth(x, t, t), x)
    torch.testing.assert_close(truth.mean_velocity(x, t, t), truth.velocity(x, t), rtol=1e-12, atol=1e-12)


@EVERY
def test_short_jump_is_a_small_step(name):
    truth, x, t, _, _ = start(name)
    assert (truth(x, t, t - 1e-6) - x).abs().max() < 1e-5 * (1 + truth.velocity(x, t).abs().max())


@EVERY
def test_tangent_condition(name):
    # d_r X at r = t is v. Second-order differences from one side, as r > t is outside of the map's domain.
    truth, x, t, _, _ = start(name)
    h = 1e-4
    slope = (3 * x - 4 * truth(x, t, t - h) + truth(x, t, t - 2 * h)) / (2 * h)
    torch.testing.assert_close(slope, truth.velocity(x, t), rtol=1e-4, atol=1e-4)


@EVERY
def test_batch_equals_its_samples(name):
    truth, x, t, _, r = start(name)
    together = truth(x, t, r)
    alone = torch.cat([truth(x[i : i + 1], t[i : i + 1], r[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@EVERY
def test_velocity_is_noise_minus_data(name):
    """``v = E[eps - x_0 | x_t]`` from the posterior mean on the axis itself, where alpha = 1 - t and sigma = t."""
    truth, x, t, _, _ = start(name)
    data = truth.denoise(x, 1 - t, t)
    noise = (x - expand(1 - t, x) * data) / expand(t, x)
    torch.testing.assert_close(truth.velocity(x, t), noise - data, rtol=1e-10, atol=1e-10)


def test_map_carries_the_prior_to_the_data():
    truth, _ = TRUTHS["modes-plane"]
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones = torch.ones(4000, dtype=torch.float64)
    data = truth(noise, ones, 0 * ones)
    assert data.mean(0).abs().max() < 0.06
    expected = 0.5**2 * torch.eye(2, dtype=torch.float64) + torch.outer(truth.center, truth.center)
    assert (data.T.cov() - expected).abs().max() < 0.06
