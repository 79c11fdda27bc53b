"""Students whose weights change with the length of the jump converge to the ODE of their own diagonal."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import FlowMatching
from fmm_distill.core.time_axis import expand
from fmm_distill.losses import Jump
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.student.scaled import ScaledWeights
from fmm_distill.student.student import Student
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_prompted import InDouble
from tests.conformance.truths import TRUTHS, samples
from tests.scaled import randomize, scaled_student

STEPS = (4, 32, 64, 128)


class ClosedForm(nn.Module):
    """A network whose velocity is exact: its linear layers are the identity, and zero, at the lengths of a teacher."""

    def __init__(self, name):
        super().__init__()
        self.truth, shape = TRUTHS[name]
        width = shape[0]
        self.first, self.time = nn.Linear(width, 8), nn.Linear(1, 8)
        self.middle, self.last = nn.Linear(8, width, bias=False), nn.Linear(width, width)
        with torch.no_grad():
            # Its output is nothing at first, and what it is trained to be of the first layer afterwards.
            self.middle.weight.zero_()
            self.last.weight.copy_(torch.eye(width))
            self.last.bias.zero_()

    def forward(self, x, time):
        t = time / 1000
        hidden = torch.tanh(self.first(x) + self.time(t[:, None]))
        return SimpleNamespace(
            sample=self.last(self.truth.velocity(x.double(), t.double()).to(x.dtype)) + self.middle(hidden)
        )


def teacher_of(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ClosedForm(name).eval().requires_grad_(False)
    return Teacher(network, Parametrization(FlowMatching(), "flow_prediction"), TRUTHS[name][1], name, "test", {})


def jumped(student, x, start, end, steps):
    """The end of equal jumps."""
    times = torch.linspace(start, end, steps + 1, dtype=torch.float64)
    for t, r in itertools.pairwise(times):
        x = student(x, t.expand(len(x)), r.expand(len(x)))
    return x


def orders(errors):
    """By how many powers of two an error falls where the number of steps doubles."""
    return torch.tensor(errors).log2().diff().neg().tolist()


def trained(student, teacher, name, steps=60):
    """A little training towards the map of its own diagonal."""
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    loss = Lagrangian(derivative="exact")
    for step in range(steps):
        _, data, noise, t, r = samples(name, 64, seed=step)
        x = data + expand(t, data) * (noise - data)
        optimizer.zero_grad()
        loss(student, teacher.velocity, Jump(x, t, r, None, t)).mean().backward()
        optimizer.step()
    return student


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", ["gaussian-narrow", "modes-plane"])
def test_the_map_of_the_closed_form_is_the_limit(name, rank):
    """The exact flow is known: the error halves with twice the steps, whatever the change of the weights is."""
    teacher, truth = teacher_of(name), TRUTHS[name][0]
    x = torch.randn(64, *teacher.event_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start, end = torch.full((64,), 0.98, dtype=torch.float64), torch.full((64,), 0.05, dtype=torch.float64)
    with torch.no_grad():
        expected = truth(x, start, end)

    def errors(student):
        with torch.no_grad():
            return [float((jumped(student, x, 0.98, 0.05, n) - expected).square().mean().sqrt()) for n in STEPS]

    untrained, random, better = (
        Student.from_teacher(teacher, scaled=ScaledWeights(rank=rank)).double() for _ in range(3)
    )
    teacher.network.double()
    randomize(random, 1.0)
    trained(better, teacher, name)
    euler, found, learned = errors(untrained), errors(random), errors(better)
    # Euler's method, and not the same one once the weights change with the length.
    assert orders(euler)[-1] == pytest.approx(1, abs=0.15)
    assert orders(found)[-1] == pytest.approx(1, abs=0.25)
    assert found[-1] > 1.05 * euler[-1]
    # A little training makes few steps better and stays of the first order.
    assert orders(learned)[-1] > 0.8
    assert learned[0] < 0.8 * euler[0]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_network_of_images_converges_to_its_own_diagonal(teacher_folder, rank):
    """In float64 against the classical Runge-Kutta method on the velocity without a length."""
    teacher = load_teacher(str(teacher_folder))
    student = scaled_student(teacher, rank).double()
    x = torch.randn(2, *teacher.event_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = teacher.schedule.time_at(torch.linspace(0.9, 0.3, 33, dtype=torch.float64))

    def along(x, t):
        return student.mean_velocity(x, t.expand(2), t.expand(2))

    with InDouble(), torch.no_grad():
        exact = x
        for t, r in zip(times[:-1:2], times[2::2], strict=True):
            step, middle = r - t, (t + r) / 2
            k1 = along(exact, t)
            k2 = along(exact + step / 2 * k1, middle)
            k3 = along(exact + step / 2 * k2, middle)
            k4 = along(exact + step * k3, r)
            exact = exact + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        errors = []
        for stride in (4, 2, 1):
            jumps, grid = x, times[::stride]
            for t, r in itertools.pairwise(grid):
                jumps = student(jumps, t.expand(2), r.expand(2))
            errors.append(float((jumps - exact).norm()))
    assert orders(errors)[-1] == pytest.approx(1, abs=0.15)
    assert all(order > 0.7 for order in orders(errors))
