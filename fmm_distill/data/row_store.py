"""Rows of tensors on disk, in safetensors files that are written atomically, part by part, and read memory-mapped."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fmm_distill.errors import UserError
from fmm_distill.io.files import atomic_file, writing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from jaxtyping import Int
    from torch import Tensor

__all__ = ["Layout", "Parts", "mebibytes"]

# The memory that a part takes while it is made.
PART_BYTES = 64 * 2**20
_DAY = 86400


@dataclass(frozen=True)
class Layout:
    """The files of many rows: ``part-00000.safetensors`` and so on in one folder.

    Attributes:
        count: number of rows.
        row_bytes: size of one row, over all its tensors.
        most: largest number of rows of a part, which is the work that a kill can lose.
    """

    folder: Path
    count: int
    row_bytes: int
    most: int

    @property
    def size(self) -> int:
        """Return the rows of a part; the last part may have fewer."""
        return max(1, min(self.count, self.most, PART_BYTES // self.row_bytes))

    @property
    def total_bytes(self) -> int:
        """Return the size of all parts."""
        return self.count * self.row_bytes

    @property
    def files(self) -> list[Path]:
        """Return the files of the parts, written or not."""
        return [self.folder / f"part-{i:05d}.safetensors" for i in range(-(-self.count // self.size))]

    def check_room(self, what: str) -> None:
        """Check that the disk has room for the missing parts.

        Raises:
            UserError: if they need more than is free.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        there = sum(file.stat().st_size for file in self.folder.glob("part-*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        if self.total_bytes - there > free:
            raise UserError(
                f"{what}: expected {mebibytes(self.total_bytes - there)} free in {self.folder}, got {mebibytes(free)}; "
                "make room, or set fewer"
            )

    def fill(self, make: Callable[[int, int, int], dict[str, Tensor]], process: int = 0, processes: int = 1) -> None:
        """Write the missing parts; several processes divide them.

        Args:
            make: returns the tensors of a part, a function of its number, its first row and the row after its last.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(".*.partial"):
                # Another process may be writing here now, but none writes one part for a day.
                if time.time() - left_over.stat().st_mtime > _DAY:
                    left_over.unlink(missing_ok=True)
        for number, file in enumerate(self.files):
            # By number: which process writes a part does not depend on which parts exist.
            if number % processes == process and not file.is_file():
                start = number * self.size
                _write(file, make(number, start, min(start + self.size, self.count)))


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file that has its name only when it is complete on disk."""
    with writing(file), atomic_file(file, shared=True) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


class Parts:
    """All rows of a layout, read from disk at each access.

    Raises:
        UserError: if a part is missing or damaged.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._parts = [_read(file) for file in layout.files]

    def __len__(self) -> int:
        return self.layout.count

    def rows(self, name: str, index: Int[Tensor, " some"], among: Int[Tensor, " some"] | None = None) -> Tensor:
        """Return the rows of one tensor at these indices; with ``among`` only that entry of each row is read."""
        size = self.layout.size
        if among is None:
            return torch.stack([self._parts[i // size][name][i % size] for i in index.tolist()])
        pairs = zip(index.tolist(), among.tolist(), strict=True)
        # Of a memory-mapped row only the pages of this entry are read.
        return torch.stack([self._parts[i // size][name][i % size, j] for i, j in pairs])


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged ({error}); remove it, and the same command makes it") from error


def mebibytes(count: int) -> str:
    """Return a number of bytes as text in MiB."""
    return f"{count / 2**20:,.1f} MiB"
