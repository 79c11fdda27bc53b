"""Checkpoints: folders of safetensors, written atomically."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fmm_distill.errors import UserError
from fmm_distill.io.files import writing
from fmm_distill.io.hashes import sha256_of_file
from fmm_distill.io.reading import BrokenFileError, check_keys, read_mapping

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

__all__ = [
    "Checkpoint",
    "DamagedCheckpointError",
    "State",
    "average_name",
    "complete",
    "load",
    "load_step",
    "newest",
    "newest_complete",
    "newest_state",
    "save",
    "step_of",
]

logger = logging.getLogger(__name__)

_MANIFEST, _STATE = "manifest.json", "state.json"
_REPLACED = ".replaced"
# A running training may remove a checkpoint while it is read. Each try takes longer than that: few are enough.
_TRIES, _PAUSE = 20, 0.05


class DamagedCheckpointError(UserError):
    """A file of a checkpoint is missing or has changed."""


@dataclass(frozen=True)
class State:
    """A checkpoint without its tensors.

    Attributes:
        written: time of writing, in seconds since 1970.
    """

    path: Path
    step: int
    state: dict[str, Any]
    written: float


@dataclass
class Checkpoint:
    """Everything that a run needs to resume.

    Attributes:
        step: number of steps done.
        tensors: file stem to named tensors: student, each average, optimizer, and frozen and weight if they exist.
        state: plain values: gradient scaler, optimizer and non-finite steps.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def average_name(rate: float) -> str:
    """Return the file stem of a moving average in a checkpoint."""
    return f"ema-{rate:g}"


def save(folder: Path, checkpoint: Checkpoint, keep: int, retained: Collection[int] = ()) -> Path:
    """Write a checkpoint, then remove all but the newest ``keep`` and those of the ``retained`` steps.

    The folder gets its name when all of its files are on disk; a partial one is removed. An older checkpoint of the
    same step is readable until then.
    """
    target = folder / _name(checkpoint.step)
    partial = folder / f".{target.name}.partial"
    with writing(target):
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".*.partial"):
            shutil.rmtree(left_over)
        for left_over in folder.glob(f".*{_REPLACED}"):
            if left_over not in complete(folder):
                _remove(left_over)
        try:
            _write(partial, checkpoint)
            _swap(partial, target)
            # A new name is on disk only when its parent folder is.
            _sync_folder(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        # Last: there is always at least one complete checkpoint.
        for old in complete(folder)[:-keep]:
            if step_of(old) not in retained:
                _remove(old)
    return target


def _swap(partial: Path, target: Path) -> None:
    """Give a written checkpoint its name. An older one of this name is readable under another name meanwhile."""
    replaced = target.with_name(f".{target.name}{_REPLACED}")
    if target.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        target.rename(replaced)
    partial.rename(target)
    if replaced.exists():
        _remove(replaced)


def _remove(path: Path) -> None:
    """Remove a checkpoint atomically: it is renamed first."""
    gone = path.with_name(f".{path.name.removeprefix('.')}.removed.partial")
    path.rename(gone)
    shutil.rmtree(gone)


def _write(partial: Path, checkpoint: Checkpoint) -> None:
    # Here and below: the state of a run is read without torch.
    from safetensors.torch import save_file

    partial.mkdir()
    for name, tensors in checkpoint.tensors.items():
        # safetensors refuses strided tensors, such as weights in channels-last format.
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, partial / f"{name}.safetensors")
    (partial / _STATE).write_text(json.dumps(checkpoint.state), encoding="utf-8")
    # Of the files as they were written, so that a later difference is damage and no rounding.
    digests = {path.name: sha256_of_file(path) for path in sorted(partial.iterdir())}
    manifest = {"step": checkpoint.step, "sha256": digests}
    (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    # The data must be on disk before the folder gets its name, which marks it as complete.
    _sync_folder(partial)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _name(step: int) -> str:
    # Zeros in front, so that names sort by step.
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint's folder; None for any other folder, such as a copy."""
    name = path.name
    if name.startswith(".") and name.endswith(_REPLACED):
        name = name[1:].removesuffix(_REPLACED)
    digits = name.removeprefix("step-")
    if not (digits.isascii() and digits.isdigit()):
        return None
    return int(digits) if _name(int(digits)) == name else None


def complete(folder: Path) -> list[Path]:
    """Return the checkpoints by their names, the newest last."""
    found: dict[int, Path] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir(), reverse=True):
            step = step_of(path)
            # A checkpoint that is being replaced counts until the new one has its name, which sorts before it here.
            if step is not None and path.is_dir():
                found.setdefault(step, path)
    return [found[step] for step in sorted(found)]


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint, or None."""
    found = complete(folder)
    return found[-1] if found else None


def newest_complete(folder: Path) -> tuple[Path, Checkpoint] | None:
    """Return the newest undamaged checkpoint, or None if there is no checkpoint; log the damaged ones.

    A running training may remove checkpoints meanwhile; then the folder is read again.

    Raises:
        UserError: if there are checkpoints and all are damaged.
    """
    for _ in range(_TRIES):
        before = _seen(folder)
        damaged: list[DamagedCheckpointError] = []
        for path in reversed(complete(folder)):
            try:
                found = load(path)
            except DamagedCheckpointError as error:
                damaged.append(error)
                continue
            # A checkpoint may only look damaged because the running training removed it meanwhile.
            if damaged and _seen(folder) != before:
                break
            for fault in damaged:
                logger.warning(f"{fault}; using the one before it")
            return path, found
        if _seen(folder) == before:
            if damaged:
                raise UserError(f"{damaged[-1]}, and there is none before it: start again with --fresh")
            return None
        time.sleep(_PAUSE)
    raise _restless(folder)


def _seen(folder: Path) -> list[tuple[Path, int]]:
    """Return the checkpoints with their inodes, which differ between checkpoints of one name."""
    found = []
    for path in complete(folder):
        try:
            found.append((path, path.stat().st_ino))
        except FileNotFoundError:
            # Differs from the result of the next try.
            found.append((path, 0))
    return found


def _restless(folder: Path) -> UserError:
    return UserError(
        f"{folder}: the run writes and removes checkpoints faster than they can be read; run the same command again, "
        "or when the run has stopped"
    )


def load(path: Path) -> Checkpoint:
    """Load a checkpoint and compare its files with the digests written with them.

    Raises:
        DamagedCheckpointError: if a file is missing or has changed.
    """
    from safetensors.torch import load_file

    step, digests = _manifest(path)
    try:
        for name, digest in digests.items():
            if sha256_of_file(path / name) != digest:
                raise _damaged(path, name, f"is truncated or changed ({(path / name).stat().st_size} bytes)")
        tensors = {Path(name).stem: load_file(path / name) for name in digests if name.endswith(".safetensors")}
        return Checkpoint(step, tensors, read_mapping(path / _STATE, todo="it is damaged"))
    except (OSError, SafetensorError, BrokenFileError) as error:
        raise DamagedCheckpointError(f"checkpoint {path} can't be read ({error})") from error


def load_step(folder: Path, step: int) -> tuple[Path, Checkpoint]:
    """Load the checkpoint of a number of steps, and return it with its folder.

    Raises:
        UserError: if it is missing or damaged.
    """
    for path in complete(folder):
        if step_of(path) == step:
            return path, load(path)
    raise UserError(f"{folder}: expected the checkpoint of step {step}, which the evaluations chose, got none there")


def _damaged(path: Path, name: str, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint {path}: {name} {what}")


def _manifest(path: Path) -> tuple[int, dict[str, str]]:
    """Return the step of a checkpoint and the digest of each of its files, after a check that all exist."""
    keys = {"step": int, "sha256": dict}
    try:
        manifest = read_mapping(path / _MANIFEST, keys, todo="it is damaged")
    except BrokenFileError as error:
        raise _damaged(path, _MANIFEST, "is missing or unreadable") from error
    digests, step = manifest["sha256"], manifest["step"]
    # A folder that was copied under another name would resume at a wrong step.
    if step != step_of(path) or _STATE not in digests or not all(_is_digest_entry(*item) for item in digests.items()):
        raise _damaged(path, _MANIFEST, "is missing or unreadable: it is not of this checkpoint")
    for name in digests:
        if not (path / name).is_file():
            raise _damaged(path, name, "is missing")
    return step, digests


def _is_digest_entry(name: str, digest: object) -> bool:
    return Path(name).name == name and isinstance(digest, str)


def newest_state(folder: Path) -> State | None:
    """Return the state of the newest checkpoint with all of its files, or None, without reading weights."""
    for _ in range(_TRIES):
        before = _seen(folder)
        for path in reversed(complete(folder)):
            try:
                step, _digests = _manifest(path)
                state = read_mapping(path / _STATE, {"non_finite_steps": dict}, todo="it is damaged")
                check_keys(
                    str(path), state["non_finite_steps"], {"skipped": int, "lr_scale": float}, todo="it is damaged"
                )
                return State(path, step, state, (path / _MANIFEST).stat().st_mtime)
            except (DamagedCheckpointError, BrokenFileError, OSError):
                continue
        if _seen(folder) == before:
            return None
        time.sleep(_PAUSE)
    return None
