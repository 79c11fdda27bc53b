"""Noises and conditions of an evaluation: functions of a seed and the sample's number, of nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.conditions import Conditions

__all__ = ["NOISE_SEED", "SampleDraws", "draw_samples_of", "prompts_of"]

NOISE_SEED = 20_240_607
_WORD = 2**32


@dataclass(frozen=True)
class SampleDraws:
    """What some samples start from.

    Attributes:
        seed: of all samples.
        numbers: of these.
        noise: N(0, I), each from a generator of its own.
        cond: what they are told; None: nothing.
    """

    seed: int
    numbers: range
    noise: Float[Tensor, "batch *event"]
    cond: Conditioning | None

    def __len__(self) -> int:
        return len(self.numbers)

    def generators(self, *, after_noise: bool) -> list[torch.Generator]:
        """The samples' generators, for a pipeline that draws the noise itself, or for what it draws after it."""
        made = [_generator(self.seed, number) for number in self.numbers]
        if after_noise:
            for generator in made:
                torch.randn(1, *self.noise.shape[1:], generator=generator)
        return made


def draw_samples_of(teacher: Teacher, numbers: range, seed: int, device: torch.device | str = "cpu") -> SampleDraws:
    """The noises and conditions of the samples with these numbers, whatever the batch is that they are drawn in.

    The noise is what diffusers draws from the sample's own generator, so a stock pipeline that is given that generator
    starts from the same noise.
    """
    shape = (1, *teacher.event_shape)
    noise = torch.cat([torch.randn(shape, generator=_generator(seed, number)) for number in numbers])
    cond = None
    if teacher.conditions is not None:
        told = teacher.conditioned_on(_places_of(numbers, seed))
        cond = None if told is None else told.to(device)
    return SampleDraws(seed, numbers, noise.to(device), cond)


def _places_of(numbers: range, seed: int) -> Float[Tensor, " batch"]:
    """Where in [0, 1) the samples' conditions stand; of generators of their own, for nothing may precede the noise."""
    return torch.cat([torch.rand(1, generator=_generator(seed, number, stream=1)) for number in numbers])


def prompts_of(known: Conditions, numbers: range, seed: int) -> list[str]:
    """What the samples of these numbers are told, in words."""
    count = len(known.names)
    return [known.names[min(int(place * count), count - 1)] for place in _places_of(numbers, seed).tolist()]


def _generator(seed: int, number: int, stream: int = 0) -> torch.Generator:
    """The generator of one sample; numbers below 2^32 never share one.

    Torch's generator keeps 32 bits of its seed, so sums of seed and number are scrambled by a map that is one to one
    (the finalizer of MurmurHash3), and neighbors have nothing in common.
    """
    word = (seed * 0x9E3779B1 + stream * 0x85EBCA77 + number) % _WORD
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) % _WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) % _WORD
    return torch.Generator().manual_seed(word ^ (word >> 16))
