"""Verify an export: open its folders with stock diffusers, without this package, and compare their jumps."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file

from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.export.adapter_code import ip_adapter_of
from fmm_distill.export.agreement import Agreement, compare, compare_weights
from fmm_distill.export.call_files import images_to_files
from fmm_distill.export.contents import record
from fmm_distill.export.extraction import describe_loss, samples_lost
from fmm_distill.io.files import write_text
from fmm_distill.student.scaled import is_scaled
from fmm_distill.student.strength import strength_of
from fmm_distill.teachers.ip_adapter import FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from fmm_distill.export.exporter import Exporter, PipelineExporter
    from fmm_distill.student.extract import Extracted
    from fmm_distill.student.strength import Strength
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["Exported", "agreements_of", "summary", "verify", "verify_all"]

logger = logging.getLogger(__name__)

# Of the noise that pipelines and student start from; any number would do.
SEED = 5
# The size of a batch and the most numbers in it: eight images of 64 x 64, two of those that take minutes per step on a
# CPU. A single sample could hide that rows are mixed up.
_BATCH, _NUMBERS = 8, 2**17
# The key of an export without pipelines.
_WEIGHTS = "weights"


@dataclass(frozen=True)
class Exported:
    """A student, its exporter, the folder that it was exported to, and the adapters that were extracted from it."""

    student: Student
    exporter: Exporter
    folder: Path
    steps: tuple[int, ...]
    extracted: Extracted | None = None

    @property
    def teacher(self) -> Teacher:
        """The teacher of the student."""
        return self.exporter.teacher


def verify(exported: Exported) -> dict[str, Agreement]:
    """Compare every jump of the reloaded pipelines with the student's.

    Each jump starts where the pipeline was, and nothing is clipped or decoded first. A pipeline of a fixed number of
    steps is compared at the times that its stock scheduler takes. The result is written to ``verification.json`` in
    the folder; keys are ``any-<n>`` and ``folded-<n>``, or ``weights`` where there is no pipeline.

    Raises:
        FmmDistillError: if a pipeline does not open, or differs by more than rounding explains (``agreement``).
    """
    # Both sides on the CPU: kernels of other devices sum in another order.
    exported.student.to("cpu")
    # Without pipelines of fixed steps the any-step one is still compared.
    return verify_all([replace(exported, steps=exported.steps or (4,))])[0]


def verify_all(exports: Sequence[Exported]) -> list[dict[str, Agreement]]:
    """``verify`` several exports, opened in one process."""
    found = agreements_of(exports)
    for export, agreements in zip(exports, found, strict=True):
        wrong = {key: value for key, value in agreements.items() if not value.passed}
        report: dict[str, Any] = {"passed": not wrong}
        report["pipelines"] = {key: value.to_json() for key, value in agreements.items()}
        if export.extracted is not None:
            report["lora"] = _loss_of_adapters(export, export.extracted)
        write_text(export.folder / "verification.json", json.dumps(report, indent=2) + "\n")
        record(export.folder, "verification.json")
        if wrong:
            raise FmmDistillError(f"{export.folder}: the reloaded export differs from the student ({_shown(wrong)})")
    return found


def _loss_of_adapters(export: Exported, extracted: Extracted) -> dict[str, Any]:
    """Measure and log what extracted adapters lose, in the weights and in samples."""
    student, exporter, steps = export.student, export.exporter, export.steps or (1, 4)
    call = cast("PipelineExporter", exporter)
    if exporter.not_any_step is None:
        count = _batch(exporter.teacher)
        noise, cond = call.start(call.verification_call(count), count, SEED)
    else:
        noise = torch.randn(2, *exporter.teacher.event_shape, generator=torch.Generator().manual_seed(SEED))
        cond = exporter.teacher.first_conditions(len(noise))
    found = samples_lost(student, extracted, steps, noise, cond)
    logger.info(describe_loss(found))
    return found


def agreements_of(exports: Sequence[Exported]) -> list[dict[str, Agreement]]:
    """Compare the pipelines of exports with their students, opened in one process; weights alone are read again."""
    jobs = [_Job(export) for export in exports if export.exporter.not_any_step is None]
    pipelines = iter(zip(jobs, _reload(jobs) if jobs else [], strict=True))
    return [
        {_WEIGHTS: compare_weights(export.student, export.folder / export.exporter.component)}
        if export.exporter.not_any_step
        else _agreements(*next(pipelines))
        for export in exports
    ]


def summary(agreements: dict[str, Agreement]) -> str:
    """Describe the pipeline that differs most from the student, in one line."""
    if _WEIGHTS in agreements:
        return "the weights are equal to the student's"
    worst = max(agreements.values(), key=lambda one: one.fraction)
    unequal = [
        f"; the jumps of {key.removeprefix('folded-')} steps are not equal, so that the samples of their pipeline, at "
        f"the strength {one.strength.value:.3g}, differ from the student's by {one.samples:.1%}"
        for key, one in agreements.items()
        if one.strength is not None
    ]
    found = f"largest difference of a jump {worst.difference:.1e}, rounding explains {worst.tolerance:.1e}"
    return found + "".join(unequal)


def _shown(wrong: dict[str, Agreement]) -> str:
    texts = []
    for key, one in wrong.items():
        jump = f"a jump by {one.difference:.1e}, where rounding explains {one.tolerance:.1e}"
        texts.append(f"{key}: {f'by {one.difference:.1e}' if key == _WEIGHTS else jump}")
        if one.image is not None:
            texts[-1] += f"; images by {one.image:.1e}"
    return "; ".join(texts)


def _batch(teacher: Teacher) -> int:
    if teacher.pipeline is not None and teacher.pipeline.one_prompt:
        return 1
    return max(2, min(_BATCH, _NUMBERS // torch.Size(teacher.event_shape).numel()))


class _Job:
    """An export whose pipelines are opened in another process, and what each of them is called with."""

    def __init__(self, export: Exported) -> None:
        self.export, self.exporter = export, cast("PipelineExporter", export.exporter)
        self.count = _batch(self.exporter.teacher)
        self.call = self.exporter.verification_call(self.count)

    def to_json(self, output: str) -> dict[str, Any]:
        """Return the job as ``reload.py`` reads it, which writes to ``output``."""
        call = images_to_files(self.call, Path(output).with_suffix(""))
        return {
            "folder": str(self.export.folder.resolve()),
            "call": call,
            "any_call": self.exporter.any_step_call(call),
            "seed": SEED,
            "steps": self.export.steps,
            "output": output,
            "ip_adapter": self._adapter(),
        }

    def _adapter(self) -> dict[str, Any] | None:
        adapter = ip_adapter_of(self.exporter.teacher)
        if adapter is None:
            return None
        return {"load": {"subfolder": FOLDER, "weight_name": adapter.weight_name}, "scale": adapter.scale}

    def times(self, key: str) -> Tensor:
        """Return the times between which the pipeline ``any-<n>`` or ``folded-<n>`` jumps, data at the end."""
        kind, _, n = key.partition("-")
        fixed = kind == "folded"
        return self.exporter.fixed_grid(self.export.student, int(n)) if fixed else self.exporter.grid(int(n))

    def strength(self, key: str) -> Strength | None:
        """Return the strength of the changes of a scaled student's weights in a folded pipeline."""
        student = self.export.student
        scaled = key.startswith("folded-") and is_scaled(student.network)
        return strength_of(student, self.times(key)) if scaled else None


def _agreements(job: _Job, made: dict[str, Tensor]) -> dict[str, Agreement]:
    start = job.exporter.start(job.call, job.count, SEED)
    found = {}
    for key in dict.fromkeys(name.partition(".")[0] for name in made):
        own = {name.partition(".")[2]: value for name, value in made.items() if name.startswith(f"{key}.")}
        found[key] = compare(job.export.student, job.exporter.teacher, own, job.times(key), start, job.strength(key))
    return found


@contextmanager
def _scratch() -> Iterator[str]:
    """Yield a temporary folder for the files of the other process."""
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


def _reload(jobs: Sequence[_Job]) -> list[dict[str, Tensor]]:
    with _scratch() as scratch:
        plain = [job.to_json(f"{scratch}/{i}.safetensors") for i, job in enumerate(jobs)]
        written = Path(scratch) / "jobs.json"
        written.write_text(json.dumps(plain), encoding="utf-8")
        # -P: the folder of the script is not on the path, where modules of this package would hide others.
        command = [sys.executable, "-P", str(files("fmm_distill") / "export" / "reload.py"), str(written)]
        # A new cache of code, and no Hub: nothing but the export itself can make it open.
        environment = os.environ | {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
        if run.returncode:
            if os.strerror(errno.ENOSPC) in run.stderr:
                raise _no_room(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            shown = ", ".join(str(job.export.folder) for job in jobs)
            raise FmmDistillError(f"{shown}: stock diffusers does not open the export:\n{run.stderr}")
        return [load_file(job["output"]) for job in plain]
