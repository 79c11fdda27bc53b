"""The one strength at which a stock network has the change of a scaled student's weights, for a grid of jumps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.student.student import Student

__all__ = ["LARGEST_ERROR", "Strength", "strength_of"]

# Of what the student adds to its teacher, trained students miss a quarter to a half (docs/results/digits.md: endpoint
# errors of 0.133 and 0.093 at 1 and 4 calls, the teacher's are 0.531 and 0.210). A tenth does not show next to this.
LARGEST_ERROR = 0.1
# Below this error the jumps of a grid differ by the rounding of the scheduler's float32 levels.
_EQUAL = 1e-5


@dataclass(frozen=True)
class Strength:
    """The strength of a change that is multiplied by the length of the jump, in a network with one set of weights.

    Attributes:
        value: the strength; one over the number of steps where all jumps are equal.
        error: the fraction of the student's change of the samples that is lost, to first order in the lengths.
        shortest, longest: the lengths of the jumps, as fractions of the time axis.
    """

    value: float
    error: float
    shortest: float
    longest: float

    @property
    def is_exact(self) -> bool:
        """True if all jumps of the grid have this length."""
        return self.error <= _EQUAL

    def check(self, steps: int) -> None:
        """Refuse a grid whose jumps are too different for one set of weights.

        Raises:
            UserError: if the error is larger than ``LARGEST_ERROR``.
        """
        if self.error > LARGEST_ERROR:
            raise UserError(
                f"export.steps: expected numbers of steps whose jumps have nearly one length, got {steps}, whose jumps "
                f"are {self.shortest:.2g} to {self.longest:.2g} of the time axis ({self.error:.0%} of the student's "
                f"change would be lost, at most {LARGEST_ERROR:.0%} may be); leave {steps} out, as the any-step "
                "pipeline takes every number, or try student.kind: embedded"
            )

    def to_json(self) -> dict[str, float]:
        """Return the entry of an export's files."""
        return {"strength": self.value, "grid_error": self.error}


def strength_of(student: Student, times: Float[Tensor, " points"]) -> Strength:
    """Return the best strength for the jumps between neighboring times.

    A jump of length h moves a sample by h u, and u changes by h du/dh, so that a strength s misses ``h (h - s) du/dh``
    of ``h^2 du/dh``. The strength minimizes the sum of the squares, and the error is the quotient of the sums.
    """
    positions = student.clock.warp(times.double().cpu())
    h = positions[:-1] - positions[1:]
    value = float(h.pow(3).sum() / h.square().sum())
    error = float((h * (h - value).abs()).sum() / h.square().sum())
    return Strength(value, error, float(h.min()), float(h.max()))
