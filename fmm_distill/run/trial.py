"""A trial export before training: write an untrained student, open it with stock diffusers and compare the two."""

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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from safetensors import SafetensorError

from fmm_distill import __version__
from fmm_distill.data.condition_images import describe_images
from fmm_distill.data.row_store import mebibytes
from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.export.stock_pipeline import StockPipelineExporter
from fmm_distill.export.strengths import check_strengths
from fmm_distill.export.verify import summary, verify
from fmm_distill.export.write import network_bytes, write_student
from fmm_distill.io.files import write_text
from fmm_distill.io.hashes import sha256_of_text
from fmm_distill.run.marker import TRIAL
from fmm_distill.student.scaled import scaled_ranks
from fmm_distill.teachers.codec import PipelineCodec
from fmm_distill.teachers.components import STOCK_ERRORS
from fmm_distill.teachers.conditions import Embeddings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["keep_trial", "trial_bytes", "try_export"]

logger = logging.getLogger(__name__)

_RESULT_FILE = "trial.json"
_SEED = 0
# Digests that passed in this process, so that a second run of the same kind of student skips its trial.
_PASSED: set[str] = set()


def try_export(
    recipe: Recipe,
    student: Student,
    teacher: Teacher,
    folder: Path,
    *,
    locked: bool = False,
) -> str:
    """Export a student with random jump embeddings, verify the export, and remove it.

    The trial runs the code that exports the trained student. It does not change the student, the teacher or the random
    state. A kind of student that passed in ``folder`` or in this process is not tried again.

    Args:
        folder: folder of the run. The trial is written into it or, if it does not exist, into the nearest parent.
        locked: True if the caller holds the lock of ``folder``. Leftovers of a killed trial are then removed.

    Returns:
        The digest for ``keep_trial``.

    Raises:
        UserError: if the export or its verification fails, or the disk has too little space.
    """
    if locked:
        shutil.rmtree(folder / TRIAL.format(0), ignore_errors=True)
    digest = _digest(recipe, student, teacher)
    if digest in _PASSED or _passed_digest(folder) == digest:
        return digest
    steps, parent = _tried_steps(recipe), _parent_of_trial(folder)
    # A fixed name only inside the run's folder: there the next run finds and removes leftovers.
    name = TRIAL.format(0 if locked else secrets.randbelow(10**9) + 1) if parent == folder.absolute() else None
    _check_disk_space(student, teacher, steps, parent)
    began = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]), _temporary_folder(parent, name) as target:
            trained, rank = _with_random_jumps(student), recipe.export.lora_rank
            exported = write_student(trained, teacher, target, steps, lora_rank=rank, linked=True)
            if isinstance(exported.exporter, StockPipelineExporter):
                # All numbers, not only those that are tried; the grids of most of them follow from those.
                exported.exporter.check_runs(recipe.export.steps)
            # The loss of adapters that are extracted from random changes is no news.
            agreements = verify(replace(exported, extracted=None))
            check_strengths(exported.student, exported.exporter, recipe.export.steps)
    except (FmmDistillError, SafetensorError, *STOCK_ERRORS) as error:
        raise UserError(
            f"{teacher.source}: its student can't be exported; the trial before training failed ({_reason(error)})"
        ) from error
    finally:
        if isinstance(teacher.codec, PipelineCodec):
            # Text encoders are large, and training does not use them.
            teacher.codec.release()
    _PASSED.add(digest)
    logger.info(
        f"export:  verified with an untrained student in {time.perf_counter() - began:.1f} s: {summary(agreements)}"
    )
    return digest


def keep_trial(folder: Path, digest: str) -> None:
    """Record in a run's folder the digest of the trial that passed."""
    if _passed_digest(folder) == digest:
        return
    write_text(folder / _RESULT_FILE, json.dumps({"passed": digest}) + "\n")


def trial_bytes(recipe: Recipe, student: Student, teacher: Teacher) -> int:
    """Return the disk space of a trial in bytes: the networks alone, since the other components are links."""
    return network_bytes(student, teacher, _tried_steps(recipe))


def _passed_digest(folder: Path) -> str | None:
    file = folder / _RESULT_FILE
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["passed"]) if file.is_file() else None
    except (ValueError, KeyError, TypeError):
        # A truncated file costs one more trial and is no error.
        return None


def _tried_steps(recipe: Recipe) -> tuple[int, ...]:
    """Return the fewest and the most steps.

    Some pipelines fail at one step, and a layer folds a limited number of different jumps.
    """
    steps = recipe.export.steps
    return tuple(sorted({min(steps), max(steps)})) if steps else ()


def _digest(recipe: Recipe, student: Student, teacher: Teacher) -> str:
    """Return the digest of everything but the weights that an export depends on: versions and configurations."""
    pipeline = None if teacher.pipeline is None else [teacher.pipeline.call, teacher.pipeline.index]
    inputs = [
        [__version__, diffusers.__version__, torch.__version__],
        [teacher.adapter, teacher.config, teacher.scheduler_config, list(teacher.event_shape), pipeline],
        [repr(teacher.guidance), *_conditions(teacher)],
        [student.prediction, recipe.student.kind, recipe.student.lora.model_dump(mode="json")],
        [list(recipe.export.steps), recipe.export.lora_rank],
        [scaled_ranks(student.network), recipe.student.regression_steps > 0],
    ]
    return sha256_of_text(json.dumps(inputs, sort_keys=True, default=repr))


def _conditions(teacher: Teacher) -> list[Any]:
    """Return the kind of the conditions, and the sizes of the images among them."""
    conditions = teacher.conditions
    images = conditions.images if isinstance(conditions, Embeddings) else {}
    return [None if conditions is None else type(conditions).__name__, *([describe_images(images)] if images else [])]


def _parent_of_trial(folder: Path) -> Path:
    """Return the run's folder or its nearest existing parent; the folder of temporary files if that is read-only."""
    path = folder.absolute()
    # The same disk as the run, so that the trial also tests its space and its symbolic links.
    existing = next(path for path in (path, *path.parents) if path.is_dir())
    return existing if os.access(existing, os.W_OK) else Path(tempfile.gettempdir())


@contextmanager
def _temporary_folder(parent: Path, name: str | None) -> Iterator[Path]:
    """Make an empty folder in ``parent`` and remove it at the end. With None it gets a new random name."""
    if name is None:
        with tempfile.TemporaryDirectory(prefix=".fmm-distill-", dir=parent) as made:
            yield Path(made)
        return
    target = parent / name
    try:
        target.mkdir()
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _check_disk_space(student: Student, teacher: Teacher, steps: tuple[int, ...], parent: Path) -> None:
    needed, free = network_bytes(student, teacher, steps), shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"trial export: expected {mebibytes(needed)} of free disk space in {parent}, got {mebibytes(free)}; free "
            "some space or try fewer export.steps"
        )


@torch.no_grad()
def _with_random_jumps(student: Student) -> Student:
    """Return a copy with random jump embeddings and adapters; it shares all other weights with the student."""
    # With these at zero a student equals its teacher, and an export that lost them would still agree.
    randomized = {name for name, _ in student.named_parameters() if _is_zero_at_first(name)}
    shared = [value for name, value in student.named_parameters() if name not in randomized]
    # deepcopy takes the objects in its memo as already copied: large weights stay in memory once.
    made = copy.deepcopy(student, {id(value): value for value in (*shared, *student.buffers())})
    generator = torch.Generator().manual_seed(_SEED)
    for name, value in made.named_parameters():
        if name in randomized:
            # Scaled by the layer's inputs, so that the random jump is of order 1 at every width.
            # A tenth for changes of weights: there is one in every layer, and together they must not overflow.
            scale = value.shape[1:].numel() ** -0.5 * (1.0 if "jump_embedding." in name else 0.1)
            value.copy_(torch.randn(value.shape, generator=generator) * scale)
    return made


def _is_zero_at_first(name: str) -> bool:
    if "jump_embedding." in name:
        return ".linear_2." in name
    return ".lora_B." in name or name.endswith(("jump_weight", "jump_bias", "jump_B", "diagonal_B"))


def _reason(error: Exception) -> str:
    """Return an error as one line: the first line and, of a longer output, the last one, which names the cause."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    return text if isinstance(error, FmmDistillError) else f"{type(error).__name__}: {text}"
