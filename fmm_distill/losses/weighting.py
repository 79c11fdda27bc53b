"""From the squared residual of a sample to the minimized loss: its distance and its weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from fmm_distill.losses.settings import Settings

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Distance", "LearnedWeight", "Weight", "measure", "weigh"]


class Distance(Settings):
    """The distance between a prediction and its target."""

    kind: Literal["squared", "pseudo_huber"] = "squared"
    """The mean square d over the sample, or ``sqrt(d + constant^2) - constant``, linear for large residuals."""
    constant: float = Field(default=0.03, ge=1e-12, le=1e6)
    """Root mean square residual at which pseudo_huber turns from square to linear."""

    @model_validator(mode="after")
    def _constant_acts(self) -> Self:
        if self.kind == "squared" and self.constant != 0.03:
            raise ValueError("constant acts on kind: pseudo_huber only")
        return self


class Weight(Settings):
    """The weight of each sample in the loss."""

    kind: Literal["adaptive", "learned", "none"] = "adaptive"
    """``(d + constant)^-power`` of its own loss d, gradient stopped; ``exp(-w) d + w``, w(t, r) learned; or none."""
    power: float = Field(default=0.5, ge=0, le=2)
    """0: equal weights; 0.5 has the gradient of a pseudo-Huber distance; 1 takes the logarithm."""
    constant: float = Field(default=1e-3, ge=1e-12, le=1e6)
    """Offset that bounds the weight of a small residual."""

    @model_validator(mode="after")
    def _settings_act(self) -> Self:
        if self.kind != "adaptive" and (self.power, self.constant) != (0.5, 1e-3):
            raise ValueError(f"power and constant act on kind: adaptive only: --set 'weight={{kind: {self.kind}}}'")
        return self


def measure(squared: Float[Tensor, " batch"], distance: Distance) -> Float[Tensor, " batch"]:
    """Return the distances of mean squared residuals (pseudo-Huber: Song and Dhariwal 2023, arXiv 2310.14189)."""
    if distance.kind == "squared":
        return squared
    # The difference of two roots would lose the digits of a small residual.
    return squared / ((squared + distance.constant**2).sqrt() + distance.constant)


def weigh(loss: Float[Tensor, " batch"], weight: Weight) -> Float[Tensor, " batch"]:
    """Return each sample's loss with the adaptive weight of Geng et al. (MeanFlow, arXiv 2505.13447, section 4.3).

    With ``kind: none`` the loss is returned as it is. A learned weight has parameters: ``LearnedWeight``.
    """
    if weight.kind == "none":
        return loss
    # Detached: the weight scales a sample's gradient and must not be minimized itself.
    return loss * (loss.detach() + weight.constant) ** -weight.power


class LearnedWeight(nn.Module):
    """``exp(-w) loss + w`` with w a learned function of both times, at best the logarithm of the mean loss there.

    The uncertainty weight of EDM2 (Karras et al. 2024, arXiv 2312.02696, section A.3) with two times, as in
    arXiv 2505.18825: a linear function of cosines. It starts at w = 0.
    """

    num_frequencies = 16

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * self.num_frequencies, 1)
        # w = 0 at the start, so that the first steps are those of the unweighted loss.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, loss: Float[Tensor, " batch"], start: Float[Tensor, " batch"], end: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Return each sample's weighted loss; ``start`` and ``end`` are the warped times of the jump, in [0, 1]."""
        ends = torch.stack([start, end], 1).to(self.linear.weight.dtype)
        # Cosines of multiples of pi: each has slope 0 at both ends of [0, 1], beyond which there are no times.
        frequencies = math.pi * torch.arange(1, self.num_frequencies + 1, device=ends.device)
        # bfloat16 has a relative precision of 1/256: a w of 8 would be off by a hundredth.
        with torch.autocast(ends.device.type, enabled=False):
            w = self.linear((ends[:, :, None] * frequencies).cos().flatten(1))[:, 0]
        return (-w).exp() * loss + w
