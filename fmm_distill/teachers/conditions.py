"""What a conditional teacher can be told: classes, or the embeddings of prompts."""

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
    """A set of conditions to draw from."""

    names: tuple[str, ...]

    def pick(self, positions: Float[Tensor, " batch"]) -> Conditioning:
        """The conditions at these positions, uniform in [0, 1)."""
        ...

    def null(self, count: int) -> Conditioning:
        """What the network is told where it is told nothing.

        Raises:
            UserError: if the teacher has no such input.
        """
        ...


def _index(positions: Tensor, count: int) -> Int[Tensor, " batch"]:
    return (positions.cpu() * count).long().clamp_max(count - 1)


class Classes:
    """Class labels 0 to count - 1; ``null_label`` is the one that stands for none.

    Args:
        names: one a class.
    """

    def __init__(self, names: tuple[str, ...], null_label: int | None, keyword: str = "class_labels") -> None:
        self.names, self.null_label, self.keyword = names, null_label, keyword

    def pick(self, positions: Float[Tensor, " batch"]) -> Conditioning:
        """Labels, each as likely as the others."""
        return Conditioning({self.keyword: _index(positions, len(self.names))})

    def null(self, count: int) -> Conditioning:
        """The label that stands for none."""
        if self.null_label is None:
            raise UserError("guidance: this class-conditional teacher has no label for no class; wanted scale 1")
        return Conditioning({self.keyword: torch.full((count,), self.null_label)})


class Embeddings:
    """The embeddings of prompts, one row a prompt, and those of the empty prompt.

    Args:
        names: the prompts.
        why: there is no empty prompt to be guided away from, where there is none.
    """

    def __init__(self, names: tuple[str, ...], rows: Conditioning, empty: Conditioning | None, why: str = "") -> None:
        self.names, self.prompts, self.empty, self.why = names, rows, empty, why

    def pick(self, positions: Float[Tensor, " batch"]) -> Conditioning:
        """Prompts, each as likely as the others."""
        return self.prompts.rows(_index(positions, len(self.names)))

    def null(self, count: int) -> Conditioning:
        """The empty prompt."""
        if self.empty is None:
            raise UserError(f"guidance: {self.why}; wanted scale 1")
        return self.empty.rows(torch.zeros(count, dtype=torch.long))
