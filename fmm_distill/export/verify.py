"""After each export: the folders are opened by stock diffusers, without this package, and their samples compared."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file

from fmm_distill.checkpoint import write_text
from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.export.folded import jump_scheduler, stock_times
from fmm_distill.export.stock import any_step_times, folded_network, guidance_keyword, start_of, verification_call
from fmm_distill.sampling import sample
from fmm_distill.teachers.codec import Waves

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from fmm_distill.student import Student
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.conditions import Conditions
    from fmm_distill.velocity import Conditioning

__all__ = ["TOLERANCE", "Exported", "verify", "verify_all"]

TOLERANCE = 1e-4
SEED, BATCH = 5, 8


@dataclass(frozen=True)
class Exported:
    """A student, its teacher, and where it was exported to."""

    student: Student
    teacher: Teacher
    folder: Path
    steps: tuple[int, ...]


def verify(student: Student, teacher: Teacher, folder: Path, steps: tuple[int, ...]) -> dict[str, float]:
    """Largest difference between what the reloaded pipelines make and this package's sampler.

    Of images a difference of pixels (range 0 to 1), of latents relative to the largest. A folded pipeline is compared
    on the times that its stock scheduler takes. Kept in ``verification.json`` in the folder; keys are ``any-<n>`` and
    ``folded-<n>``.

    Raises:
        FmmDistillError: if a pipeline does not open or differs by more than ``TOLERANCE``.
    """
    # Without folded pipelines the any-step one is still looked at.
    return verify_all([Exported(student.to("cpu"), teacher, folder, steps or (4,))])[0]


def verify_all(exports: Sequence[Exported]) -> list[dict[str, float]]:
    """``verify`` of several exports, opened in one process."""
    calls = [_call(export.teacher) for export in exports]
    found = []
    for export, call, made in zip(exports, calls, _reload(exports, calls), strict=True):
        compare = _differences if export.teacher.folder is None else _stock_differences
        differences = compare(export, call, made)
        report = {"tolerance": TOLERANCE, "largest_pixel_difference": differences}
        write_text(export.folder / "verification.json", json.dumps(report, indent=2) + "\n")
        wrong = {key: value for key, value in differences.items() if not value <= TOLERANCE}
        if wrong:
            raise FmmDistillError(
                f"{export.folder}: reloaded pipelines differ from the student by {wrong}, above {TOLERANCE}"
            )
        found.append(differences)
    return found


def _call(teacher: Teacher) -> dict[str, Any]:
    if teacher.folder is not None:
        return verification_call(teacher, BATCH)
    call: dict[str, Any] = {"batch_size": BATCH, "output_type": "np"}
    return call if teacher.conditions is None else call | {"class_labels": _first_conditions(teacher)[0]}


def _any_step_call(teacher: Teacher, call: dict[str, Any]) -> dict[str, Any]:
    """A student with a range of guidance is called without a scale: its default is the teacher's."""
    ranged = teacher.guidance is not None and teacher.guidance.range is not None
    return {key: value for key, value in call.items() if not ranged or key != guidance_keyword(teacher)}


def _first_conditions(teacher: Teacher) -> tuple[list[int], Conditioning]:
    """``BATCH`` conditions by their number, from the first on, and what the network is told of them."""
    conditions = cast("Conditions", teacher.conditions)
    count = len(conditions.names)
    numbers = [i % count for i in range(BATCH)]
    return numbers, cast("Conditioning", teacher.told((torch.tensor(numbers, dtype=torch.float64) + 0.5) / count))


def _differences(export: Exported, call: dict[str, Any], made: dict[str, Tensor]) -> dict[str, float]:
    """Of the pipelines that start from a count of images."""
    student, teacher = export.student, export.teacher
    generator = torch.Generator().manual_seed(SEED)
    noise = randn_tensor((BATCH, *teacher.event_shape), generator=generator, dtype=torch.float32)
    cond = None if teacher.conditions is None else _first_conditions(teacher)[1]
    differences = {}
    for key, images in made.items():
        kind, n = key.split("-")
        times = stock_times(student, jump_scheduler(student, teacher, int(n)), int(n)) if kind == "folded" else int(n)
        own = teacher.codec.decode(sample(student, noise, times, cond))
        differences[key] = ((own / 2 + 0.5).clamp(0, 1).movedim(1, -1) - images).abs().max().item()
    return differences


def _stock_differences(export: Exported, call: dict[str, Any], made: dict[str, Tensor]) -> dict[str, float]:
    """Of the pipelines that are copies of the teacher's: of their last latents, or of images, or of sounds."""
    student, teacher = export.student, export.teacher
    noise, cond = start_of(teacher, call, SEED)
    if cond is None and teacher.conditions is not None:
        cond = _first_conditions(teacher)[1]
    if cond is not None and teacher.guidance is not None:
        cond = teacher.guidance.at(cond)
    differences = {}
    for key, samples in made.items():
        kind, n = key.split("-")
        folded = kind == "folded"
        times = folded_network(student, teacher, int(n))[2] if folded else any_step_times(student, teacher, int(n))
        own, size = sample(student, noise, times, cond), 1.0
        if isinstance(teacher.codec, Waves):
            # A length that its blocks don't halve evenly is filled up and cut.
            own = teacher.codec.decode(own).clamp(-1, 1)[..., : samples.shape[-1]]
        elif call["output_type"] == "np":
            own = (teacher.codec.decode(own) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
        else:
            size = float(own.abs().max().clamp_min(1))
        differences[key] = float((own.reshape(samples.shape) - samples).abs().max() / size)
    return differences


@contextmanager
def _scratch() -> Iterator[str]:
    """A temporary folder for what the other process writes."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            yield scratch
    except OSError as error:
        raise _no_room(error) from error


def _no_room(error: OSError) -> UserError:
    return UserError(
        f"the export is written, but not verified: no temporary files can be written ({error.strerror}); make room "
        "there, or set TMPDIR to a folder that has some, then run the same command again"
    )


def _reload(exports: Sequence[Exported], calls: Sequence[dict[str, Any]]) -> list[dict[str, Tensor]]:
    with _scratch() as scratch:
        jobs: list[dict[str, Any]] = [
            {
                "folder": str(export.folder.resolve()),
                "call": call,
                "any_call": _any_step_call(export.teacher, call),
                "seed": SEED,
                "steps": export.steps,
                "output": f"{scratch}/{i}.safetensors",
            }
            for i, (export, call) in enumerate(zip(exports, calls, strict=True))
        ]
        written = Path(scratch) / "jobs.json"
        written.write_text(json.dumps(jobs), encoding="utf-8")
        command = [sys.executable, "-P", str(files("fmm_distill") / "export" / "reload.py"), str(written)]
        environment = os.environ | {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
        if run.returncode:
            if os.strerror(errno.ENOSPC) in run.stderr:
                raise _no_room(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            shown = ", ".join(str(export.folder) for export in exports)
            raise FmmDistillError(f"{shown}: stock diffusers does not open the export:\n{run.stderr}")
        return [load_file(job["output"]) for job in jobs]
