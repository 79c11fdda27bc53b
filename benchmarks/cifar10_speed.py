"""How long a training step of a recipe takes, alone on its device."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

from fmm_distill.prepare import prepare_samples
from fmm_distill.run import plan
from fmm_distill.trainer import Trainer

if TYPE_CHECKING:
    from fmm_distill.recipe import Recipe

__all__ = ["seconds_a_step"]


def seconds_a_step(recipe: Recipe) -> float:
    """The median of the second half of the recipe's own steps, in the package's own loop."""
    precision = recipe.training.precision
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    job = plan(recipe, say=_silent)
    with tempfile.TemporaryDirectory() as folder:
        samples = prepare_samples(recipe, job.teacher, job.images, Path(folder), accelerator, _silent)
        Trainer(job.student, job.teacher, recipe, samples, Path(folder), accelerator, _silent).run()
        lines = (Path(folder) / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [recipe.training.batch_size / json.loads(line)["images_per_second"] for line in lines]
    return statistics.median(seconds[len(seconds) // 2 :])


def _silent(_: str) -> None:
    """The student's own run says it."""
