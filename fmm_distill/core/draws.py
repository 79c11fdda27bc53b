"""Random numbers as functions of a seed and a position: no generator has a state that a run must save."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fmm_distill.core.device import to_device

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["Draws", "draw", "positions_of", "sample_generator", "step_generator"]

_WORD = 2**32
# The fields on the device of the networks.
_OF_NETWORKS = ("noise", "renoise")
# The streams that choose the times, the loss and the kind of a jump.
_OF_GROUPS = ("first", "second", "kind", "share", "policy")


@dataclass
class Draws:
    """The random numbers of some samples of one step, each field from a stream of its own.

    Numbers of shape ``[batch]`` stay on the CPU: decisions that depend on them do not wait for a GPU.

    Attributes:
        noise: N(0, I), shape ``[batch, *event]``, on the device of the networks.
        first: uniform on [0, 1], shape ``[batch]``: the first of the two times.
        second: uniform on [0, 1], shape ``[batch]``: the second of the two times.
        kind: uniform on [0, 1], shape ``[batch]``: the kind of jump (from noise, to data, on the diagonal).
        image: uniform on [0, 1], shape ``[batch]``: position of the image in a dataset.
        uniform: uniform on [0, 1], shape ``[batch]``: passed to the loss, which may place a middle time with it.
        condition: uniform on [0, 1], shape ``[batch]``: position of the condition.
        guidance: uniform on [0, 1], shape ``[batch]``: position of the scale in its range.
        flip: uniform on [0, 1], shape ``[batch]``: whether the image is mirrored.
        policy: uniform on [0, 1], shape ``[batch]``: whether a sample starts from the student's jump despite data.
        position: in [0, 1), shape ``[batch]``: chooses the loss of a sample, spread evenly in every part of a batch.
        renoise: N(0, I), as ``noise``, for samples that were generated from it; None: no loss takes it.
    """

    noise: Float[Tensor, "batch *event"]
    first: Float[Tensor, " batch"]
    second: Float[Tensor, " batch"]
    kind: Float[Tensor, " batch"]
    image: Float[Tensor, " batch"]
    uniform: Float[Tensor, " batch"]
    condition: Float[Tensor, " batch"]
    guidance: Float[Tensor, " batch"]
    flip: Float[Tensor, " batch"]
    policy: Float[Tensor, " batch"]
    position: Float[Tensor, " batch"]
    renoise: Float[Tensor, "batch *event"] | None = None

    def part(self, start: int, stop: int, device: torch.device | str) -> Draws:
        """Return samples ``start`` to ``stop`` of the batch, with their noise on ``device``."""
        some = {name: values[start:stop] for name, values in vars(self).items() if values is not None}
        on_device = {name: to_device(some[name], device) for name in _OF_NETWORKS if name in some}
        return Draws(**some | on_device)

    def rows(self, index: Int[Tensor, " some"]) -> Draws:
        """Return the samples at these rows; the index is on the CPU."""
        rows = to_device(index, self.noise.device)
        return Draws(
            **{
                name: values[rows if name in _OF_NETWORKS else index]
                for name, values in vars(self).items()
                if values is not None
            }
        )


def draw(
    seed: int,
    step: int,
    batch: int,
    event_shape: tuple[int, ...],
    *,
    groups: int = 0,
    purpose: str = "",
    renoised: bool = False,
) -> Draws:
    """Return the draws of a complete step, a function of the seed, the step and the index in a batch of this size.

    Args:
        groups: the number of groups of equally many consecutive samples that share all numbers which times and losses
            are chosen by; 0: each sample has its own.
        purpose: a name of the use of the numbers in this step, if there are several; each has its own streams.
        renoised: also draw ``renoise``.
    """

    def generator(stream: str) -> torch.Generator:
        return step_generator(seed, step, purpose + stream)

    def uniform(stream: str) -> Tensor:
        # float64, as times are: in float32 a uniform draw has 2^24 values, and equal times would occur.
        values = torch.rand(batch, generator=generator(stream), dtype=torch.float64)
        return shared(values) if stream in _OF_GROUPS else values

    def shared(values: Tensor) -> Tensor:
        return values[:groups].repeat_interleave(batch // groups) if groups else values

    # On the CPU also for a GPU: the generators of devices differ, and a draw must not depend on the device.
    noise = torch.randn(batch, *event_shape, generator=generator("noise"))
    renoise = torch.randn(batch, *event_shape, generator=generator("renoise")) if renoised else None
    names = ("first", "second", "kind", "image", "condition", "guidance", "flip", "policy")
    position = positions_of(batch)
    # The name of a stream is hashed: another name than "share" would be other random numbers.
    drawn = {name: uniform(name) for name in names}
    return Draws(noise, uniform=uniform("share"), **drawn, position=shared(position), renoise=renoise)


def positions_of(count: int) -> Float[Tensor, " count"]:
    """Return the positions in [0, 1) that choose the losses of the samples, or groups, of every step."""
    # Multiples of the golden ratio: any stretch of them fills the unit interval evenly.
    return torch.arange(count, dtype=torch.float64) * ((5**0.5 - 1) / 2) % 1


def step_generator(seed: int, step: int, stream: str) -> torch.Generator:
    """Return the generator of one stream of a training step, seeded by a hash of all three."""
    digest = hashlib.sha256(f"{seed} {step} {stream}".encode()).digest()
    # torch takes seeds below 2^63.
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def sample_generator(seed: int, number: int, stream: int = 0) -> torch.Generator:
    """Return the generator of one sample of an evaluation; numbers below 2^32 never share one.

    torch's CPU generator uses 32 bits of its seed. The sum of seed, stream and number is scrambled by a bijection (the
    finalizer of MurmurHash3), so that the generators of neighboring numbers are unrelated and no two are equal, which a
    hash cut to 32 bits would not guarantee.
    """
    # Large odd factors: neighboring seeds and streams start far from each other and do not overlap by small numbers.
    word = (seed * 0x9E3779B1 + stream * 0x85EBCA77 + number) % _WORD
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) % _WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) % _WORD
    return torch.Generator().manual_seed(word ^ (word >> 16))
