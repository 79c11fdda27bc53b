"""What every loss shares: the base of its settings, and the mean square of a residual."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["DerivativeSettings", "LossSettings", "squared_norm"]


class Settings(BaseModel):
    """A closed, frozen group of settings: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LossSettings(Settings):
    """Settings that every loss has.

    Attributes:
        summary: one sentence for ``fmm-distill losses``.
        paper: where the loss comes from.
        diagonal: whether it trains jumps of length 0 alone, so that r plays no part.
        takes: what the function takes besides the five arguments that all have: ``target_map``, a map whose outputs
            are targets (the student's own moving average, a frozen copy), and ``share``, uniform on [0, 1], shape
            ``[batch]``, which places a middle time.
    """

    summary: ClassVar[str]
    paper: ClassVar[str]
    diagonal: ClassVar[bool] = False
    takes: ClassVar[frozenset[str]] = frozenset()

    @property
    def follows(self) -> Literal["average", "frozen"] | None:
        """Which copy of the student makes the target's jumps, where one does."""
        target = getattr(self, "target", None) if "target_map" in self.takes else None
        if target == "average":
            return "average"
        return "frozen" if target == "frozen" else None

    @property
    def sees_no_teacher(self) -> bool:
        """Whether the loss only makes a map agree with itself, so that another one has to teach it the velocity."""
        return False

    def at_step(self, step: int) -> Self:
        """The settings in force at a step; those with a warm-up differ from step to step."""
        return self


class DerivativeSettings(LossSettings):
    """Settings of a loss that differentiates the map.

    Attributes:
        in_r: whether in the target time alone, where central differences are within 1e-3 of forward mode.
    """

    in_r: ClassVar[bool] = False

    derivative: Literal["auto", "exact", "central"] = "auto"
    """How derivatives are taken: forward mode, central differences, or whichever runs (it is said which)."""

    @property
    def differentiates(self) -> bool:
        """Whether a derivative is taken at all: not where a finite step stands in its place."""
        return True

    @property
    def keeps_graph(self) -> bool:
        """Whether gradients pass through the derivative."""
        return True


def squared_norm(residual: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    """Mean over the event of the squared residual, in float32 at least."""
    return residual.flatten(1).to(torch.promote_types(residual.dtype, torch.float32)).square().mean(1)
