"""Guidance: the teacher's velocity drawn away from what it says without a condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmm_distill.core.time_axis import expand

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning

__all__ = ["Guidance"]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance ``v_null + scale (v - v_null)`` (Ho and Salimans 2022, arXiv 2207.12598).

    The same combination of noise predictions, of samples and of velocities: each is affine in the others.

    Attributes:
        scale: 1 is the teacher unguided. Of a range: the one that is evaluated and folded.
        interval: times between which it acts, ends included; outside it the teacher is unguided (Kynkäänniemi et
            al. 2024, arXiv 2404.07724).
        range: scales that students are told, every sample its own (Meng et al. 2023, arXiv 2210.03142); None: the one.
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    range: tuple[float, float] | None = None

    def at(self, cond: Conditioning, place: Float[Tensor, " batch"] | None = None) -> Conditioning:
        """A condition with scales of the range: those at places in [0, 1), or the one; without a range as it is."""
        if self.range is None:
            return cond
        low, high = self.range
        return cond.guided(self.scale if place is None else low + (high - low) * place)

    def guided(
        self,
        v: Float[Tensor, "batch *event"],
        null: Callable[[], Float[Tensor, "batch *event"]],
        t: Float[Tensor, " batch"],
        scales: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """The guided velocity, by the one scale or by one a sample; ``null`` is called where any sample is guided."""
        everywhere = self.interval == (0.0, 1.0)
        inside = (t >= self.interval[0]) & (t <= self.interval[1])
        alone = self.scale == 1 if scales is None else bool((scales == 1).all())
        # Where it acts at all times a GPU is not asked which times there are.
        if alone or not (everywhere or bool(inside.any())):
            return v
        more = self.scale - 1 if scales is None else expand(scales - 1, v)
        guided = v + more * (v - null())
        return guided if everywhere else guided.where(expand(inside, v).bool(), v)
