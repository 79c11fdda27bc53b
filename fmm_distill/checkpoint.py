"""Checkpoints: a folder of safetensors that is complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = [
    "Checkpoint",
    "DamagedCheckpointError",
    "append_line",
    "average_name",
    "load",
    "newest",
    "newest_state",
    "newest_whole",
    "save",
    "write_text",
    "writing",
]

_MANIFEST = "manifest.json"


class DamagedCheckpointError(UserError):
    """A checkpoint is not as it was written."""


@dataclass
class Checkpoint:
    """Everything that a run needs to go on.

    Attributes:
        step: the number of steps done.
        tensors: file stem to named tensors: student, an average a rate, optimizer, and frozen and weight where there
            are any.
        state: what is not a tensor.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns a full disk, a size limit or a missing permission while writing ``target`` into one clear line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{target} could not be written ({reason}); what was there before is whole: "
            "make room or choose another --output, then run the same command again"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file so that its old content stays until the new one is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse a file that ``write_text`` could not write, before what it is to hold is computed.

    Raises:
        UserError: if it is a folder, or its folder is not there or takes no files.
    """
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError("it is a folder; wanted a file")
        probe = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)


def append_line(path: Path, text: str) -> None:
    """Add a line to a log. Unbuffered: a full disk fails at the write, with nothing left over to fail again."""
    with writing(path), path.open("ab", buffering=0) as file:
        file.write(text.encode() + b"\n")


def average_name(rate: float) -> str:
    """The file stem of a moving average in a checkpoint."""
    return f"ema-{rate:g}"


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint beside the older ones, then remove all but the newest ``keep``.

    The folder gets its name only when every file in it is on the disk; a partial one is removed.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    partial = folder / f".{target.name}.partial"
    with writing(target):
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".*.partial"):
            shutil.rmtree(left_over)
        try:
            _write(partial, checkpoint)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            _sync_folder(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def _write(partial: Path, checkpoint: Checkpoint) -> None:
    # Here and below: where a run stands is read without torch.
    from safetensors.torch import save_file

    partial.mkdir()
    for name, tensors in checkpoint.tensors.items():
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, partial / f"{name}.safetensors")
    (partial / "state.json").write_text(json.dumps(checkpoint.state), encoding="utf-8")
    digests = {path.name: _digest(path) for path in sorted(partial.iterdir())}
    manifest = {"step": checkpoint.step, "sha256": digests}
    (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(partial)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def newest(folder: Path) -> Path | None:
    """The newest checkpoint, if there is one."""
    found = _complete(folder)
    return found[-1] if found else None


def newest_whole(folder: Path, say: Callable[[str], None]) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint that is as it was written, if there is one; damaged ones are named.

    Raises:
        UserError: if there are checkpoints and all are damaged.
    """
    damaged: DamagedCheckpointError | None = None
    for path in reversed(_complete(folder)):
        try:
            found = load(path)
        except DamagedCheckpointError as error:
            say(f"{error}; the one before it is taken")
            damaged = error
            continue
        return path, found
    if damaged is not None:
        raise UserError(f"{damaged}, and there is none before it: start again with --fresh")
    return None


def load(path: Path) -> Checkpoint:
    """A checkpoint, checked against the digests written with it.

    Raises:
        DamagedCheckpointError: if a file of it is missing or is not the one that was written.
    """
    from safetensors.torch import load_file

    step, digests = _manifest(path)
    for name, digest in digests.items():
        if _digest(path / name) != digest:
            raise _damaged(path, name, f"is truncated or changed ({(path / name).stat().st_size} bytes)")
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(step, tensors, json.loads((path / "state.json").read_text(encoding="utf-8")))


def _damaged(path: Path, name: str, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint {path}: {name} {what}")


def _manifest(path: Path) -> tuple[int, dict[str, str]]:
    """The step of a checkpoint and the digest of each of its files, all of which are there."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        digests, step = manifest["sha256"], manifest["step"]
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, _MANIFEST, "is missing or unreadable") from error
    for name in digests:
        if not (path / name).is_file():
            raise _damaged(path, name, "is missing")
    return step, digests


def newest_state(folder: Path) -> tuple[Path, int, dict[str, Any]] | None:
    """The newest checkpoint whose files are all there, its step, and what in it is not a tensor. Reads no weights."""
    # A second look: a run at work may put a newer one in the place of what was found.
    for path in [*reversed(_complete(folder)), *reversed(_complete(folder))]:
        try:
            step, _ = _manifest(path)
            return path, step, json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (DamagedCheckpointError, OSError, ValueError):
            continue
    return None
