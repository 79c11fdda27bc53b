"""Noises and conditions of an evaluation, as functions of a seed and the number of the sample alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fmm_distill.core.draws import sample_generator

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.conditions import Conditions

__all__ = ["NOISE_SEED", "SampleDraws", "draw_samples_of", "places_of", "prompts_of"]

# Any number, but one for all runs, so that their values come from the same noises.
NOISE_SEED = 20_240_607
# Streams of the generators of a sample: 0 is the noise that it starts from.
_OF_CONDITION, _OF_STEPS = 1, 2


@dataclass(frozen=True)
class SampleDraws:
    """Noises and conditions of some samples.

    Attributes:
        seed: of all samples of the evaluation.
        numbers: the numbers of these samples.
        noise: N(0, I), from one generator per sample.
        cond: inputs of the network besides x and t; None for an unconditional teacher.
    """

    seed: int
    numbers: range
    noise: Float[Tensor, "batch *event"]
    cond: Conditioning | None

    def __len__(self) -> int:
        return len(self.numbers)

    def generators(self, *, after_noise: bool) -> list[torch.Generator]:
        """Return one generator per sample, for a pipeline.

        Args:
            after_noise: the noise is already drawn from them, as for a pipeline that is given the noise.
        """
        made = [sample_generator(self.seed, number) for number in self.numbers]
        if after_noise:
            for generator in made:
                # The state after the noise, from which a pipeline draws the noise of its steps.
                torch.randn(1, *self.noise.shape[1:], generator=generator)
        return made

    def step_generators(self) -> list[torch.Generator]:
        """Return one generator per sample, for the fresh noise of a student's steps."""
        return [sample_generator(self.seed, number, stream=_OF_STEPS) for number in self.numbers]


def draw_samples_of(teacher: Teacher, numbers: range, seed: int, device: torch.device | str = "cpu") -> SampleDraws:
    """Return the noises and conditions of the samples with these numbers; they don't depend on the batch.

    A stock pipeline that is given the generator of a sample draws the same noise.
    """
    shape = (1, *teacher.event_shape)
    noise = torch.cat([torch.randn(shape, generator=sample_generator(seed, number)) for number in numbers])
    cond = None
    if teacher.conditions is not None:
        inputs = teacher.conditioned_on(_positions_of(numbers, seed))
        cond = None if inputs is None else inputs.to(device)
    return SampleDraws(seed, numbers, noise.to(device), cond)


def _positions_of(numbers: range, seed: int) -> Float[Tensor, " batch"]:
    """Return the positions in [0, 1) of the samples' conditions.

    They have generators of their own, since a pipeline draws the noise first.
    """
    return torch.cat(
        [torch.rand(1, generator=sample_generator(seed, number, stream=_OF_CONDITION)) for number in numbers]
    )


def prompts_of(known: Conditions, numbers: range, seed: int) -> list[str]:
    """Return the prompts of the samples with these numbers."""
    return [known.names[i] for i in places_of(known, numbers, seed)]


def places_of(known: Conditions, numbers: range, seed: int) -> list[int]:
    """Return the numbers of the conditions of the samples with these numbers."""
    count = len(known.names)
    return [min(int(position * count), count - 1) for position in _positions_of(numbers, seed).tolist()]
