"""The random numbers of a training step: functions of the seed, the step and the index in the batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fmm_distill.core.device import to_device

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["Draws", "draw"]


@dataclass
class Draws:
    """The random numbers of some samples of one step, each from a stream of its own.

    Numbers of ``[batch]`` stay on the CPU: what is decided by them is decided without waiting for a GPU.

    Attributes:
        noise: N(0, I), shape ``[batch, *event]``; where the networks are.
        first, second: uniform on [0, 1], shape ``[batch]``: the two times.
        kind: uniform on [0, 1], shape ``[batch]``: what jump it is.
        image: uniform on [0, 1], shape ``[batch]``: which image of a dataset.
        share: uniform on [0, 1], shape ``[batch]``: what a loss draws itself, such as a middle time.
        condition: uniform on [0, 1], shape ``[batch]``: what the network is told besides.
        guidance: uniform on [0, 1], shape ``[batch]``: the scale in its range, where students are told it.
        flip: uniform on [0, 1], shape ``[batch]``: whether its image is mirrored.
        policy: uniform on [0, 1], shape ``[batch]``: whether it starts from the student's own jump although there is
            data.
        place: in [0, 1), shape ``[batch]``: the sample's place, spread evenly in every part of a batch; which term
            of a sum of losses it goes to.
    """

    noise: Float[Tensor, "batch *event"]
    first: Float[Tensor, " batch"]
    second: Float[Tensor, " batch"]
    kind: Float[Tensor, " batch"]
    image: Float[Tensor, " batch"]
    share: Float[Tensor, " batch"]
    condition: Float[Tensor, " batch"]
    guidance: Float[Tensor, " batch"]
    flip: Float[Tensor, " batch"]
    policy: Float[Tensor, " batch"]
    place: Float[Tensor, " batch"]

    def part(self, start: int, stop: int, device: torch.device | str) -> Draws:
        """Samples ``start`` to ``stop`` of the batch, their noise on ``device``."""
        some = {name: values[start:stop] for name, values in vars(self).items()}
        return Draws(**some | {"noise": to_device(some["noise"], device)})

    def rows(self, index: Int[Tensor, " some"]) -> Draws:
        """The samples at these rows, counted on the CPU."""
        some = {name: values[index] for name, values in vars(self).items() if name != "noise"}
        return Draws(self.noise[to_device(index, self.noise.device)], **some)


def draw(seed: int, step: int, batch: int, event_shape: tuple[int, ...]) -> Draws:
    """The draws of a whole step: a function of the seed, the step and the place in a batch of this size."""

    def stream(name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{seed} {step} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def uniform(name: str) -> Tensor:
        return torch.rand(batch, generator=stream(name), dtype=torch.float64)

    noise = torch.randn(batch, *event_shape, generator=stream("noise"))
    names = ("first", "second", "kind", "image", "share", "condition", "guidance", "flip", "policy")
    # Multiples of the golden ratio: any stretch of them fills the unit interval evenly.
    place = torch.arange(batch, dtype=torch.float64) * ((5**0.5 - 1) / 2) % 1
    return Draws(noise, **{name: uniform(name) for name in names}, place=place)
