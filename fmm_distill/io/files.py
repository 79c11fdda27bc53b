"""Atomic writes of files and folders, and disk errors as one-line messages with advice."""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from fmm_distill.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["append_line", "atomic_file", "atomic_folder", "check_writable", "write_text", "writing"]

# The advice for each kind of disk error.
_ADVICE = (
    (
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "make room or choose another --output, then run the same command again",
    ),
    ((errno.EACCES, errno.EPERM), "get the right to write there, or choose another --output"),
    ((errno.EROFS,), "the file system is read-only: choose another --output"),
    ((errno.ENOENT,), "its folder does not exist: make it, or correct the path"),
    ((errno.EISDIR,), "a folder has this name: choose the name of a file"),
    (
        (errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
        "the path is taken by a file or a folder: choose another --output",
    ),
    ((errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP), "the system does not accept this path: choose another --output"),
    ((errno.EMFILE, errno.ENFILE), "too many files are open: raise the limit (ulimit -n), then run it again"),
)


_OTHERWISE = "check the disk or the network file system, or choose another --output, then run the same command again"


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn a disk error while ``target`` is written into one line with advice that fits the error.

    Raises:
        UserError: with the reason and the advice.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # The text without "[Errno 28]".
        reason = getattr(error, "strerror", None) or first_line(error)
        number = _errno(error)
        advice = next((advice for numbers, advice in _ADVICE if number in numbers), _OTHERWISE)
        raise UserError(
            f"{target} could not be written ({reason}); what was there before is complete: {advice}"
        ) from error


def _errno(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # Errors of safetensors come from Rust, and end with the number.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


@contextmanager
def atomic_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a path to write to; the file there replaces ``path`` at the end of the block, when it is on the disk.

    After an error or a kill at any moment ``path`` is the old file, or absent as before.

    Args:
        shared: several processes may write the file at once; the last one wins.
    """
    number = f".{os.getpid()}" if shared else ""
    partial = path.with_name(f".{path.name}{number}.partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which gets the name ``path`` at the end of the block.

    Several processes may make the same folder at once: the first one's stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        try:
            partial.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: its old content stays until the new one is on the disk."""
    with writing(path), atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Refuse a path that ``write_text`` could not write, before its content is computed.

    Raises:
        UserError: if the path is a folder, or its folder is missing or not writable.
    """
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        probe = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)


def append_line(path: Path, text: str) -> None:
    """Append a line to a log file."""
    # Unbuffered: on a full disk the write itself fails, and closing the file has nothing left to write.
    with writing(path), path.open("ab", buffering=0) as file:
        file.write(text.encode() + b"\n")
