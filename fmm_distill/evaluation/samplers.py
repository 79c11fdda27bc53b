"""Samplers that an evaluation compares: the jumps of a student, and its teacher under fast solvers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fmm_distill.evaluation.solvers import solvers_of
from fmm_distill.student.sampling import sample

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.config.settings import EvaluationSettings
    from fmm_distill.evaluation.draws import SampleDraws
    from fmm_distill.evaluation.solvers import Solver
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["Sampler", "of_students", "of_teacher"]


@dataclass(frozen=True)
class Sampler:
    """A way from noise to samples.

    Attributes:
        name: of its rows.
        steps: as its scheduler counts them.
        network: whose calls are counted.
        run: returns the samples of the draws.
        makes_images: ``run`` returns decoded images in [-1, 1], not samples to decode.
        follows_ode: it approximates the teacher's ODE, so that it has an endpoint error.
        stochasticity: strength of the fresh noise in a student's steps.
        about: pipeline, scheduler and settings, for the protocol.
    """

    name: str
    steps: int
    network: nn.Module
    run: Callable[[SampleDraws], Float[Tensor, "batch *event"]]
    makes_images: bool = False
    follows_ode: bool = True
    stochasticity: float = 0.0
    about: str = ""

    @property
    def description(self) -> str:
        """Pipeline, scheduler and settings; without them, name and steps."""
        return self.about or f"{self.name}, {self.steps} steps"


def of_students(
    students: Mapping[str, Student], steps: tuple[int, ...], *, follows_ode: bool = True, stochasticity: float = 0.0
) -> list[Sampler]:
    """Return one sampler per student and number of steps.

    Args:
        students: by the name of their rows.
        stochasticity: strength of the fresh noise; samples with any do not follow the ODE.
    """

    def jumps(student: Student, count: int) -> Callable[[SampleDraws], Tensor]:
        if not stochasticity:
            return lambda draws: sample(student, draws.noise, count, draws.cond)
        return lambda draws: sample(
            student,
            draws.noise,
            count,
            draws.cond,
            stochasticity=stochasticity,
            generator=draws.step_generators(),
        )

    # The end of a sample with fresh noise is not determined by the noise that it starts from.
    follows_ode = follows_ode and not stochasticity
    return [
        Sampler(
            name,
            count,
            student.network,
            jumps(student, count),
            follows_ode=follows_ode,
            stochasticity=stochasticity,
        )
        for name, student in students.items()
        for count in steps
    ]


def of_teacher(teacher: Teacher, settings: EvaluationSettings) -> list[Sampler]:
    """Return one sampler per solver and number of steps; ``solvers.describe_solvers`` says which those are."""

    def solved(solver: Solver, steps: int, draws: SampleDraws) -> Tensor:
        return solver.run(teacher, draws, steps)

    return [
        Sampler(solver.name, steps, teacher.network, partial(solved, solver, steps))
        for setting, solver in solvers_of(teacher).items()
        for steps in getattr(settings, setting)
    ]
