"""After each export: the folders are opened by stock diffusers, without this package, and their images compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file

from fmm_distill.checkpoint import write_text
from fmm_distill.errors import FmmDistillError
from fmm_distill.sampling import sample

if TYPE_CHECKING:
    from fmm_distill.student import Student

__all__ = ["TOLERANCE", "verify"]

TOLERANCE = 1e-4
SEED, BATCH = 5, 8


def verify(student: Student, folder: Path, steps: tuple[int, ...]) -> dict[str, float]:
    """Largest difference of a pixel (range 0 to 1) between the reloaded pipelines and this package's sampler.

    Kept in ``verification.json`` in the folder. Keys are ``any-<n>`` and ``folded-<n>``.

    Raises:
        FmmDistillError: if a pipeline does not open or differs by more than ``TOLERANCE``.
    """
    student = student.to("cpu")
    noise = randn_tensor(
        (BATCH, *_event_shape(student)), generator=torch.Generator().manual_seed(SEED), dtype=torch.float32
    )
    # Without folded pipelines the any-step one is still looked at.
    images = _reload(folder, steps or (4,))
    differences = {}
    for key, made in images.items():
        own = (sample(student, noise, int(key.split("-")[1])) / 2 + 0.5).clamp(0, 1)
        differences[key] = (own - made).abs().max().item()
    report = {"tolerance": TOLERANCE, "largest_pixel_difference": differences}
    write_text(folder / "verification.json", json.dumps(report, indent=2) + "\n")
    wrong = {key: value for key, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        raise FmmDistillError(f"{folder}: reloaded pipelines differ from the student by {wrong}, above {TOLERANCE}")
    return differences


def _event_shape(student: Student) -> tuple[int, ...]:
    config = student.network.config
    size = config.sample_size
    return (config.in_channels, *((size, size) if isinstance(size, int) else size))


def _reload(folder: Path, steps: tuple[int, ...]) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "images.safetensors"
        script = str(files("fmm_distill") / "export" / "reload.py")
        command = [sys.executable, "-P", script, str(folder.resolve()), str(SEED), str(BATCH), str(output)]
        environment = os.environ | {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(
            [*command, *map(str, steps)], env=environment, cwd=scratch, capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise FmmDistillError(f"{folder}: stock diffusers does not open the export:\n{run.stderr}")
        return load_file(output)
