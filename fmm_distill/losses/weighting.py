"""From a sample's squared residual to what is minimized: its metric and its weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from fmm_distill.losses.base import Settings

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["LearnedWeight", "Metric", "Weight", "measure", "weigh"]


class Metric(Settings):
    """How large a residual is."""

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
    """How much a sample counts."""

    kind: Literal["adaptive", "learned", "none"] = "adaptive"
    """By its own loss d, ``(d + constant)^-power``, gradient stopped; ``exp(-w) d + w``, w(t, r) learned; or none."""
    power: float = Field(default=0.5, ge=0, le=2)
    """0: every sample counts the same; 0.5 has the gradient of a pseudo-Huber metric; 1 takes the logarithm."""
    constant: float = Field(default=1e-3, ge=1e-12, le=1e6)
    """What keeps the weight of a small residual finite."""

    @model_validator(mode="after")
    def _settings_act(self) -> Self:
        if self.kind != "adaptive" and (self.power, self.constant) != (0.5, 1e-3):
            raise ValueError(f"power and constant act on kind: adaptive only: --set 'weight={{kind: {self.kind}}}'")
        return self


def measure(squared: Float[Tensor, " batch"], metric: Metric) -> Float[Tensor, " batch"]:
    """The metric of residuals with these mean squares (pseudo-Huber: Song and Dhariwal 2023, arXiv 2310.14189)."""
    if metric.kind == "squared":
        return squared
    # Not the difference of two roots, which loses the digits of a small residual.
    return squared / ((squared + metric.constant**2).sqrt() + metric.constant)


def weigh(loss: Float[Tensor, " batch"], weight: Weight) -> Float[Tensor, " batch"]:
    """The adaptive weight of Geng et al. 2025 (MeanFlow, arXiv 2505.13447, section 4.3) on each sample's loss, or none.

    The learned one has parameters: ``LearnedWeight``.
    """
    if weight.kind == "none":
        return loss
    return loss * (loss.detach() + weight.constant) ** -weight.power


class LearnedWeight(nn.Module):
    """``exp(-w) loss + w``, w a learned function of both times: at its best the logarithm of the mean loss there.

    The uncertainty weight of EDM2 (Karras et al. 2024, arXiv 2312.02696, section A.3) with two times, as in
    arXiv 2505.18825: a linear function of cosines. It starts at w = 0.
    """

    num_frequencies = 16

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * self.num_frequencies, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, loss: Float[Tensor, " batch"], start: Float[Tensor, " batch"], end: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Each sample's loss, weighted; ``start`` and ``end`` are the jump's ends on the clock, in [0, 1]."""
        ends = torch.stack([start, end], 1).to(self.linear.weight.dtype)
        frequencies = math.pi * torch.arange(1, self.num_frequencies + 1, device=ends.device)
        # A logarithm of 8 is off by a hundredth in bfloat16.
        with torch.autocast(ends.device.type, enabled=False):
            w = self.linear((ends[:, :, None] * frequencies).cos().flatten(1))[:, 0]
        return (-w).exp() * loss + w
