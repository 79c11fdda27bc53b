"""How a run counts the steps that were no numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Faults"]


@dataclass
class Faults:
    """Steps whose loss or gradient was no number.

    Attributes:
        limit: how many of them in a row are too many.
        rate: factor of the learning rate: 1, or 0.5 after one return to a checkpoint.
        skipped: how many there were.
        in_a_row: how many the last steps were.
    """

    limit: int
    rate: float = 1.0
    skipped: int = 0
    in_a_row: int = 0

    @property
    def too_many(self) -> bool:
        """Whether it is time to go back."""
        return self.in_a_row >= self.limit

    def count(self, good: bool) -> bool:
        """Note how a step went; gives whether it was the first bad one."""
        self.in_a_row = 0 if good else self.in_a_row + 1
        self.skipped += not good
        return not good and self.skipped == 1
