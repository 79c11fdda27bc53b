"""The student's folder: an any-step pipeline with its own code, and one folded stock pipeline a number of steps."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers import DDIMPipeline, DDIMScheduler

from fmm_distill import __version__
from fmm_distill.checkpoint import writing
from fmm_distill.errors import UserError
from fmm_distill.student import fold

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fmm_distill.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["check_steps", "export_pipeline"]

# Equally named files of two students share one namespace in a process, so the names carry the version.
_SUFFIX = __version__.replace(".", "_")
PIPELINE_MODULE = f"flow_map_pipeline_{_SUFFIX}"
NETWORK_MODULE = f"two_time_{_SUFFIX}"


def check_steps(steps: Iterable[int], num_timesteps: int) -> None:
    """Refuse numbers of steps whose grid is not uniform in timesteps: the fold would not be exact."""
    wrong = [n for n in steps if n < 1 or num_timesteps % n]
    if wrong:
        raise UserError(
            f"export.steps {', '.join(map(str, wrong))}: wanted divisors of the teacher's {num_timesteps} timesteps "
            "(the any-step pipeline takes every number)"
        )


def export_pipeline(
    student: Student, teacher: Teacher, folder: Path | str, steps: Iterable[int] = (1, 2, 4, 8)
) -> Path:
    """Write the any-step pipeline and the folded ones ``steps-<n>/``; ``folder`` is replaced once all is written.

    ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` opens the first,
    ``DiffusionPipeline.from_pretrained(folder / "steps-4")`` a folded one.

    Raises:
        UserError: on a number of steps that does not divide the timesteps, a folder that holds something else, or a
            disk that is full.
    """
    folder, steps = Path(folder), tuple(steps)
    check_steps(steps, student.schedule.num_timesteps)
    if folder.exists() and not _is_export(folder):
        raise UserError(f"{folder} holds something else than an exported student; choose a folder that is not there")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(folder):
        try:
            partial.mkdir(parents=True)
            _write_any_step(student, teacher, partial)
            for n in steps:
                folded = DDIMPipeline(unet=fold(student.network, n), scheduler=_scheduler(student, teacher))
                folded.save_pretrained(partial / f"steps-{n}", safe_serialization=True)
            _swap(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _is_export(folder: Path) -> bool:
    index = folder / "model_index.json"
    return index.is_file() and "FlowMapPipeline" in index.read_text(encoding="utf-8")


def _swap(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _scheduler(student: Student, teacher: Teacher) -> DDIMScheduler:
    """The teacher's noise levels, read as the student's jumps: trailing grid, down to data, nothing clipped."""
    return DDIMScheduler.from_config(
        teacher.scheduler_config,
        prediction_type=student.prediction,
        timestep_spacing="trailing",
        clip_sample=False,
        thresholding=False,
        set_alpha_to_one=True,
    )


def _write_any_step(student: Student, teacher: Teacher, folder: Path) -> None:
    unet, scheduler = folder / "unet", folder / "scheduler"
    student.network.save_pretrained(unet, safe_serialization=True)
    _scheduler(student, teacher).save_pretrained(scheduler)
    package = files("fmm_distill")
    (folder / f"{PIPELINE_MODULE}.py").write_bytes((package / "export" / "pipeline.py").read_bytes())
    (unet / f"{NETWORK_MODULE}.py").write_bytes((package / "two_time.py").read_bytes())
    config = json.loads((unet / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModel": f"{NETWORK_MODULE}.TwoTimeUNet2DModel"}
    (unet / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = {
        "_class_name": [PIPELINE_MODULE, "FlowMapPipeline"],
        "_diffusers_version": config["_diffusers_version"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": [NETWORK_MODULE, "TwoTimeUNet2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
