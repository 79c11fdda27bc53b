"""Files that travel from one machine to the next: cut into pieces that a transfer takes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["pack", "unpack"]

PIECE = 15 * 2**20
# With the JSON and three pictures they are eight.
MOST = 4


def pack(work: Path, names: Iterable[str], output: Path) -> list[Path]:
    """Write these files and folders of ``work`` as ``kept-*.bin``; the same content gives the same pieces.

    Raises:
        RuntimeError: if they take more than ``MOST`` pieces.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in names:
            archive.add(work / name, arcname=name)
    data = stream.getvalue()
    pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
    if len(pieces) > MOST:
        raise RuntimeError(f"{len(data) / 2**20:.0f} MiB to keep are more than {MOST} pieces of {PIECE // 2**20} MiB")
    files = []
    for number, piece in enumerate(pieces):
        files.append(output / f"kept-{number}-of-{len(pieces)}.bin")
        partial = files[-1].with_suffix(".partial")
        partial.write_bytes(piece)
        partial.replace(files[-1])
    return files


def unpack(folder: Path, work: Path) -> bool:
    """Put the pieces in ``folder`` back under ``work``; false if one is missing."""
    files = sorted(folder.glob("kept-*-of-*.bin"))
    if not files or len(files) != int(files[0].stem.split("-")[-1]):
        return False
    with tarfile.open(fileobj=io.BytesIO(b"".join(file.read_bytes() for file in files))) as archive:
        archive.extractall(work, filter="data")
    return True
