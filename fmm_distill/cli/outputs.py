"""Output files of commands, checked before their content is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmm_distill.errors import UserError
from fmm_distill.io.files import check_writable

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["PICTURES", "check_output", "check_report"]

PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")


def check_output(path: Path, endings: tuple[str, ...] = ()) -> None:
    """Refuse a file of ``--output`` that could not be written.

    Args:
        endings: the accepted suffixes; empty: any.

    Raises:
        UserError: on another suffix, or a path that is a folder, has no parent folder, or is not writable.
    """
    if endings and path.suffix.lower() not in endings:
        one_of = " or ".join([", ".join(endings[:-1]), endings[-1]] if endings[1:] else endings)
        raise UserError(f"--output {path}: expected a name that ends in {one_of}, for a picture")
    if not path.parent.is_dir():
        raise UserError(
            f"--output {path}: expected a path in an existing folder, got {path.parent}, which is not one; create it, "
            "or choose another"
        )
    check_writable(path)


def check_report(folder: Path) -> None:
    """Refuse a folder of ``--report`` that could not be created or written; nothing is created yet.

    Raises:
        UserError: if it is a file, or the folder above it is not writable.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--report {folder}: expected a folder, got the file {there}; choose another path")
    check_writable(there / "report.html" if there == folder else there / folder.name)
