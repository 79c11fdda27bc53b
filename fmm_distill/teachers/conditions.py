"""The conditions of a teacher: class labels, or the embeddings of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["Classes", "Conditions", "Embeddings"]


class Conditions(Protocol):
    """A finite set of conditions.

    Attributes:
        names: one per condition.
        noun: the name of what they are, ``classes`` or ``prompts``.
    """

    noun: str
    names: tuple[str, ...]

    def pick(self, positions: Float[Tensor, " batch"]) -> Conditioning:
        """Return the conditions at these positions in [0, 1); every condition has an interval of the same length."""
        ...

    def null(self, count: int) -> Conditioning:
        """Return the unconditional input of the network, for ``count`` samples.

        Raises:
            UserError: if the teacher has none.
        """
        ...


def _index(positions: Tensor, count: int) -> Int[Tensor, " batch"]:
    # Rounding can lift the largest position below 1 to ``count``.
    return (positions.cpu() * count).long().clamp_max(count - 1)


class Classes:
    """Class labels from 0 to count - 1.

    Args:
        names: one per class.
        null_label: the label for no class; None: the network has none.
        keyword: of the network's call.
    """

    noun = "classes"

    def __init__(self, names: tuple[str, ...], null_label: int | None, keyword: str = "class_labels") -> None:
        self.names, self.null_label, self.keyword = names, null_label, keyword

    def pick(self, positions: Float[Tensor, " batch"]) -> Conditioning:
        """Return the labels at these positions."""
        return Conditioning({self.keyword: _index(positions, len(self.names))})

    def null(self, count: int) -> Conditioning:
        """Return the label for no class."""
        # A label of another class in its place would guide away from that class.
        if self.null_label is None:
            raise UserError(
                "guidance: expected a label for no class, got a class-conditional teacher without one; try "
                "guidance.scale 1"
            )
        return Conditioning({self.keyword: torch.full((count,), self.null_label)})


class Embeddings:
    """The embeddings of prompts, one row per prompt, and of the empty prompt.

    Args:
        names: the prompts.
        empty: the embeddings of the empty prompt; None: guidance can't use it.
        reason: why ``empty`` is None, for messages.
    """

    noun = "prompts"

    def __init__(
        self, names: tuple[str, ...], rows: Conditioning, empty: Conditioning | None, reason: str = ""
    ) -> None:
        self.names, self.prompts, self.empty, self.reason = names, rows, empty, reason

    def pick(self, positions: Float[Tensor, " batch"]) -> Conditioning:
        """Return the embeddings of the prompts at these positions."""
        return self.prompts.rows(_index(positions, len(self.names)))

    def null(self, count: int) -> Conditioning:
        """Return the embeddings of the empty prompt."""
        if self.empty is None:
            raise UserError(f"guidance: {self.reason}; try guidance.scale 1")
        return self.empty.rows(torch.zeros(count, dtype=torch.long))
