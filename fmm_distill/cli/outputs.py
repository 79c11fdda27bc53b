"""Output files of commands, checked before what they hold is computed."""

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
        endings: of a name that the writer knows; none: any.

    Raises:
        UserError: on another ending, a folder, or a place that is not there or takes no files.
    """
    if endings and path.suffix.lower() not in endings:
        one_of = " or ".join([", ".join(endings[:-1]), endings[-1]] if endings[1:] else endings)
        raise UserError(f"--output {path}: expected a name that ends in {one_of}, for a picture")
    if not path.parent.is_dir():
        raise UserError(
            f"--output {path} could not be written ({path.parent} is no folder); make it, or choose another"
        )
    check_writable(path)


def check_report(folder: Path) -> None:
    """Refuse a folder of ``--report`` that could not be made or written; nothing is made yet.

    Raises:
        UserError: if it is a file, or is in a place that takes none.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"--report {folder} could not be written ({there} is a file; expected a folder)")
    check_writable(there / "report.html" if there == folder else there / folder.name)
