"""Measure how rough a teacher is in time: the change of its velocity along its own flow.

    python -m experiments.roughness builtin:digits

The change is a derivative and differences over some timesteps: root mean squares of ``dv/dt`` over all values at points
of the teacher's ODE. For a velocity that is smooth in time all of these are equal. The excess of the derivative over
the difference of 20 timesteps is the roughness of the network, which Eulerian losses with a derivative attribute to the
flow.
"""

from __future__ import annotations

import argparse

import torch

from fmm_distill.core.derivatives.engines import derivative_along_flow
from fmm_distill.core.solvers import solve
from fmm_distill.core.time_axis import expand
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher

FRACTIONS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)
STEPS = (1, 5, 20, 50, 100)


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


@torch.no_grad()
def row(teacher_id: str, samples: int) -> list[str]:
    """Return a row per fraction of the path from data to noise: t, the velocity, its derivative, its differences."""
    teacher = load_teacher(teacher_id)
    student, schedule = Student.from_teacher(teacher), teacher.schedule
    noise = torch.randn(samples, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    lines = []
    for fraction in FRACTIONS:
        positions = torch.linspace(1, fraction, 21, dtype=torch.float64)
        x = teacher.prior(noise)
        if fraction < 1:
            x = solve(teacher.velocity, x, schedule.time_at(positions), method="rk4")
        t = schedule.time_at(positions[-1:]).repeat(samples)
        v = teacher.velocity(x, t)
        # An untrained student equals its teacher.
        found = [rms(v), rms(derivative_along_flow(student, x, t, torch.full_like(t, schedule.t_min), v))]
        for steps in STEPS:
            s = schedule.time_at((positions[-1:] - steps / 1000).clamp_min(0)).repeat(samples)
            x_s = solve(teacher.velocity, x, torch.stack([t, s]), method="rk4")
            found.append(rms((v - teacher.velocity(x_s, s)) / expand(t - s, x)))
        lines.append(f"| {fraction:.1f} | {t[0]:.4f} | " + " | ".join(f"{value:.2f}" for value in found) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="Hub id or folder")
    parser.add_argument("--samples", type=int, default=16)
    given = parser.parse_args()
    print("| fraction of the path | t | v | dv/dt | " + " | ".join(f"over {n}" for n in STEPS) + " |")
    print("|---:|---:|---:|---:|" + "---:|" * len(STEPS))
    print("\n".join(row(given.teacher, given.samples)))


if __name__ == "__main__":
    main()
