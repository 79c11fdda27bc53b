"""The marker of a run's folder, and the names that a run writes there: what is a run, and what of it may be removed."""

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
# Where the export is tried before training: by its name a part of the student. The number of a run's is 0; a dry run,
# which holds no lock, has one of its own.
TRIAL = ".student.{}.partial"
_FORMAT = 1
_FILES = (
    "curves.png",
    "environment.json",
    "evaluation.json",
    "evaluations.jsonl",
    "inputs.json",
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
# Of what trackers and the export write the folder alone is known.
_FOLDERS = {
    "pictures": re.compile(r"samples-\d+\.png"),
    "trajectories": re.compile(r"part-\d{5,}\.safetensors"),
    "student": None,
    "tensorboard": None,
    "wandb": None,
}
_CHECKPOINTS = "checkpoints"
# Where exports into ``student`` have their lock (``export.place``).
_EXPORT_LOCK = ".student.lock"
# Written next to a file or folder until it is complete, or while it is removed.
_PARTIAL = re.compile(r"\.(?P<name>.+?)(\.\d+)?(\.removed)?\.(partial|old)")
_TRIAL = re.compile(r"\.student\.\d+\.partial")
# An export has one of these: pipelines, or weights alone.
_STUDENTS = ("model_index.json", "model.safetensors")
_STAYS = (MARKER, "recipe.yaml")
_SHOWN = 4


def is_run(folder: Path) -> bool:
    """Tell a run's folder from any other; nothing but its marker says so."""
    return (folder / MARKER).is_file()


def require_run(folder: Path) -> None:
    """Refuse a folder that is no run.

    Raises:
        UserError: with what to do if it is a run without a marker, or of a later version.
    """
    if not is_run(folder):
        raise UserError(
            f"{folder} is no run folder (no {MARKER}); expected a folder that was an --output{_hint(folder)}"
        )
    _check_format(folder)


def check_vacant(folder: Path) -> None:
    """Refuse a folder for a new run that holds anything.

    Raises:
        UserError: if it is a file or holds something other than a lock, a partial marker or a trial that a kill left.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output {folder} is a file; expected a folder: choose another")
    if any(not _is_leftover(path.name) for path in folder.iterdir()):
        raise UserError(
            f"--output {folder} is not empty and holds no run (no {MARKER}); choose another folder{_hint(folder)}"
        )


def _is_leftover(name: str) -> bool:
    return is_lock_file(name) or name == f".{MARKER}.partial" or _TRIAL.fullmatch(name) is not None


def _hint(folder: Path) -> str:
    if not (folder / "recipe.yaml").is_file() or (folder / "model_index.json").is_file():
        return ""
    return f". If it is a run of an earlier version, {_adoption(folder)}, and it is a run again"


def _adoption(folder: Path) -> str:
    return f'write {{"format": {_FORMAT}}} into {folder / MARKER}'


def _check_format(folder: Path) -> None:
    todo = f"if the folder is a run, {_adoption(folder)}"
    found = read_mapping(folder / MARKER, {"format": int}, todo=todo)["format"]
    if found > _FORMAT:
        raise UserError(
            f"{folder} is a run of a later version of fmm_distill (format {found}, this one reads {_FORMAT}); update "
            "fmm_distill, or choose another folder"
        )


def mark(folder: Path) -> None:
    """Make a folder a run's."""
    if not is_run(folder):
        about = {"format": _FORMAT, "version": __version__, "run": secrets.token_hex(8)}
        write_text(folder / MARKER, json.dumps(about) + "\n")


def foreign(folder: Path) -> list[Path]:
    """What is in a run's folder and no run writes, links included."""
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
        # A checkpoint that was replaced, while it is removed.
        name = name.removesuffix(".replaced")
    return path.is_dir() and checkpoint.step_of(Path(name)) is not None


def _without_partial(name: str) -> str:
    found = _PARTIAL.fullmatch(name)
    return found["name"] if found else name


def check_clearable(folder: Path) -> None:
    """Refuse to remove a run whose folder holds something else.

    Raises:
        UserError: with what it is.
    """
    _check_format(folder)
    if others := foreign(folder):
        shown = ", ".join(str(path.relative_to(folder)) for path in others[:_SHOWN])
        shown += ", ..." if len(others) > _SHOWN else ""
        raise UserError(
            f"--fresh: --output {folder} holds files that no run writes ({shown}), and nothing was removed; move them "
            "elsewhere, or choose another folder"
        )


def clear(folder: Path) -> None:
    """Remove what a run has written into its folder. The folder, its marker and its recipe stay.

    Raises:
        UserError: if something else is there, or its student is being exported or published, and then nothing is
            removed.
    """
    check_clearable(folder)
    lock = folder / _EXPORT_LOCK
    with locked(lock, "--fresh"):
        _clear(folder)
    # A process that was killed leaves it.
    with suppress(OSError):
        lock.rmdir()


def _clear(folder: Path) -> None:
    # The evaluation makes a run finished: without it, a kill in here leaves a run that is not.
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
