"""Replace the folder of an export atomically, by one export at a time, without losing a file of the user's."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fmm_distill.errors import UserError
from fmm_distill.export.contents import CONTENTS, changes, shown, write_contents
from fmm_distill.io.files import writing
from fmm_distill.io.lock import locked

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_replaceable", "in_use", "recover", "replacing"]


@contextmanager
def replacing(target: Path, *, wait: bool = False) -> Iterator[Path]:
    """Yield a new folder that replaces ``target``, with the list of its files, once the block has filled it.

    After an error, or a kill at any moment, the former export is in ``target``, or ``recover`` moves it back.

    Args:
        wait: wait for another export into it, or its publication, instead of refusing.

    Raises:
        UserError: if another export into it is running, if there is anything there that an export did not write, or if
            the disk is full.
    """
    # The folder behind a link is replaced, not the link.
    folder = target.resolve()
    with in_use(folder, "an export", wait=wait), writing(target):
        _put_back(folder)
        check_replaceable(target)
        partial, old = _sibling(folder, "partial"), _sibling(folder, "old")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            # Last of the files, over everything that the block has written.
            write_contents(partial)
            # The user may have put a file there during a long verification.
            check_replaceable(target)
            _swap(partial, folder, old)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def in_use(target: Path, purpose: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of an export's folder. The lock is next to the folder, which an export replaces as a unit.

    Args:
        wait: wait for the other process instead of refusing.

    Raises:
        UserError: if another process holds it.
    """
    folder = _sibling(target.resolve(), "lock")
    try:
        with locked(folder, purpose, wait=wait):
            yield
    finally:
        # A killed process leaves the folder of its lock behind. While another process uses it, it is not empty.
        with suppress(OSError):
            folder.rmdir()


def check_replaceable(target: Path) -> None:
    """Refuse a folder in which any file differs from what an export wrote.

    Raises:
        UserError: with the names of the files.
    """
    recover(target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / CONTENTS).is_file():
        raise UserError(
            f"{target}: expected an exported student or an empty folder, got one without {CONTENTS}, from something "
            "else or an earlier version; choose another folder, or move it away"
        )
    found = changes(target)
    if found.added or found.changed:
        lists = [
            f"{kind} {shown(names)}" for kind, names in (("added", found.added), ("changed", found.changed)) if names
        ]
        raise UserError(
            f"{target} has files that an export would replace or remove ({'; '.join(lists)} since the last export); "
            "move them away, or choose another folder"
        )


def recover(target: Path) -> None:
    """Move a former export back to its folder, if an export was killed after it had moved it away.

    Raises:
        UserError: if an export into it is running.
    """
    folder = target.resolve()
    # Of the processes that a launcher started, the first one holds the lock.
    first = os.environ.get("RANK", "0") == "0"
    if first and not folder.exists() and _sibling(folder, "old").is_dir():
        with in_use(folder, "a recovery"):
            _put_back(folder)


def _put_back(folder: Path) -> None:
    old = _sibling(folder, "old")
    if not old.is_dir():
        return
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
    if not os.path.lexists(folder):
        old.rename(folder)
        return
    # A process was killed while it removed the former export: the rest is of no use, except a file of the user's.
    if not (old / CONTENTS).is_file():
        raise UserError(f"{old}: expected a former export, got a folder without {CONTENTS}; move it away")
    if added := changes(old).added:
        raise UserError(f"{old} has files that no export wrote ({shown(added)}); move them away")
    _remove(old)


def _remove(old: Path) -> None:
    """Remove a former export, its list last: after a kill, the list shows that the rest belongs to an export."""
    for path in old.iterdir():
        if path.name == CONTENTS:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.rmtree(old)


def _swap(new: Path, folder: Path, old: Path) -> None:
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    if folder.exists():
        # Two renames instead of copies: between them a kill leaves both folders complete.
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        _put_back(folder)
        raise
    # The new export is complete: the next one removes what can't be removed now.
    with suppress(OSError):
        _remove(old)


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")
