"""Non-finite steps: optimizer steps whose loss or gradient is infinite or NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.amp import GradScaler

__all__ = ["OF_CRITIC", "NonFiniteSteps", "finite_or_none", "forget_gradients", "is_overflow", "worst_samples"]

OF_CRITIC = "the critic's loss or gradient is not finite"
"""The entry ``skipped`` of a step whose critic is not finite."""


@dataclass
class NonFiniteSteps:
    """Count of the non-finite steps of a run, which update nothing.

    Attributes:
        limit: number of consecutive ones after which the run returns to a checkpoint.
        lr_scale: factor of the learning rate: 1, or 0.5 after the return to a checkpoint.
        skipped: number of all of them.
        consecutive: number of the latest ones without a finite step in between.
    """

    limit: int
    lr_scale: float = 1.0
    skipped: int = 0
    consecutive: int = 0

    @property
    def limit_reached(self) -> bool:
        """True if the run has to return to a checkpoint."""
        return self.consecutive >= self.limit

    def count(self, finite: bool) -> bool:
        """Count a step. Return True if it is the first non-finite one of the run."""
        # Any finite step ends a row: single bad batches do not return the run to a checkpoint.
        self.consecutive = 0 if finite else self.consecutive + 1
        self.skipped += not finite
        return not finite and self.skipped == 1

    def halved(self) -> NonFiniteSteps:
        """Return the count after a return to a checkpoint: half the learning rate, no consecutive steps."""
        return NonFiniteSteps(self.limit, 0.5, self.skipped)

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint stores. The limit may change between starts and comes from the recipe."""
        return {"lr_scale": self.lr_scale, "skipped": self.skipped, "consecutive": self.consecutive}


def worst_samples(rows: Sequence[tuple[float, float, float]], count: int = 4) -> list[dict[str, float | None]]:
    """Return the samples of a batch with the largest losses, non-finite losses first.

    Args:
        rows: t, r and loss of each sample.
    """
    found = [{"t": t, "r": r, "loss": finite_or_none(loss)} for t, r, loss in rows]
    return sorted(found, key=lambda row: -math.inf if row["loss"] is None else -row["loss"])[:count]


def finite_or_none(value: float) -> float | None:
    """Return a number as JSON can hold it: null in place of NaN and infinity."""
    return value if math.isfinite(value) else None


def is_overflow(scaler: GradScaler | None, norm: float) -> bool:
    """Return True if a gradient scaler can still lower its scale."""
    # At a scale of 1 an infinite gradient is the network's own and no overflow of fp16.
    return scaler is not None and not math.isfinite(norm) and scaler.get_scale() > 1


def forget_gradients(scaler: GradScaler | None) -> None:
    """Make a gradient scaler ready for the next gradients after a step that is left out."""
    if scaler is not None:
        # It refuses to unscale the gradients of an optimizer twice without an update in between.
        scaler.update(scaler.get_scale())
