"""The checkerboard's velocity against samples, its limits, and where its ODE ends."""

from __future__ import annotations

import pytest
import torch

from fmm_distill.core.solvers import solve
from fmm_distill.teachers.closed_form import Checkerboard

BOARD = Checkerboard()


def white(points: torch.Tensor) -> torch.Tensor:
    squares = ((points + 1) * 2).floor()
    return (squares.sum(1) % 2 == 0) & (points.abs() < 1).all(1)


def test_data_are_uniform_on_the_white_squares():
    data = BOARD.sample(40000, torch.Generator().manual_seed(0))
    assert white(data).all()
    counts = torch.bincount((((data + 1) * 2).floor() @ torch.tensor([4.0, 1.0]).double()).long(), minlength=16)
    assert (counts > 0).sum() == 8
    assert (counts[counts > 0] / 5000 - 1).abs().max() < 0.06
    torch.testing.assert_close(
        data.T.cov(), torch.tensor([[1 / 3, 1 / 16], [1 / 16, 1 / 3]]).double(), rtol=0, atol=0.01
    )


@pytest.mark.parametrize("t", [0.05, 0.2, 0.5, 0.8, 0.97])
def test_velocity_is_the_conditional_mean(t):
    generator = torch.Generator().manual_seed(1)
    data = BOARD.sample(40000, generator)
    noise = BOARD.scale * torch.randn(40000, 2, generator=generator, dtype=torch.float64)
    x = (1 - t) * data + t * noise
    residual = noise - data - BOARD.velocity(x, torch.full((40000,), t, dtype=torch.float64))
    for probe in (torch.ones_like(x), x, torch.sin(5 * x), torch.cos(9 * x), x.flip(1)):
        product = residual * probe
        assert (product.mean(0).abs() < 4.5 * product.std(0) / 200).all()


def test_the_limit_near_noise_meets_the_formula():
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before, after = (BOARD.denoise(x, torch.full((64,), 1 - gap, dtype=torch.float64)) for gap in (1.001e-4, 0.999e-4))
    torch.testing.assert_close(before, after, rtol=0.02, atol=1e-5)
    assert torch.equal(BOARD.denoise(x, torch.ones(64).double()), torch.zeros(64, 2).double())


def test_single_precision_gives_the_same_field():
    generator = torch.Generator().manual_seed(3)
    x, t = torch.randn(500, 2, generator=generator), 0.03 + 0.97 * torch.rand(500, generator=generator)
    x = x * t[:, None] * BOARD.scale + (1 - t[:, None]) * BOARD.sample(500, generator).float()
    v = BOARD.velocity(x, t)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v.double(), BOARD.velocity(x.double(), t.double()), rtol=0, atol=1e-4)


def test_its_ode_carries_noise_to_the_white_squares():
    noise = BOARD.scale * torch.randn(2000, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    end = solve(BOARD.velocity, noise, torch.linspace(1, 0.02, 100, dtype=torch.float64), method="heun")
    data = BOARD.denoise(end, torch.full((2000,), 0.02, dtype=torch.float64))
    assert data.isfinite().all()
    assert white(data).double().mean() > 0.97


def test_a_point_far_off_the_board_has_its_nearest_square():
    """Where every square's mass is less than the smallest number."""
    x = torch.tensor([[-1.4, -0.3], [30.0, 0.1], [0.9, -500.0]], dtype=torch.float64)
    t = torch.full((3,), 0.02, dtype=torch.float64)
    nearest = torch.tensor([[-1.0, -0.5], [1.0, 0.0], [0.5, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(BOARD.denoise(x, t), nearest, rtol=0, atol=0.02)
    for dtype in (torch.float32, torch.float64):
        assert BOARD.velocity(x.to(dtype), t).isfinite().all()
