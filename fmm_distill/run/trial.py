"""The export, tried before training: an untrained student is written, opened by stock diffusers and compared."""

from __future__ import annotations

import copy
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from safetensors import SafetensorError

from fmm_distill import __version__
from fmm_distill.data.row_store import mebibytes
from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.export.verify import summary, verify
from fmm_distill.export.write import network_bytes, write_student
from fmm_distill.io.files import write_text
from fmm_distill.io.hashes import sha256_of_text
from fmm_distill.run.marker import TRIAL
from fmm_distill.teachers.codec import PipelineCodec
from fmm_distill.teachers.components import STOCK_ERRORS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["keep_trial", "trial_bytes", "try_export"]

logger = logging.getLogger(__name__)

_KEPT = "trial.json"
_SEED = 0
# Of the digests that have passed in this process: another run of the same kind of student needs no other trial.
_PASSED: set[str] = set()


def try_export(
    recipe: Recipe,
    student: Student,
    teacher: Teacher,
    folder: Path,
    *,
    locked: bool = False,
) -> str:
    """Export and verify the student with random jump embeddings, and remove it again.

    What is tried is the path that the end of the run takes. The student, the teacher and the random state are left as
    they are. A kind of student that has passed in ``folder`` or in this process is not tried again.

    Args:
        folder: of the run; the export is written into it, where the final one will be, or next to it if it is missing.
        locked: the caller holds the lock of ``folder``: what a trial that was killed left there is removed.

    Returns:
        The digest for ``keep_trial``.

    Raises:
        UserError: if the export fails, with the reason.
    """
    if locked:
        shutil.rmtree(folder / TRIAL.format(0), ignore_errors=True)
    digest = _digest(recipe, student, teacher)
    if digest in _PASSED or _kept(folder) == digest:
        return digest
    steps, place = _tried_steps(recipe), _place(folder)
    # Next to the folder no run knows the name.
    name = TRIAL.format(0 if locked else secrets.randbelow(10**9) + 1) if place == folder.absolute() else None
    _check_room(student, teacher, steps, place)
    began = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]), _written(place, name) as written:
            exported = write_student(_drawn(student), teacher, written, steps, linked=True)
            agreements = verify(exported)
    except (FmmDistillError, SafetensorError, *STOCK_ERRORS) as error:
        raise UserError(
            f"{teacher.source}: its student can't be exported, which is tried before training ({_reason(error)})"
        ) from error
    finally:
        if isinstance(teacher.codec, PipelineCodec):
            # Text encoders are large, and training does not need them.
            teacher.codec.release()
    _PASSED.add(digest)
    logger.info(
        f"export:  tried with an untrained student in {time.perf_counter() - began:.1f} s: {summary(agreements)}"
    )
    return digest


def keep_trial(folder: Path, digest: str) -> None:
    """Write into a run's folder what has passed, unless it is there."""
    if _kept(folder) == digest:
        return
    write_text(folder / _KEPT, json.dumps({"passed": digest}) + "\n")


def trial_bytes(recipe: Recipe, student: Student, teacher: Teacher) -> int:
    """What a trial takes on the disk: what each pipeline has of its own; the other components are links."""
    return network_bytes(student, teacher, _tried_steps(recipe))


def _kept(folder: Path) -> str | None:
    file = folder / _KEPT
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["passed"]) if file.is_file() else None
    except (ValueError, KeyError, TypeError):
        # A file that was cut off: the export is tried again.
        return None


def _tried_steps(recipe: Recipe) -> tuple[int, ...]:
    """The fewest and the most steps: some pipelines fail at one, a layer folds a limited number of different jumps."""
    steps = recipe.export.steps
    return tuple(sorted({min(steps), max(steps)})) if steps else ()


def _digest(recipe: Recipe, student: Student, teacher: Teacher) -> str:
    """Of what decides how the export is written: its code and every configuration, not the weights."""
    pipeline = None if teacher.pipeline is None else [teacher.pipeline.call, teacher.pipeline.index]
    about = [
        [__version__, diffusers.__version__, torch.__version__],
        [teacher.adapter, teacher.config, teacher.scheduler_config, list(teacher.event_shape), pipeline],
        [repr(teacher.guidance), None if teacher.conditions is None else type(teacher.conditions).__name__],
        [student.prediction, recipe.student.lora.model_dump(mode="json"), _tried_steps(recipe)],
    ]
    return sha256_of_text(json.dumps(about, sort_keys=True, default=repr))


def _place(folder: Path) -> Path:
    """The run's folder or the nearest one above it, on the same disk; that of temporary files if it takes none."""
    path = folder.absolute()
    near = next(path for path in (path, *path.parents) if path.is_dir())
    return near if os.access(near, os.W_OK) else Path(tempfile.gettempdir())


@contextmanager
def _written(place: Path, name: str | None) -> Iterator[Path]:
    """An empty folder for a trial in ``place``, removed at the end. None: of a name that nothing there has."""
    if name is None:
        with tempfile.TemporaryDirectory(prefix=".fmm-distill-", dir=place) as near:
            yield Path(near)
        return
    made = place / name
    try:
        made.mkdir()
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check_room(student: Student, teacher: Teacher, steps: tuple[int, ...], place: Path) -> None:
    needed, free = network_bytes(student, teacher, steps), shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"the export is tried before training and needs {mebibytes(needed)} in {place} for it; {mebibytes(free)} "
            "are free there: make room, or take fewer export.steps"
        )


@torch.no_grad()
def _drawn(student: Student) -> Student:
    """A copy whose jumps differ from the teacher's steps; all other weights are shared with the student."""
    drawn = {name for name, _ in student.named_parameters() if _is_zero_at_first(name)}
    shared = [value for name, value in student.named_parameters() if name not in drawn]
    made = copy.deepcopy(student, {id(value): value for value in (*shared, *student.buffers())})
    generator = torch.Generator().manual_seed(_SEED)
    for name, value in made.named_parameters():
        if name in drawn:
            value.copy_(torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5)
    return made


def _is_zero_at_first(name: str) -> bool:
    return ("jump_embedding." in name and ".linear_2." in name) or ".lora_B." in name


def _reason(error: Exception) -> str:
    """In one line: of what a process printed, the last line says what went wrong."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    return text if isinstance(error, FmmDistillError) else f"{type(error).__name__}: {text}"
