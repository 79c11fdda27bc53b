"""Folders of links beside the Hub's cache: the same files under other names, made once, by any of several processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fmm_distill.errors import UserError
from fmm_distill.io.cache import cache_key, cache_path
from fmm_distill.io.files import atomic_folder

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["linked_folder"]


def linked_folder(kind: str, folder: Path, about: object, fill: Callable[[Path], None]) -> Path:
    """What ``fill`` makes of an empty folder, kept for as long as the files in ``folder`` stay what they are.

    Args:
        about: what else the result depends on, as JSON has it.

    Raises:
        UserError: if the disk does not take it.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    marks = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    target = cache_path(kind, cache_key([str(folder.resolve()), marks, about]))
    if target.is_dir():
        return target
    try:
        with atomic_folder(target) as partial:
            fill(partial)
    except OSError as error:
        raise UserError(f"{target} could not be made ({error}); set HF_HOME to a folder with room") from error
    return target
