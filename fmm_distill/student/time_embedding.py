"""Find the end of a network's time embedding by the behavior of its layers, not by their names."""

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
    """Return the last layers of the time embeddings of a teacher's network, by name, with their numbers of features.

    The last layer of an embedding is the second linear layer, in the order of the call, whose output depends on the
    time and not on the sample. If no linear layer has such an output, fixed functions embed the time, and the last
    layer of any kind with such an output ends the embedding. The result includes the layers of the same name in
    repeated blocks, since some networks embed the time in every block.

    Raises:
        UserError: if exactly one linear layer has such an output, or no layer at all.
    """
    linear = _time_only_layers(teacher, lambda module: isinstance(module, nn.Linear))
    layers = linear or _time_only_layers(teacher, lambda module: not any(module.children()))
    if not layers or len(linear) == 1:
        raise UserError(
            f"{teacher.source}: no time embedding found in {type(teacher.network).__name__}: expected two linear "
            "layers whose outputs depend on the time alone, or none and a layer of another kind, got "
            f"{', '.join(layers) or 'none'}"
        )
    names = list(layers)
    end = _without_block_number(names[1] if linear else names[-1])
    return {name: width for name, width in layers.items() if _without_block_number(name) == end}


def _time_only_layers(teacher: Teacher, of_kind: Callable[[nn.Module], bool]) -> dict[str, int]:
    """Return the widths of the layers whose output depends on the time and not on the sample, in call order."""
    # Any two times inside of the range would do; at its ends the time axis has rules of its own.
    times, shape = torch.tensor([0.7, 0.55], dtype=torch.float64) * teacher.schedule.t_max, teacher.event_shape
    generator = torch.Generator().manual_seed(0)
    # Random samples: with zeros, a layer after a product with the sample would look independent of it.
    first, second = torch.randn(2, 1, *shape, generator=generator)
    device = next(teacher.network.parameters()).device
    runs = [
        _outputs(teacher, of_kind, x.to(device), t.to(device))
        for x, t in ((first, times[:1]), (first, times[1:]), (second, times[:1]))
    ]
    return {
        name: outputs[0].shape[-1]
        for name, outputs in runs[0].items()
        if _differs(runs[0], runs[1], name) and not _differs(runs[0], runs[2], name)
    }


def _outputs(teacher: Teacher, of_kind: Callable[[nn.Module], bool], x: Tensor, t: Tensor) -> Outputs:
    """Return the outputs of every layer of a kind, in the order of the first calls."""
    outputs: Outputs = {}

    def record(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor):
            # A copy, since a later layer may change the output in place.
            outputs.setdefault(name, []).append(output.clone())

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: record(name, output))
        for name, module in teacher.network.named_modules()
        if of_kind(module)
    ]
    # One condition for all calls, so that its embedding does not look like one of the time.
    cond = None if teacher.conditions is None else teacher.conditions.pick(torch.zeros(1)).to(x.device)
    try:
        teacher.parametrization.velocity(teacher.network, x, t, cond)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def _differs(one: Outputs, other: Outputs, name: str) -> bool:
    # To the last bit: the calls run the same code on one sample each, so only a dependence can change a value.
    pairs = zip(one[name], other.get(name, []), strict=False)
    return len(one[name]) != len(other.get(name, [])) or any(not torch.equal(a, b) for a, b in pairs)


def _without_block_number(name: str) -> str:
    """Return a layer's name with ``*`` for the number of its block; a number at the end is the layer's own."""
    parts = name.split(".")
    block = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return ".".join("*" if i == block else part for i, part in enumerate(parts))
