from __future__ import annotations

import pytest
import torch

from fmm_distill.core.solvers import endpoint, solve
from fmm_distill.core.time_axis import expand


def rotation(x, t, cond=None):
    return expand(1 + t, x) * torch.stack([-x[:, 1], x[:, 0]], 1)


def error(method, steps):
    x = torch.tensor([[1.0, 0.0], [0.3, -2.0]], dtype=torch.float64)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    # The angle is the integral of 1 + t, from 1 to 0.
    turn = torch.tensor(-1.5, dtype=torch.float64)
    matrix = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
    return (solve(rotation, x, times, method=method) - x @ matrix.T).norm()


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_order(method, order):
    assert error(method, 64) / error(method, 128) == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize(("method", "calls"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_calls_a_step(method, calls):
    seen = []

    def velocity(x, t, cond=None):
        seen.append((t.tolist(), cond))
        return torch.zeros_like(x)

    solve(velocity, torch.zeros(2, 1), torch.tensor([1.0, 0.5, 0.0]), method=method, cond="told")
    assert len(seen) == 2 * calls
    assert seen[0] == ([1.0, 1.0], "told")


def test_one_point_is_no_step():
    x = torch.randn(2, 2)
    assert torch.equal(solve(rotation, x, torch.tensor([0.7])), x)


def test_solution_keeps_the_dtype():
    x = torch.randn(2, 2)
    assert solve(rotation, x, torch.linspace(1, 0, 3, dtype=torch.float64)).dtype == torch.float32


def test_endpoint_of_a_teacher_converges(teacher):
    noise = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        few, more, most = (endpoint(teacher.velocity, teacher.schedule, teacher.prior(noise), n) for n in (3, 12, 48))
    assert few.shape == noise.shape
    assert (more - most).norm() < 0.3 * (few - most).norm()
