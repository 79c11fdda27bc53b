"""The marker of a run folder, and the names of the files of a run, which tell what ``--fresh`` may remove."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from fmm_distill import __version__
from fmm_distill.errors import UserError
from fmm_distill.io.files import write_text
from fmm_distill.io.lock import is_lock_file, locked
from fmm_distill.io.reading import read_mapping
from fmm_distill.training import checkpoint

__all__ = ["MARKER", "TRIAL", "check_clearable", "check_vacant", "clear", "foreign", "is_run", "mark", "require_run"]

MARKER = ".fmm_distill-run.json"
# The folder of the export test before training; its name marks it as a part of the student. A run has number 0. A dry
# run holds no lock, so it has a random number.
TRIAL = ".student.{}.partial"
_FORMAT = 1
_FILES = (
    "curves.png",
    "environment.json",
    "evaluation.json",
    "evaluations.jsonl",
    "inputs.json",
    "prompt_images.json",
    "prompts.json",
    "python.json",
    "recipe.yaml",
    "samples.png",
    "steps.jsonl",
    "steps.png",
    "teacher.json",
    "tracker.json",
    "trial.json",
    MARKER,
)
_NUMBERED = re.compile(r"recipe-until-\d+\.yaml")
# Trackers and the export choose the names of the files in their folders, which are not checked.
_FOLDERS = {
    "pictures": re.compile(r"samples-\d+\.png"),
    "trajectories": re.compile(r"part-\d{5,}\.safetensors"),
    "student": None,
    "tensorboard": None,
    "wandb": None,
}
_CHECKPOINTS = "checkpoints"
# The lock of exports into ``student`` (see ``export.place``).
_EXPORT_LOCK = ".student.lock"
# The name of a file or folder that is being written or removed.
_PARTIAL = re.compile(r"\.(?P<name>.+?)(\.\d+)?(\.removed)?\.(partial|old)")
_TRIAL = re.compile(r"\.student\.\d+\.partial")
# An export has one of these: pipelines, or weights alone.
_STUDENTS = ("model_index.json", "network/config.json")
_STAYS = (MARKER, "recipe.yaml")
_SHOWN = 4


def is_run(folder: Path) -> bool:
    """Tell a run folder from any other folder, by its marker alone."""
    return (folder / MARKER).is_file()


def require_run(folder: Path) -> None:
    """Refuse a folder that is not a run folder.

    Raises:
        UserError: with advice for a run without a marker and for one of a later version.
    """
    if not is_run(folder):
        found = f"a folder without {MARKER}" if folder.is_dir() else "a file" if folder.exists() else "nothing there"
        raise UserError(f"{folder}: expected a run folder (the --output of a run), got {found}{_hint(folder)}")
    _check_format(folder)


def check_vacant(folder: Path) -> None:
    """Refuse a folder for a new run that is not empty.

    Raises:
        UserError: if it is a file, or contains more than the leftovers of a run that was killed at its start.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output {folder}: expected a folder, got a file; choose another path")
    if any(not _is_leftover(path.name) for path in folder.iterdir()):
        raise UserError(
            f"--output {folder}: expected a run folder or an empty one, got other files and no {MARKER}; choose "
            f"another folder{_hint(folder)}"
        )


def _is_leftover(name: str) -> bool:
    return is_lock_file(name) or name == f".{MARKER}.partial" or _TRIAL.fullmatch(name) is not None


def _hint(folder: Path) -> str:
    if not (folder / "recipe.yaml").is_file() or (folder / "model_index.json").is_file():
        return ""
    return f". If it is a run of an earlier version, {_adoption(folder)} to continue it"


def _adoption(folder: Path) -> str:
    return f'write {{"format": {_FORMAT}}} into {folder / MARKER}'


def _check_format(folder: Path) -> None:
    todo = f"if this is a run folder, {_adoption(folder)}"
    found = read_mapping(folder / MARKER, {"format": int}, todo=todo)["format"]
    if found > _FORMAT:
        raise UserError(
            f"{folder}: expected a run of format {_FORMAT} or earlier, got format {found} of a later version; update "
            "fmm_distill, or choose another folder"
        )


def mark(folder: Path) -> None:
    """Write the marker into a folder, unless it has one."""
    if not is_run(folder):
        about = {"format": _FORMAT, "version": __version__, "run": secrets.token_hex(8)}
        write_text(folder / MARKER, json.dumps(about) + "\n")


def foreign(folder: Path) -> list[Path]:
    """List what is in a run folder and was not written by a run, links included."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not (_is_own_file(path) or path.is_dir()):
            found.append(path)
        elif path.is_dir():
            found += _foreign_in(path)
    return found


def _is_own_file(path: Path) -> bool:
    name = _without_partial(path.name)
    return path.is_file() and (name in _FILES or _NUMBERED.fullmatch(name) is not None or is_lock_file(path.name))


def _foreign_in(folder: Path) -> list[Path]:
    if folder.name == _EXPORT_LOCK:
        return [path for path in sorted(folder.iterdir()) if path.is_symlink() or not is_lock_file(path.name)]
    name = _without_partial(folder.name)
    if name == _CHECKPOINTS:
        return [path for path in sorted(folder.iterdir()) if not _is_checkpoint(path)]
    if name not in _FOLDERS:
        return [folder]
    if (pattern := _FOLDERS[name]) is not None:
        return [path for path in sorted(folder.iterdir()) if not pattern.fullmatch(_without_partial(path.name))]
    if folder.name == "student" and any(folder.iterdir()) and not any((folder / name).is_file() for name in _STUDENTS):
        return [folder]
    return []


def _is_checkpoint(path: Path) -> bool:
    name = _without_partial(path.name)
    if name != path.name:
        # A checkpoint that was replaced is being removed.
        name = name.removesuffix(".replaced")
    return path.is_dir() and checkpoint.step_of(Path(name)) is not None


def _without_partial(name: str) -> str:
    found = _PARTIAL.fullmatch(name)
    return found["name"] if found else name


def check_clearable(folder: Path) -> None:
    """Refuse to clear a run folder with other files in it.

    Raises:
        UserError: with the names of the files.
    """
    _check_format(folder)
    if others := foreign(folder):
        shown = ", ".join(str(path.relative_to(folder)) for path in others[:_SHOWN])
        shown += ", ..." if len(others) > _SHOWN else ""
        raise UserError(
            f"--fresh: expected only files of a run in --output {folder}, got others ({shown}); nothing was removed: "
            "move them elsewhere, or choose another folder"
        )


def clear(folder: Path) -> None:
    """Remove the files of a run from its folder. The folder, its marker and its recipe stay.

    Raises:
        UserError: if the folder contains other files, or its student is being exported or published; nothing is removed
            then.
    """
    check_clearable(folder)
    lock = folder / _EXPORT_LOCK
    with locked(lock, "--fresh"):
        _clear(folder)
    # A killed process leaves the folder of its lock behind.
    with suppress(OSError):
        lock.rmdir()


def _clear(folder: Path) -> None:
    # The evaluation marks a run as finished. Removed first, a kill in here leaves an unfinished run.
    first = folder / "evaluation.json"
    first.unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        if path.name in (*_STAYS, _EXPORT_LOCK) or is_lock_file(path.name):
            continue
        if not path.is_dir():
            path.unlink()
            continue
        gone = path if _without_partial(path.name) != path.name else path.with_name(f".{path.name}.partial")
        if gone != path:
            if gone.exists():
                shutil.rmtree(gone)
            path.rename(gone)
        shutil.rmtree(gone)
