"""Train some steps in a process of its own and print how much the process grew, in bytes.

``python -m tests.unit.measured_memory WARM TEACHER OUTPUT SETTINGS``: the folders of a small teacher and of the one
that is measured, a folder to write to, and the recipe's further settings as JSON. glibc has to hand freed blocks back
at once (``MALLOC_MMAP_THRESHOLD_``): what it keeps is no need of the step.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from fmm_distill.config.recipe import Recipe
from fmm_distill.run.plan import plan
from fmm_distill.training.memory import peak_memory
from fmm_distill.training.trainer import Trainer


def train(folder: str, settings: dict, output: Path) -> None:
    recipe = Recipe.model_validate(settings | {"teacher": folder})
    job = plan(recipe)
    output.mkdir()
    trainer = Trainer(job.student, job.teacher, recipe, None, output, Accelerator(cpu=True))
    # Not a part of a step, as little as the opening before.
    trainer.save_checkpoint = lambda step, hooks=None: None
    Path("/proc/self/clear_refs").write_text("5")
    trainer.run()


def held() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm, folder, output, settings = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
    # What libraries load when they are first used is there before.
    train(warm, settings, output / "warm")
    before = held()
    train(folder, settings, output / "measured")
    print(peak_memory(torch.device("cpu")) - before)
