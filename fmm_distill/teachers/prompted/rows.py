"""Rows of the samples in one argument of a network's call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = [
    "LENGTHS",
    "AnyRows",
    "EqualEntries",
    "Ragged",
    "RaggedRows",
    "Rows",
    "is_close",
    "rows_of_list",
    "rows_of_tensor",
]

# Before the path of a list of tensors of several lengths, which is stored padded: the name of their lengths.
LENGTHS = "lengths of."
# Difference between the embeddings of a prompt in two batches, relative to the largest value: rounding of a text
# encoder in float32, whose sums run in another order.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Rows:
    """Rows of the samples in a tensor.

    Attributes:
        axis: along which the rows follow each other.
        repeats: rows per sample, such as the frames of a video.
        tiled: the samples follow each other, and are repeated; else the rows of a sample follow each other.
    """

    axis: int
    repeats: int = 1
    tiled: bool = False

    def split(self, path: str, value: Tensor, count: int) -> dict[str, Tensor]:
        """Return the rows of ``count`` samples, the first axis; the second one has the repeats."""
        rows = value.movedim(self.axis, 0)
        if len(rows) != count * self.repeats:
            raise UserError(
                f"expected {count * self.repeats} rows of {count} prompts in the network's {path}, got {len(rows)}; "
                "write an adapter for it (docs/add-a-teacher.md)"
            )
        if self.repeats == 1:
            return {path: rows}
        sizes = (self.repeats, count) if self.tiled else (count, self.repeats)
        apart = rows.unflatten(0, sizes)
        return {path: apart.transpose(0, 1) if self.tiled else apart}

    def join(self, path: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the argument for some rows: the inverse of ``split``."""
        rows = inputs[path]
        if self.repeats > 1:
            rows = (rows.transpose(0, 1) if self.tiled else rows).flatten(0, 1)
        return rows.movedim(0, self.axis)


@dataclass(frozen=True)
class TensorEntries:
    """A list with one tensor per sample, of several lengths; they are stored padded, with their lengths."""

    def split(self, path: str, value: Sequence[Tensor], count: int) -> dict[str, Tensor]:
        """Return the padded tensors and their lengths."""
        padded = torch.nn.utils.rnn.pad_sequence(list(value), batch_first=True)
        return {path: padded, LENGTHS + path: torch.tensor([len(row) for row in value])}

    def join(self, path: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the list for some rows."""
        pairs = zip(inputs[path], inputs[LENGTHS + path], strict=True)
        return [row[: int(length)] for row, length in pairs]


class Ragged(list[torch.Tensor]):
    """An argument of single calls whose rows have several lengths, each without the axis of the batch."""


@dataclass(frozen=True)
class RaggedRows(TensorEntries):
    """Rows of several lengths in the place of a tensor; they are stored padded, with their lengths.

    A network without a mask takes one of them at a time.
    """

    def join(self, path: str, inputs: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        """Return the argument for one sample."""
        (row,) = super().join(path, inputs)
        return row[None]


@dataclass(frozen=True)
class NumberEntries:
    """A list with one number per sample, such as the length of its prompt."""

    def split(self, path: str, value: Sequence[float], count: int) -> dict[str, Tensor]:
        """Return the numbers as a tensor."""
        return {path: torch.tensor(value)}

    def join(self, path: str, inputs: Mapping[str, Tensor]) -> list[float]:
        """Return the list for some rows."""
        numbers: list[float] = inputs[path].tolist()
        return numbers


@dataclass(frozen=True)
class EqualEntries:
    """A list with one entry per sample, all equal, such as the sizes of images."""


AnyRows = Rows | RaggedRows | TensorEntries | NumberEntries | EqualEntries


def is_close(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of a text encoder."""
    if one.shape != other.shape:
        return False
    # Masks may be boolean in one call and integers in another; rotations are complex.
    wide = torch.complex128 if one.is_complex() else torch.float64
    a, b = one.to(wide), other.to(wide)
    return bool(((a - b).abs() <= _TOLERANCE * b.abs().max()).all()) if a.numel() else True


def rows_of_tensor(path: str, two: Tensor, swapped: Tensor, three: Tensor) -> Rows | None:
    """Return the rows in a tensor of calls with prompts (A, B), (B, A) and (A, B, C); None: it has none.

    Raises:
        UserError: if the tensor follows the samples, but not along one axis.
    """
    if two.shape == three.shape:
        return None
    sizes = list(enumerate(zip(two.shape, three.shape, strict=False)))
    axes = [axis for axis, (n, m) in sizes if n != m]
    axis = axes[0] if axes else 0
    if two.ndim != three.ndim or len(axes) != 1 or 3 * two.shape[axis] != 2 * three.shape[axis]:
        raise UserError(
            f"expected one axis of the network's {path} for the samples, got {list(two.shape)} for two and "
            f"{list(three.shape)} for three samples; write an adapter for it (docs/add-a-teacher.md)"
        )
    repeats = two.shape[axis] // 2
    for tiled in (False, True) if repeats > 1 else (False,):
        rows = Rows(axis, repeats, tiled)
        own, other, more = (
            rows.split(path, value, count)[path] for value, count in ((two, 2), (swapped, 2), (three, 3))
        )
        # The swapped order alone proves nothing: copies of (A, B) read as A, B, A and B, A, B follow it, too.
        if is_close(own, other.flip(0)) and is_close(own, more[:2]):
            return rows
    return Rows(axis, repeats)


def rows_of_list(two: list[Any], three: list[Any]) -> AnyRows:
    """Return the rows in a list with one entry per sample."""
    if all(isinstance(entry, torch.Tensor) for entry in three):
        return TensorEntries()
    if all(isinstance(entry, int | float) for entry in three) and len({*two, *three}) > 1:
        return NumberEntries()
    # With one size for all samples the entries are equal, which the comparison of the calls checks.
    return EqualEntries()
