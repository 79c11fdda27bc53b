"""Files for the next machine, split into pieces for the transfer."""

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
    """Write files and folders of ``work`` as ``stored-*.bin``; equal content gives equal pieces.

    Raises:
        RuntimeError: if they need more than ``MOST`` pieces.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in names:
            archive.add(work / name, arcname=name)
    data = stream.getvalue()
    pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
    if len(pieces) > MOST:
        raise RuntimeError(f"{len(data) / 2**20:.0f} MiB exceed {MOST} pieces of {PIECE // 2**20} MiB")
    files = []
    for number, piece in enumerate(pieces):
        files.append(output / f"stored-{number}-of-{len(pieces)}.bin")
        partial = files[-1].with_suffix(".partial")
        partial.write_bytes(piece)
        partial.replace(files[-1])
    return files


def unpack(folder: Path, work: Path) -> bool:
    """Restore the files of the pieces in ``folder`` under ``work``; return False if one is missing."""
    files = sorted(folder.glob("stored-*-of-*.bin"))
    if not files or len(files) != int(files[0].stem.split("-")[-1]):
        return False
    with tarfile.open(fileobj=io.BytesIO(b"".join(file.read_bytes() for file in files))) as archive:
        archive.extractall(work, filter="data")
    return True
