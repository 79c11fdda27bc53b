"""Students whose weights change with the length h of the jump, ``W(h) = W + h dW``, and adapters of that form.

At h = 0 the network is the teacher, whatever dW has been trained to: ``u(x, t, t) = v(x, t)``, and ``u - v`` is of the
order of h. A jump of a fixed length is a stock network with the weights ``W + h dW``.

A teacher with guidance, or another prediction than the student's, differs from the network at h = 0. Then the weights
are ``W + G + h dW``: the regression trains G, and the losses after it train dW alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from fmm_distill.errors import UserError
from fmm_distill.student.own_network import TwoTimeNetwork
from fmm_distill.student.scaled_layers import can_be_scaled, scaled_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from fmm_distill.teachers.base import Teacher

__all__ = [
    "ScaledWeights",
    "freeze_base",
    "is_scaled",
    "ranks_of_layers",
    "scaled_ranks",
]


@dataclass(frozen=True)
class ScaledWeights:
    """Which changes of the weights a student has.

    Attributes:
        rank: of the changes; 0: any rank, biases included.
        targets: endings of the names of the layers that are changed; empty: every linear layer and convolution.
        diagonal: whether there is a change at h = 0 too, which a regression trains.
        layers: the names of the layers and the ranks of their changes; None: as ``rank`` and ``targets`` say.
    """

    rank: int = 0
    targets: tuple[str, ...] = ()
    diagonal: bool = False
    layers: Mapping[str, int] | None = None


def is_scaled(network: nn.Module) -> bool:
    """Return True if a network has layers whose weights change with the length of the jump."""
    return bool(scaled_layers(network))


def scaled_ranks(network: nn.Module) -> dict[str, int]:
    """Return the scaled layers of a network by name, with the ranks of their changes."""
    # A network that is no diffusers model is inside of the student's.
    inner = network.network if isinstance(network, TwoTimeNetwork) else network
    return {name: cast("Any", layer).jump_rank for name, layer in scaled_layers(inner).items()}


@torch.no_grad()
def ranks_of_layers(teacher: Teacher, scaled: ScaledWeights) -> dict[str, int]:
    """Return the layers of the teacher's network that can be scaled, by name, with the rank of their change.

    Layers that the network does not call have no gradient and are left out.

    Raises:
        UserError: if there is none.
    """
    if scaled.layers is not None:
        return dict(scaled.layers)
    network, called = teacher.network, set[str]()
    layers = {
        name: module
        for name, module in network.named_modules()
        if can_be_scaled(module, scaled.rank) and (not scaled.targets or name.endswith(scaled.targets))
    }
    hooks = [module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in layers.items()]
    device = next(network.parameters()).device
    cond = None if teacher.conditions is None else teacher.conditions.pick(torch.zeros(1)).to(device)
    # Any time at which the network is trained.
    t = torch.full((1,), teacher.schedule.t_max / 2, dtype=torch.float64, device=device)
    try:
        teacher.parametrization.velocity(network, torch.zeros(1, *teacher.event_shape, device=device), t, cond)
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        names = ", ".join(scaled.targets) or "any name"
        raise UserError(
            f"{teacher.source}: expected linear layers or convolutions of {type(network).__name__} for {names}, got "
            "none that the network calls; try other student.lora.targets, or student.kind: embedded"
        )
    # In the network's own order, which does not depend on the order of the calls.
    return {name: scaled.rank for name in layers if name in called}


def freeze_base(network: nn.Module, *, diagonal: bool) -> None:
    """Train the changes of the weights and jump embeddings alone.

    Args:
        diagonal: also train the weights of scaled layers of full rank, whose change at h = 0 this is.
    """
    network.requires_grad_(False)
    for layer in scaled_layers(network).values():
        for name, parameter in layer.named_parameters(recurse=False):
            own = name.startswith(("jump_", "diagonal_"))
            parameter.requires_grad_(own or (diagonal and not cast("Any", layer).jump_rank))
    cast("Any", network).jump_embedding.requires_grad_(True)
