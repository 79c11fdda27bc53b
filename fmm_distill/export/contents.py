"""The list of the files that an export wrote, with their digests: ``export.json`` in its folder."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from fmm_distill import __version__
from fmm_distill.errors import UserError
from fmm_distill.io.files import write_text
from fmm_distill.io.hashes import sha256_of_file
from fmm_distill.io.reading import check_keys, read_mapping

__all__ = ["CONTENTS", "Changes", "changes", "contents", "record", "shown", "write_contents"]

CONTENTS = "export.json"
# Python and file managers leave these in any folder.
_IGNORED = ("__pycache__", ".DS_Store")


@dataclass(frozen=True)
class Changes:
    """The differences between a folder and the list of what its export wrote.

    Attributes:
        added: files that are not in the list; links, and folders without a listed file, by their own name and a slash.
        changed: files that have other bytes than the export wrote, or that are now a link or behind one.
        missing: files of the list that are gone.
    """

    added: tuple[str, ...]
    changed: tuple[str, ...]
    missing: tuple[str, ...]


def write_contents(folder: Path) -> None:
    """Write the list of all files in a folder that an export has just written."""
    digests: dict[tuple[int, int], str] = {}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    _write(folder, {name: _digest(folder / name, digests) for name in names if name != CONTENTS})


def record(folder: Path, *names: str) -> None:
    """Add files to the list that were written after it; without a list there is nothing to do."""
    if (folder / CONTENTS).is_file():
        _write(folder, contents(folder) | {name: _digest(folder / name, {}) for name in names})


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in the list, by its name in the folder.

    Raises:
        UserError: if there is none, or it can't be read.
    """
    file = folder / CONTENTS
    todo = "export into another folder"
    digests: dict[str, str] = read_mapping(file, {"sha256": dict}, todo=todo)["sha256"]
    check_keys(str(file), digests, dict.fromkeys(digests, str), todo=todo)
    return digests


def changes(folder: Path, skip: tuple[str, ...] = ()) -> Changes:
    """Compare a folder with its list, without following links.

    Args:
        skip: beginnings of the names of listed files that are not compared.

    Raises:
        UserError: if there is no list, or a file can't be read.
    """
    listed = contents(folder)
    digests: dict[tuple[int, int], str] = {}
    try:
        there, added = _walk(folder, listed)
        changed = [
            name
            for name in there & listed.keys()
            if not name.startswith(skip) and not _is_as_written(folder / name, listed[name], digests)
        ]
    except OSError as error:
        raise UserError(f"{folder}: can't be compared with its {CONTENTS} ({error})") from error
    missing = listed.keys() - there
    behind = {name for name in missing if name.startswith(tuple(f"{link.rstrip('/')}/" for link in added))}
    return Changes(tuple(sorted(added)), tuple(sorted({*changed, *behind})), tuple(sorted(missing - behind)))


def shown(names: tuple[str, ...], most: int = 5) -> str:
    """Return the first names on one line, and the number of the others."""
    # A name may hold a line break, or bytes that are no text.
    plain = [name if name.isprintable() else repr(name) for name in names[:most]]
    return ", ".join(plain) + (f" and {len(names) - most} more" if len(names) > most else "")


def _walk(folder: Path, listed: dict[str, str]) -> tuple[set[str], set[str]]:
    """Return the listed names that are in the folder, and the names of everything else in it."""
    parents = {parent.as_posix() for name in listed for parent in Path(name).parents}
    there: set[str] = set()
    added: set[str] = set()
    for path, folders, files in os.walk(folder):
        root = Path(path).relative_to(folder)
        for name in [name for name in folders if name not in _IGNORED]:
            below = (root / name).as_posix()
            # A folder of the user's is reported by its own name: it may be a repository with thousands of files.
            if (folder / below).is_symlink() or (below not in parents and any((folder / below).iterdir())):
                added.add(f"{below}/")
                folders.remove(name)
        folders[:] = [name for name in folders if name not in _IGNORED]
        names = {(root / name).as_posix() for name in files if name not in _IGNORED}
        there |= names & listed.keys()
        added |= names - listed.keys() - {CONTENTS}
    return there, added


def _is_as_written(path: Path, digest: str, digests: dict[tuple[int, int], str]) -> bool:
    # Reading a named pipe would never end.
    return stat.S_ISREG(path.lstat().st_mode) and _digest(path, digests) == digest


def _digest(path: Path, digests: dict[tuple[int, int], str]) -> str:
    """Return the SHA-256. The pipelines share most of their files by hard links, which are read once."""
    status = path.stat()
    # Hard links have one inode, which is unique on its device alone.
    key = (status.st_dev, status.st_ino)
    if key not in digests:
        digests[key] = sha256_of_file(path)
    return digests[key]


def _write(folder: Path, digests: dict[str, str]) -> None:
    listed = {"fmm_distill": __version__, "sha256": dict(sorted(digests.items()))}
    write_text(folder / CONTENTS, json.dumps(listed, indent=1) + "\n")
