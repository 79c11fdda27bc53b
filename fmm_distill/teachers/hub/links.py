"""Folders of links next to the Hub's cache: the same files under other names, made once by one of many processes."""

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
    """Return a folder that ``fill`` has filled; it is made again when the files in ``folder`` change.

    Args:
        kind: the name of the cache folder.
        about: a JSON value on which the result depends as well.
        fill: called with an empty folder.

    Raises:
        UserError: if the folder can't be written.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Sizes and times of change instead of the contents, which may be tens of gigabytes.
    marks = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    target = cache_path(kind, cache_key([str(folder.resolve()), marks, about]))
    if target.is_dir():
        return target
    try:
        with atomic_folder(target) as partial:
            fill(partial)
    except OSError as error:
        raise UserError(f"{target} can't be written ({error}); try HF_HOME on a disk with free space") from error
    return target
