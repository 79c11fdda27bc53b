"""Run by ``test_watching`` under torchrun: the same training twice, alone and measured on the way.

python watched_training.py RECIPE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from fmm_distill.config.recipe import load_recipe
from fmm_distill.evaluation.monitor import Monitor
from fmm_distill.run.plan import plan
from fmm_distill.training.trainer import Trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    for name, every in (("alone", 0), ("watched", 5)):
        recipe = load_recipe(sys.argv[1], [f"evaluation.every={every}"])
        folder = Path(sys.argv[2]) / name
        folder.mkdir(exist_ok=True)
        job = plan(recipe)
        trainer = Trainer(job.student, job.teacher, recipe, None, folder, accelerator)
        average = trainer.averaged_student(recipe.training.ema[0])
        trainer.run(
            evaluate=Monitor(lambda average=average: average, job.teacher, recipe, None, folder, accelerator).reached
        )
    if accelerator.is_main_process:
        print("processes:", accelerator.num_processes)
    accelerator.end_training()
