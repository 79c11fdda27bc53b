"""Images of the teacher's ODE and of its student from the same noises, and from noises between two noises."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fmm_distill.core.solvers import endpoint
from fmm_distill.evaluation.draws import NOISE_SEED, draw_samples_of, places_of
from fmm_distill.evaluation.given_images import rows_of_images
from fmm_distill.evaluation.pictures import still_images
from fmm_distill.evaluation.points import point_images
from fmm_distill.evaluation.waveforms import waveform_images
from fmm_distill.student.sampling import sample
from fmm_distill.teachers.codec import is_sound
from fmm_distill.teachers.conditions import Embeddings

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["COLUMNS", "SEED", "Gallery", "interpolate_noise"]

COLUMNS = 12
# Other noises than those of the metrics, so that the pictures are no selection of them.
SEED = NOISE_SEED + 1
# Of more coordinates, gray levels show more than the position of the first two.
_MOST_COORDINATES = 3


class Gallery:
    """Noises of one seed and the endpoints of the teacher's ODE from them.

    Args:
        solver_steps: RK4 steps of the teacher's ODE.
        count: the number of noises.

    Attributes:
        name: of the row of endpoints.
    """

    name = "teacher's ODE"

    def __init__(self, teacher: Teacher, solver_steps: int, count: int, seed: int, device: torch.device) -> None:
        draws = draw_samples_of(teacher, range(count), seed, device)
        self.teacher, self.solver_steps = teacher, solver_steps
        self.draws, self.noise, self.cond = draws, draws.noise, draws.cond
        conditions = teacher.conditions
        self.images = conditions.images if isinstance(conditions, Embeddings) else {}
        self.numbers = [] if conditions is None else places_of(conditions, range(count), seed)
        self.endpoints = self._solve(self.noise)

    @torch.no_grad()
    def _solve(self, noise: Tensor) -> Tensor:
        prior = self.teacher.prior(noise)
        return endpoint(self.teacher.velocity, self.teacher.schedule, prior, self.solver_steps, self.cond)

    def rows(
        self, student: Student, steps: tuple[int, ...], stochasticity: float = 0.0
    ) -> dict[str, Float[Tensor, "count channels height width"]]:
        """Return the teacher's row and one per number of student steps: decoded images in [-1, 1], on the CPU.

        Rows with the images of the conditions, if any, come before them.

        Args:
            stochasticity: strength of the fresh noise in the student's steps.
        """

        def made(count: int) -> Tensor:
            fresh = self.draws.step_generators()
            return sample(student, self.noise, count, self.cond, stochasticity=stochasticity, generator=fresh)

        return self._decoded(self.endpoints, {n: made(n) for n in steps})

    def interpolation(
        self, student: Student, steps: tuple[int, ...]
    ) -> dict[str, Float[Tensor, "count channels height width"]]:
        """Return the same rows for noises between the first two, all with the condition of the first.

        There is no fresh noise: these pictures show the map.
        """
        if self.cond is not None:
            self.cond = self.cond.rows(torch.zeros(len(self.noise), dtype=torch.long))
            self.numbers = self.numbers[:1] * len(self.noise)
        # One condition for all: the pictures then show the map's dependence on the noise alone.
        noise = interpolate_noise(self.noise[0], self.noise[1], len(self.noise))
        return self._decoded(self._solve(noise), {n: sample(student, noise, n, self.cond) for n in steps})

    def _decoded(self, endpoints: Tensor, samples: dict[int, Tensor]) -> dict[str, Tensor]:
        """Return the rows of images: those of the conditions, the teacher's and the student's."""
        rows = self._samples(endpoints, samples)
        height, width = rows[self.name].shape[-2:]
        return rows_of_images(self.images, self.numbers, (height, width)) | rows

    @torch.no_grad()
    def _samples(self, endpoints: Tensor, samples: dict[int, Tensor]) -> dict[str, Tensor]:
        rows = {self.name: endpoints}
        rows |= {f"student, {n} step{'s' if n > 1 else ''}": x for n, x in samples.items()}
        if self.teacher.has_coordinates and math.prod(self.teacher.event_shape) <= _MOST_COORDINATES:
            return {name: point_images(x.cpu(), endpoints.cpu()) for name, x in rows.items()}
        decoded = {name: self.teacher.codec.decode(x).cpu() for name, x in rows.items()}
        if not self.teacher.has_coordinates and is_sound(decoded[self.name]):
            return {name: waveform_images(x, decoded[self.name]) for name, x in decoded.items()}
        return {name: still_images(x) for name, x in decoded.items()}


def interpolate_noise(
    one: Float[Tensor, "*event"], other: Float[Tensor, "*event"], count: int
) -> Float[Tensor, "batch *event"]:
    """Return noises on a quarter circle between two: unlike those on a line, each is N(0, I) again."""
    angles = torch.linspace(0, math.pi / 2, count, dtype=torch.float64, device=one.device)
    shape = (count, *(1 for _ in one.shape))
    mixed = angles.cos().reshape(shape) * one + angles.sin().reshape(shape) * other
    return mixed.to(one.dtype)
