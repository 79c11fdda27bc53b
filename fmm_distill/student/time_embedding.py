"""Where a network's time embedding ends: found by how its layers behave, not by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fmm_distill.teachers.base import Teacher

    Outputs = dict[str, list[Tensor]]

__all__ = ["find_jump_hosts"]


@torch.no_grad()
def find_jump_hosts(teacher: Teacher) -> dict[str, int]:
    """The layers that end the time embeddings of a teacher's network, by name, and how many features each gives.

    An embedding's end is the second linear layer, in the order of the call, whose output moves with the time and not
    with the sample. Where no linear layer does, the time is embedded by fixed functions alone, and their end is the
    last layer of any kind that does. With it stand the layers of the same name in repeated blocks, where every block
    embeds the time anew.

    Raises:
        UserError: if there is one such linear layer alone, or no such layer at all.
    """
    linear = _told(teacher, lambda module: isinstance(module, nn.Linear))
    told = linear or _told(teacher, lambda module: not any(module.children()))
    if not told or len(linear) == 1:
        raise UserError(
            f"{teacher.source}: no time embedding found in {type(teacher.network).__name__} (layers that move with the "
            f"time alone: {', '.join(told) or 'none'}); wanted two linear ones in a row to add the jump to, or none "
            "and a layer of another kind"
        )
    names = list(told)
    end = _place(names[1] if linear else names[-1])
    return {name: width for name, width in told.items() if _place(name) == end}


def _told(teacher: Teacher, of_kind: Callable[[nn.Module], bool]) -> dict[str, int]:
    """The layers of a kind, in the order of the call, that move with the time and not with the sample; their widths."""
    times, shape = torch.tensor([0.7, 0.55], dtype=torch.float64) * teacher.schedule.t_max, teacher.event_shape
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 1, *shape, generator=generator)
    device = next(teacher.network.parameters()).device
    runs = [
        _outputs(teacher, of_kind, x.to(device), t.to(device))
        for x, t in ((first, times[:1]), (first, times[1:]), (second, times[:1]))
    ]
    return {
        name: outputs[0].shape[-1]
        for name, outputs in runs[0].items()
        if _moves(runs[0], runs[1], name) and not _moves(runs[0], runs[2], name)
    }


def _outputs(teacher: Teacher, of_kind: Callable[[nn.Module], bool], x: Tensor, t: Tensor) -> Outputs:
    """What every layer of a kind gave, in the order of the first calls."""
    seen: Outputs = {}

    def keep(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor):
            seen.setdefault(name, []).append(output.clone())

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name, module in teacher.network.named_modules()
        if of_kind(module)
    ]
    cond = None if teacher.conditions is None else teacher.conditions.pick(torch.zeros(1)).to(x.device)
    try:
        teacher.parametrization.velocity(teacher.network, x, t, cond)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _moves(one: Outputs, other: Outputs, name: str) -> bool:
    pairs = zip(one[name], other.get(name, []), strict=False)
    return len(one[name]) != len(other.get(name, [])) or any(not torch.equal(a, b) for a, b in pairs)


def _place(name: str) -> str:
    """A layer's name without the number of its block; a number at the end is the layer's own."""
    parts = name.split(".")
    block = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return ".".join("*" if i == block else part for i, part in enumerate(parts))
