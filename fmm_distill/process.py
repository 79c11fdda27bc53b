"""The process that trains: its accelerator, its precision, and the processes launched with it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list

from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.sharding import check_sharding
from fmm_distill.tracking import check_trackers, tracker_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from fmm_distill.recipe import Recipe


__all__ = ["PATIENCE", "check_joined", "check_training", "make_accelerator", "on_first", "silent"]

# The first process evaluates and exports while the others wait for it; NCCL gives up after ten minutes by itself.
PATIENCE = timedelta(hours=12)


def check_training(recipe: Recipe) -> None:
    """Refuse settings of the training that this machine or this launch can't do."""
    training = recipe.training
    check_trackers(recipe)
    if training.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("training.precision: fp16 needs a GPU, there is none: take fp32 or bf16")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parts = processes * training.accumulation
    if training.batch_size % parts:
        raise UserError(
            f"training.batch_size {training.batch_size} does not split over {processes} processes "
            f"x {training.accumulation} accumulation steps: take a multiple of {parts}"
        )


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """The accelerator of a run in ``folder``, with the recipe's precision and trackers."""
    precision = recipe.training.precision
    check_training(recipe)
    wanted = {"fp32": "no"}.get(precision, precision)
    before = AcceleratorState._shared_state.get("_mixed_precision", wanted)
    if before != wanted:
        raise UserError(
            f"training.precision: {precision}, but this process has run in {before.replace('no', 'fp32')}, and "
            "accelerate keeps one precision a process: start another"
        )
    accelerator = Accelerator(
        mixed_precision=wanted,
        gradient_accumulation_steps=recipe.training.accumulation,
        log_with=list(recipe.logging.trackers) or None,
        project_config=ProjectConfiguration(str(folder), str(tracker_folder(folder))),
        # Before torch 2.11 a weight cast to half precision without gradients, for a jump to the start, stays in the
        # cache for the call that is to have them, and gets none (pytorch issue 112583).
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), AutocastKwargs(cache_enabled=False)],
    )
    check_sharding(accelerator, recipe.training, recipe.student.lora.rank)
    check_joined(accelerator)
    return accelerator


def check_joined(accelerator: Accelerator) -> None:
    """Refuse processes that were launched together and don't know of one another.

    Raises:
        UserError: with both numbers.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but accelerate joins {accelerator.num_processes}: on CPU set "
            "ACCELERATE_USE_CPU=true, so that they don't run side by side in one folder"
        )


def on_first(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do ``work`` in the first process while the others wait; what it raises ends all of them.

    Raises:
        UserError: in the other processes, with the first one's message.
    """
    failure: list[str | None] = ["the first process has failed"]
    try:
        if accelerator.is_main_process:
            work()
            failure = [None]
    except FmmDistillError as error:
        failure = [str(error)]
        raise
    finally:
        broadcast_object_list(failure)
    if failure[0] is not None:
        raise UserError(failure[0])


def silent(_: str) -> None:
    """Processes other than the first say nothing."""
