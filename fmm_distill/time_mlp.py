"""Where a network's time embedding ends: found by how its layers behave, not by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fmm_distill.teachers.base import Teacher

__all__ = ["find_time_mlps"]


@torch.no_grad()
def find_time_mlps(teacher: Teacher) -> list[str]:
    """Names of the linear layers that end the time embeddings of a teacher's network.

    An embedding's end is the second linear layer, in the order of the call, whose output moves with the time and not
    with the sample; with it stand the layers of the same name in repeated blocks, where every block embeds the time
    anew.

    Raises:
        UserError: if no two such layers are found.
    """
    times, shape = torch.tensor([0.7, 0.55], dtype=torch.float64) * teacher.schedule.t_max, teacher.event_shape
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 1, *shape, generator=generator)
    device = next(teacher.network.parameters()).device
    runs = [
        _outputs(teacher, x.to(device), t.to(device))
        for x, t in ((first, times[:1]), (first, times[1:]), (second, times[:1]))
    ]
    told = [name for name in runs[0] if _moves(runs[0], runs[1], name) and not _moves(runs[0], runs[2], name)]
    if len(told) < 2:
        raise UserError(
            f"{teacher.source}: no time embedding found in {type(teacher.network).__name__} (linear layers that move "
            f"with the time alone: {', '.join(told) or 'none'}); wanted two such layers in a row to add the jump to"
        )
    return [name for name in told if _place(name) == _place(told[1])]


def _outputs(teacher: Teacher, x: Tensor, t: Tensor) -> dict[str, list[Tensor]]:
    """What every linear layer gave, in the order of the first calls."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.setdefault(name, []).append(output.clone()))
        for name, module in teacher.network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    cond = None if teacher.conditions is None else teacher.conditions.pick(torch.zeros(1)).to(x.device)
    try:
        teacher.parametrisation.velocity(teacher.network, x, t, cond)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _moves(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]], name: str) -> bool:
    pairs = zip(one[name], other.get(name, []), strict=False)
    return len(one[name]) != len(other.get(name, [])) or any(not torch.equal(a, b) for a, b in pairs)


def _place(name: str) -> str:
    """A layer's name without the number of its block; a number at the end is the layer's own."""
    parts = name.split(".")
    block = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return ".".join("*" if i == block else part for i, part in enumerate(parts))
