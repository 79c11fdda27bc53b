"""How much memory a run takes, found without running it."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import torch

from fmm_distill.data import PickedImages
from fmm_distill.objective import Objective
from fmm_distill.starts import draw

if TYPE_CHECKING:
    from torch import Tensor

    from fmm_distill.flow_map import LearnedFlowMap
    from fmm_distill.recipe import Recipe
    from fmm_distill.teachers.base import Distillable

__all__ = ["activation_bytes", "peak_memory"]


def peak_memory(device: torch.device) -> int:
    """Bytes that the process has held at most: of the device's memory, on a CPU of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts it in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def activation_bytes(student: LearnedFlowMap, teacher: Distillable, recipe: Recipe) -> int:
    """Bytes that one sample's loss keeps for the backward pass, counted on one sample."""
    saved: dict[int, int] = {}
    sizes = {p.numel() for p in student.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        try:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        except (RuntimeError, NotImplementedError):
            # Forward mode hides the storage of some tensors, the weights among them: those are known by their size.
            if tensor.numel() not in sizes:
                saved[-len(saved) - 1] = tensor.numel() * tensor.element_size()
        return tensor

    draws = draw(0, 0, 1, teacher.event_shape)
    objective = Objective(student, teacher, recipe, recipe.losses, {"average": student, "frozen": student})
    last = recipe.student.regression_steps + recipe.training.steps - 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(draws, PickedImages(torch.zeros_like(draws.noise)), last)
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    return sum(size for pointer, size in saved.items() if pointer not in weights)
