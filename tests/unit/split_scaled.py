"""Run by ``test_scaled_runs`` on two processes: train students whose weights change with the length of the jump.

split_scaled.py RECIPES.json FOLDER [shard]

A run a recipe in FOLDER/<number>.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from fmm_distill.config.recipe import Recipe
from fmm_distill.run.plan import plan
from fmm_distill.training.process import make_accelerator
from fmm_distill.training.trainer import Trainer
from tests.unit.split_training import split_weights

if __name__ == "__main__":
    torch.set_num_threads(1)
    shards = sys.argv[3:] == ["shard"]
    for number, settings in json.loads(Path(sys.argv[1]).read_text()).items():
        recipe, folder = Recipe.model_validate(settings), Path(sys.argv[2]) / number
        folder.mkdir(exist_ok=True, parents=True)
        if shards:
            accelerator = Accelerator(cpu=True)
            split_weights(accelerator, ["ResnetBlock2D"])
        else:
            accelerator = make_accelerator(recipe, folder)
        job = plan(recipe)
        own = {id(p) for p in job.student.parameters()}
        trainer = Trainer(job.student, job.teacher, recipe, None, folder, accelerator)
        trainer.run()
        assert all(isinstance(p, DTensor) == shards for p in trainer.objective.parameters())
        if shards and accelerator.is_main_process:
            # A weight that the evaluated copy shared would follow it to its device.
            assert not own & {id(p) for p in trainer.plain.parameters()}
        accelerator.free_memory()
    if accelerator.is_main_process:
        print(json.dumps({"processes": accelerator.num_processes}))
    accelerator.end_training()
