"""Guidance: the teacher's velocity extrapolated away from its unconditional velocity."""

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
    """Classifier-free guidance, ``v_null + scale (v - v_null)``.

    This is eq. 6 of Ho and Salimans 2022 (arXiv 2207.12598) with their ``w = scale - 1``. The
    combination is the same for predictions of noise, of the sample and of the velocity: each is affine in the others.

    Attributes:
        scale: 1 turns guidance off. With a range: the scale that is evaluated and folded.
        interval: the times between which guidance acts, ends included (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        range: lowest and highest scale of a student that is conditioned on the scale, one scale per sample (Meng et
            al. 2023, arXiv 2210.03142); None: ``scale`` for all samples.
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    range: tuple[float, float] | None = None

    def at(self, cond: Conditioning, position: Float[Tensor, " batch"] | None = None) -> Conditioning:
        """Return conditions with scales of the range; without a range, the conditions unchanged.

        Args:
            position: of each sample's scale in the range, in [0, 1); None: ``scale`` for all samples.
        """
        if self.range is None:
            return cond
        low, high = self.range
        return cond.guided(self.scale if position is None else low + (high - low) * position)

    def guided(
        self,
        v: Float[Tensor, "batch *event"],
        null: Callable[[], Float[Tensor, "batch *event"]],
        t: Float[Tensor, " batch"],
        scales: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """Return the guided velocity, shape ``[batch, *event]``.

        Args:
            null: computes the unconditional velocity; called only if a sample is guided.
            scales: one per sample; None: ``scale`` for all samples.
        """
        everywhere = self.interval == (0.0, 1.0)
        inside = (t >= self.interval[0]) & (t <= self.interval[1])
        alone = self.scale == 1 if scales is None else bool((scales == 1).all())
        # Reading the times back from a GPU would wait for it: not necessary if guidance acts at all times.
        if alone or not (everywhere or bool(inside.any())):
            return v
        more = self.scale - 1 if scales is None else expand(scales - 1, v)
        guided = v + more * (v - null())
        return guided if everywhere else guided.where(expand(inside, v).bool(), v)
