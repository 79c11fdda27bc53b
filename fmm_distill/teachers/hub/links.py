"""Folders of links next to the Hub's cache: the same files under other names, made once by one of many processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from fmm_distill.errors import UserError

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
    marks = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps([str(folder.resolve()), marks, about]).encode()).hexdigest()
    target = Path(constants.HF_HOME) / "fmm_distill" / kind / digest[:32]
    if target.is_dir():
        return target
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(target)
    except OSError as error:
        # Another process may have been first, with the same result.
        if not target.is_dir():
            raise UserError(f"{target} can't be written ({error}); try HF_HOME on a disk with free space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
