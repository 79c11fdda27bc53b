"""What a velocity field is, and what it may be conditioned on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Conditioning", "VelocityField"]


@dataclass(frozen=True)
class Conditioning:
    """What a network is told besides sample and time. No teacher of this version takes any."""


class VelocityField(Protocol):
    """``v(x, t) = E[eps - x_0 | x_t = x]`` on the axis of ``interpolant``; t in ``[t_min, t_max]``."""

    def __call__(
        self, x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """The velocity at x and t."""
        ...
