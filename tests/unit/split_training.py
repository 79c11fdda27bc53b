"""Run by ``test_trainer`` under torchrun: train on two processes, and compare one gradient with the whole batch's."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from fmm_distill.objective import Objective
from fmm_distill.recipe import Recipe
from fmm_distill.starts import draw
from fmm_distill.student import make_student
from fmm_distill.teachers.load import load_teacher
from fmm_distill.trainer import Trainer


def gradient(objective: torch.nn.Module, recipe: Recipe, rows: slice) -> dict[str, torch.Tensor]:
    draws = draw(9, 0, recipe.training.batch_size, (1, 8, 8)).part(rows.start, rows.stop, "cpu")
    objective(draws, None, 0)[0].mean().backward()
    return {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[2])
    folder.mkdir(exist_ok=True)
    accelerator = Accelerator(cpu=True)
    teacher = load_teacher(recipe.teacher)
    # Settings with exact derivatives, as the trainer settles on for this network.
    losses = [loss.model_copy(update={"derivative": "exact"}) for loss in recipe.losses]
    wrapped = accelerator.prepare(Objective(make_student(teacher), teacher, recipe, losses).eval())
    rank, half = accelerator.process_index, recipe.training.batch_size // 2
    mine = gradient(wrapped, recipe, slice(rank * half, (rank + 1) * half))
    whole = gradient(
        Objective(make_student(teacher), teacher, recipe, losses).eval(), recipe, slice(0, recipe.training.batch_size)
    )
    if rank == 0:
        folder.with_name("two-single").mkdir()
        save_file(mine, folder / "gradients.safetensors")
        save_file(whole, folder.with_name("two-single") / "gradients.safetensors")
        print("processes:", accelerator.num_processes)
    Trainer(make_student(teacher), teacher, recipe, None, folder, accelerator, lambda _: None).run()
    accelerator.end_training()
