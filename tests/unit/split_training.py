"""Run by ``test_split`` on two processes: train, and compare each first gradient with that of the complete batch.

split_training.py RECIPES.json FOLDER gradients|train|shard

"train": a run a recipe in FOLDER/<number>; "shard": with the student split over the processes; "gradients": the printed
line has the largest relative difference of the gradients of each recipe.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from fmm_distill.config.recipe import Recipe
from fmm_distill.core.draws import draw
from fmm_distill.data.samples import Images
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training.fsdp import check_sharding, gather_in_float32
from fmm_distill.training.objective import Objective
from fmm_distill.training.trainer import Trainer


def images_of(recipe: Recipe) -> Images | None:
    if not recipe.data.has_images:
        return None
    return Images(torch.arange(10 * 64).reshape(10, 1, 8, 8).remainder(251).byte(), "numbers")


def gradient(objective: torch.nn.Module, recipe: Recipe, rows: slice) -> torch.Tensor:
    draws = draw(9, 0, recipe.training.batch_size, (1, 8, 8)).part(rows.start, rows.stop, "cpu")
    data = images_of(recipe)
    objective(draws, None if data is None else data.pick(draws), 0)[1].mean().backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


def difference(recipe: Recipe, accelerator: Accelerator) -> float:
    """Between the gradient of two halves of a batch and that of the whole; relative to the largest entry."""
    teacher = load_teacher(recipe.teacher)
    # Exact derivatives: a difference's rounding is not what is compared here.
    losses = [
        loss.model_copy(update={"derivative": "exact"}) if hasattr(loss, "derivative") else loss
        for loss in recipe.losses
    ]

    def objective() -> Objective:
        copies = {name: Student.from_teacher(teacher).requires_grad_(False).eval() for name in ("average", "frozen")}
        return Objective(Student.from_teacher(teacher), teacher, recipe, losses, copies).eval()

    rank, half = accelerator.process_index, recipe.training.batch_size // 2
    mine = gradient(accelerator.prepare(objective()), recipe, slice(rank * half, (rank + 1) * half))
    whole = gradient(objective(), recipe, slice(0, recipe.training.batch_size))
    return float((mine - whole).abs().max() / whole.abs().max())


def split_weights(accelerator: Accelerator, blocks: list[str]) -> None:
    """What accelerate does as it starts on GPUs that are set up for FSDP2; on CPUs it leaves that out alone."""
    wrap = "TRANSFORMER_BASED_WRAP" if blocks else "NO_WRAP"
    # Weights sent by the first process are what `accelerate launch` asks for unless it is told otherwise.
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=wrap,
        transformer_cls_names_to_wrap=blocks or None,
        cpu_ram_efficient_loading=bool(blocks),
    )
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    check_sharding(accelerator, Recipe())
    gather_in_float32(accelerator)


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    how = sys.argv[3]
    shards = how == "shard"
    differences = []
    for number, settings in json.loads(Path(sys.argv[1]).read_text()).items():
        recipe, folder = Recipe.model_validate(settings), Path(sys.argv[2]) / number
        folder.mkdir(exist_ok=True, parents=True)
        if how == "gradients":
            differences.append(difference(recipe, accelerator))
            accelerator.free_memory()
            continue
        if shards:
            split_weights(accelerator, ["ResnetBlock2D"] if int(number) % 2 else [])
        teacher = load_teacher(recipe.teacher)
        student, data = Student.from_teacher(teacher), images_of(recipe)
        trainer = Trainer(student, teacher, recipe, data, folder, accelerator)
        trainer.run()
        assert all(isinstance(p, DTensor) == shards for p in trainer.objective.parameters())
        # The next one is not to be compared with it.
        accelerator.free_memory()
    if accelerator.is_main_process:
        print(json.dumps({"processes": accelerator.num_processes, "differences": differences}))
    accelerator.end_training()
