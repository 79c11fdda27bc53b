"""Folders of links beside the Hub's cache: the same files under other names, made once, by any of several processes."""

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
    """What ``fill`` makes of an empty folder, kept for as long as the files in ``folder`` stay what they are.

    Args:
        about: what else the result depends on, as JSON has it.

    Raises:
        UserError: if the disk does not take it.
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
        # Another process may have been first; what it made is the same.
        if not target.is_dir():
            raise UserError(f"{target} could not be made ({error}); set HF_HOME to a folder with room") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
