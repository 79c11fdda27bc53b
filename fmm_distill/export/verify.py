"""After each export: the folders are opened by stock diffusers, without this package, and their images compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file

from fmm_distill.checkpoint import write_text
from fmm_distill.errors import FmmDistillError
from fmm_distill.export.folded import jump_scheduler, stock_times
from fmm_distill.export.stock import any_step_times, folded_network, start_of, verification_call
from fmm_distill.sampling import sample

if TYPE_CHECKING:
    from fmm_distill.student import Student
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.conditions import Conditions
    from fmm_distill.velocity import Conditioning

__all__ = ["TOLERANCE", "verify"]

TOLERANCE = 1e-4
SEED, BATCH = 5, 8


def verify(student: Student, teacher: Teacher, folder: Path, steps: tuple[int, ...]) -> dict[str, float]:
    """Largest difference of a pixel (range 0 to 1) between the reloaded pipelines and this package's sampler.

    A folded pipeline is compared on the times that its stock scheduler takes.

    Kept in ``verification.json`` in the folder. Keys are ``any-<n>`` and ``folded-<n>``.

    Raises:
        FmmDistillError: if a pipeline does not open or differs by more than ``TOLERANCE``.
    """
    student = student.to("cpu")
    compare = _differences if teacher.folder is None else _stock_differences
    # Without folded pipelines the any-step one is still looked at.
    differences = compare(student, teacher, folder, steps or (4,))
    report = {"tolerance": TOLERANCE, "largest_pixel_difference": differences}
    write_text(folder / "verification.json", json.dumps(report, indent=2) + "\n")
    wrong = {key: value for key, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        raise FmmDistillError(f"{folder}: reloaded pipelines differ from the student by {wrong}, above {TOLERANCE}")
    return differences


def _differences(student: Student, teacher: Teacher, folder: Path, steps: tuple[int, ...]) -> dict[str, float]:
    """Of the pipelines that start from a count of images."""
    generator = torch.Generator().manual_seed(SEED)
    noise = randn_tensor((BATCH, *teacher.event_shape), generator=generator, dtype=torch.float32)
    call: dict[str, Any] = {"batch_size": BATCH, "output_type": "np"}
    cond = None
    if teacher.conditions is not None:
        call["class_labels"], cond = _first_conditions(teacher)
    differences = {}
    for key, made in _reload(folder, call, steps).items():
        kind, n = key.split("-")
        times = stock_times(student, jump_scheduler(student, teacher, int(n)), int(n)) if kind == "folded" else int(n)
        own = teacher.codec.decode(sample(student, noise, times, cond))
        differences[key] = ((own / 2 + 0.5).clamp(0, 1).movedim(1, -1) - made).abs().max().item()
    return differences


def _first_conditions(teacher: Teacher) -> tuple[list[int], Conditioning]:
    """``BATCH`` conditions by their number, from the first on, and what the network is told of them."""
    conditions = cast("Conditions", teacher.conditions)
    count = len(conditions.names)
    numbers = [i % count for i in range(BATCH)]
    return numbers, conditions.pick((torch.tensor(numbers, dtype=torch.float64) + 0.5) / count)


def _stock_differences(student: Student, teacher: Teacher, folder: Path, steps: tuple[int, ...]) -> dict[str, float]:
    """Of the pipelines that are copies of the teacher's: of their last latents, relative to the largest, or of images."""
    call = verification_call(teacher, BATCH)
    noise, (_, cond) = start_of(teacher, call, SEED), _first_conditions(teacher)
    differences = {}
    for key, made in _reload(folder, call, steps).items():
        kind, n = key.split("-")
        times = folded_network(student, teacher, int(n))[2] if kind == "folded" else any_step_times(student, teacher, int(n))
        own = sample(student, noise, times, cond)
        if call["output_type"] == "np":
            own = (teacher.codec.decode(own) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
        size = 1.0 if call["output_type"] == "np" else own.abs().max().clamp_min(1)
        differences[key] = float((own.reshape(made.shape) - made).abs().max() / size)
    return differences


def _reload(folder: Path, call: dict[str, Any], steps: tuple[int, ...]) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        output, keywords = Path(scratch) / "images.safetensors", Path(scratch) / "call.json"
        keywords.write_text(json.dumps(call), encoding="utf-8")
        script = str(files("fmm_distill") / "export" / "reload.py")
        command = [sys.executable, "-P", script, str(folder.resolve()), str(SEED), str(keywords), str(output)]
        environment = os.environ | {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(
            [*command, *map(str, steps)], env=environment, cwd=scratch, capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise FmmDistillError(f"{folder}: stock diffusers does not open the export:\n{run.stderr}")
        return load_file(output)
