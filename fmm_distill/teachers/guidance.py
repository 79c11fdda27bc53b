"""Guidance: the teacher's velocity extrapolated away from its unconditional velocities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fmm_distill.core.time_axis import expand
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.conditions import Conditions

__all__ = ["Guidance"]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, ``v_null + scale (v - v_null)``.

    This is eq. 6 of Ho and Salimans 2022 (arXiv 2207.12598) with their ``w = scale - 1``. The
    combination is the same for predictions of noise, of the sample and of the velocity: each is affine in the others.

    With an image scale it is ``v_none + scale (v - v_null) + image_scale (v_null - v_none)``, where ``v_null`` has the
    image and no prompt, and ``v_none`` neither: eq. 3 of Brooks et al. 2023 (arXiv 2211.09800).

    Some pipelines give the guided velocity the norms that the unguided one has along an axis, such as the channels of a
    token (Qwen-Image).

    Attributes:
        scale: 1 turns guidance off. With a range: the scale that is evaluated and folded.
        interval: the times between which guidance acts, ends included (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        range: lowest and highest scale of a student that is conditioned on the scale, one scale per sample (Meng et
            al. 2023, arXiv 2210.03142); None: ``scale`` for all samples.
        image_scale: of the second guidance, by the image; 1 turns it off.
        norm_axis: the axis of the norms, counted from the batch; 0: the guided velocity has its own.
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    range: tuple[float, float] | None = None
    image_scale: float = 1.0
    norm_axis: int = 0

    @property
    def is_off(self) -> bool:
        """True if the velocity is that of the network itself."""
        return self.scale == 1 and self.range is None and self.image_scale == 1

    @property
    def calls(self) -> int:
        """The number of network calls per guided velocity."""
        return 2 if self.image_scale == 1 else 3

    def check(self, conditions: Conditions | None, source: str) -> None:
        """Check that a network with these conditions has the unconditional inputs.

        Args:
            source: the id or folder of the teacher, for messages.

        Raises:
            UserError: otherwise, with the reason.
        """
        if conditions is None:
            key, scale = ("image_scale", self.image_scale) if self.scale == 1 else ("scale", self.scale)
            raise UserError(f"{source}: guidance.{key} {scale} for an unconditional teacher; expected 1")
        # Raises an error with the reason if there is no unconditional input.
        conditions.check_null()
        if self.image_scale == 1:
            return
        # Optional: conditions of the user's own need not have it.
        check = getattr(conditions, "check_without_image", None)
        if check is None:
            raise UserError(
                f"guidance.image_scale: expected 1 for a teacher of {conditions.noun}, got {self.image_scale:g}; leave "
                "it out"
            )
        check()

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
        without_image: Callable[[], Float[Tensor, "batch *event"]] | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """Return the guided velocity, shape ``[batch, *event]``.

        Args:
            null: computes the unconditional velocity; called only if a sample is guided.
            scales: one per sample; None: ``scale`` for all samples.
            without_image: computes the velocity without the image, too; called only with an image scale.
        """
        everywhere = self.interval == (0.0, 1.0)
        inside = (t >= self.interval[0]) & (t <= self.interval[1])
        alone = self.image_scale == 1 and (self.scale == 1 if scales is None else bool((scales == 1).all()))
        # Reading the times back from a GPU would wait for it: not necessary if guidance acts at all times.
        if alone or not (everywhere or bool(inside.any())):
            return v
        more = self.scale - 1 if scales is None else expand(scales - 1, v)
        v_null = null()
        guided = v + more * (v - v_null)
        if self.image_scale != 1 and without_image is not None:
            guided = guided + (self.image_scale - 1) * (v_null - without_image())
        if self.norm_axis:
            own, new = (each.norm(dim=self.norm_axis, keepdim=True) for each in (v, guided))
            guided = guided * (own / new.clamp_min(torch.finfo(v.dtype).tiny))
        return guided if everywhere else guided.where(expand(inside, v).bool(), v)
