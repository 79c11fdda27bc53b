"""After each export: the folders are opened by stock diffusers, without this package, and their jumps compared."""

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

from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.export.agreement import Agreement, compare
from fmm_distill.export.contents import record
from fmm_distill.export.folded import jump_scheduler, stock_times
from fmm_distill.export.stock import any_step_times, folded_scheduler, guidance_keyword, start_of, verification_call
from fmm_distill.io.files import write_text
from fmm_distill.teachers.prompted.call import RecordedCall

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.conditions import Conditions

__all__ = ["Exported", "agreements_of", "summary", "verify", "verify_all"]

SEED = 5
# Numbers in a batch: eight images of 64 x 64, two of those that take minutes a step on a CPU. One sample could hide
# that rows are mixed up.
_BATCH, _NUMBERS = 8, 2**17


@dataclass(frozen=True)
class Exported:
    """A student, its teacher, and where it was exported to."""

    student: Student
    teacher: Teacher
    folder: Path
    steps: tuple[int, ...]


def verify(student: Student, teacher: Teacher, folder: Path, steps: tuple[int, ...]) -> dict[str, Agreement]:
    """Compare every jump of the reloaded pipelines with the student's.

    Each jump starts where the pipeline was, and nothing is clipped or decoded first. A folded pipeline is compared on
    the times that its stock scheduler takes. The result is written to ``verification.json`` in the folder; keys are
    ``any-<n>`` and ``folded-<n>``.

    Raises:
        FmmDistillError: if a pipeline does not open, or differs by more than rounding explains (``agreement``).
    """
    # Without folded pipelines the any-step one is still compared.
    return verify_all([Exported(student.to("cpu"), teacher, folder, steps or (4,))])[0]


def verify_all(exports: Sequence[Exported]) -> list[dict[str, Agreement]]:
    """``verify`` of several exports, opened in one process."""
    found = agreements_of(exports)
    for export, agreements in zip(exports, found, strict=True):
        wrong = {key: value for key, value in agreements.items() if not value.passed}
        report = {"passed": not wrong, "pipelines": {key: value.to_json() for key, value in agreements.items()}}
        write_text(export.folder / "verification.json", json.dumps(report, indent=2) + "\n")
        record(export.folder, "verification.json")
        if wrong:
            raise FmmDistillError(f"{export.folder}: reloaded pipelines differ from the student ({_shown(wrong)})")
    return found


def agreements_of(exports: Sequence[Exported]) -> list[dict[str, Agreement]]:
    """How far the pipelines of exports are from their students, opened in one process."""
    calls = [_call(export.teacher) for export in exports]
    reloaded = zip(exports, calls, _reload(exports, calls), strict=True)
    return [_agreements(export, call, made) for export, call, made in reloaded]


def summary(agreements: dict[str, Agreement]) -> str:
    """The pipeline that is furthest from the student, in one line."""
    worst = max(agreements.values(), key=lambda one: one.difference / one.tolerance)
    return f"largest difference of a jump {worst.difference:.1e}, rounding explains {worst.tolerance:.1e}"


def _shown(wrong: dict[str, Agreement]) -> str:
    texts = []
    for key, one in wrong.items():
        texts.append(f"{key}: a jump by {one.difference:.1e}, where rounding explains {one.tolerance:.1e}")
        if one.image is not None:
            texts[-1] += f"; images by {one.image:.1e}"
    return "; ".join(texts)


def _batch(teacher: Teacher) -> int:
    return max(2, min(_BATCH, _NUMBERS // torch.Size(teacher.event_shape).numel()))


def _call(teacher: Teacher) -> dict[str, Any]:
    if teacher.folder is not None:
        return verification_call(teacher, _batch(teacher))
    call: dict[str, Any] = {"batch_size": _batch(teacher), "output_type": "np"}
    return call if teacher.conditions is None else call | {"class_labels": _first_conditions(teacher)[0]}


def _any_step_call(teacher: Teacher, call: dict[str, Any]) -> dict[str, Any]:
    """A student with a range of guidance is called without a scale: its default is the teacher's."""
    ranged = teacher.guidance is not None and teacher.guidance.range is not None
    return {key: value for key, value in call.items() if not ranged or key != guidance_keyword(teacher)}


def _first_conditions(teacher: Teacher) -> tuple[list[int], Conditioning]:
    """A batch of conditions by their number, from the first on, and what the network is conditioned on."""
    conditions = cast("Conditions", teacher.conditions)
    count = len(conditions.names)
    numbers = [i % count for i in range(_batch(teacher))]
    return numbers, cast(
        "Conditioning", teacher.conditioned_on((torch.tensor(numbers, dtype=torch.float64) + 0.5) / count)
    )


def _agreements(export: Exported, call: dict[str, Any], made: dict[str, Tensor]) -> dict[str, Agreement]:
    start = _start(export.teacher, call)
    found = {}
    for key in dict.fromkeys(name.partition(".")[0] for name in made):
        own = {name.partition(".")[2]: value for name, value in made.items() if name.startswith(f"{key}.")}
        found[key] = compare(export.student, export.teacher, own, _times(export, key), start)
    return found


def _start(teacher: Teacher, call: dict[str, Any]) -> tuple[Tensor, Conditioning | None]:
    """The N(0, I) that the pipelines start from, and what they condition their network on."""
    cond = None
    if teacher.folder is None:
        generator = torch.Generator().manual_seed(SEED)
        noise = randn_tensor((_batch(teacher), *teacher.event_shape), generator=generator, dtype=torch.float32)
    else:
        noise, cond = start_of(teacher, call, SEED)
    if cond is None and teacher.conditions is not None:
        cond = _first_conditions(teacher)[1]
    if cond is not None and teacher.guidance is not None:
        cond = teacher.guidance.at(cond)
    return noise, cond


def _times(export: Exported, key: str) -> Tensor:
    """The times between which a pipeline jumps, data at the end."""
    student, teacher = export.student, export.teacher
    kind, n = key.split("-")
    steps = int(n)
    if kind == "folded" and teacher.folder is None:
        return stock_times(student, jump_scheduler(student, teacher, steps), steps)
    if kind == "folded":
        return folded_scheduler(student, teacher, steps)[1]
    return student.schedule.grid(steps) if teacher.folder is None else any_step_times(student, teacher, steps)


def _job(export: Exported, call: dict[str, Any], output: str) -> dict[str, Any]:
    teacher, ask = export.teacher, export.teacher.parametrization.call
    return {
        "folder": str(export.folder.resolve()),
        "call": call,
        "any_call": _any_step_call(teacher, call),
        "seed": SEED,
        "steps": export.steps,
        "component": teacher.component,
        # Stock networks without prompts name it otherwise, and their pipelines pass it by its place.
        "sample": ask.sample if isinstance(ask, RecordedCall) else "sample",
        "count": _batch(teacher),
        "output": output,
    }


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
        f"the export can't be verified: no temporary files can be written ({error.strerror}); make room there, or set "
        "TMPDIR to a folder that has some, then run the same command again"
    )


def _reload(exports: Sequence[Exported], calls: Sequence[dict[str, Any]]) -> list[dict[str, Tensor]]:
    with _scratch() as scratch:
        pairs = zip(exports, calls, strict=True)
        jobs = [_job(export, call, f"{scratch}/{i}.safetensors") for i, (export, call) in enumerate(pairs)]
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
