"""Guidance: the teacher's velocity drawn away from what it says without a condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmm_distill.interpolant import expand

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Guidance"]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance ``v_null + scale (v - v_null)`` (Ho and Salimans 2022, arXiv 2207.12598).

    The same combination of noise predictions, of samples and of velocities: each is affine in the others.

    Attributes:
        scale: 1 is the teacher unguided.
        interval: times between which it acts, ends included; outside it the teacher is unguided (Kynkäänniemi et
            al. 2024, arXiv 2404.07724).
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def guided(
        self,
        v: Float[Tensor, "batch *event"],
        null: Callable[[], Float[Tensor, "batch *event"]],
        t: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch *event"]:
        """The guided velocity; ``null`` is called where any sample is guided."""
        inside = (t >= self.interval[0]) & (t <= self.interval[1])
        if self.scale == 1 or not bool(inside.any()):
            return v
        guided = v + (self.scale - 1) * (v - null())
        return guided.where(expand(inside, v).bool(), v)
