"""Students whose weights change with the length h of the jump, ``W(h) = W + h dW``, and adapters of that form.

At h = 0 the network is the teacher, whatever dW has been trained to: ``u(x, t, t) = v(x, t)``, and ``u - v`` is of the
order of h. A jump of a fixed length is a stock network with the weights ``W + h dW``.

A teacher with guidance, or another prediction than the student's, differs from the network at h = 0. Then the weights
are ``W + G + h dW``: the regression trains G, and the losses after it train dW alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from fmm_distill.errors import UserError
from fmm_distill.student.own_network import TwoTimeNetwork
from fmm_distill.student.scaled_layers import can_be_scaled, scaled_layers
from fmm_distill.student.stages import jump_embeddings
from fmm_distill.teachers.conditions import Embeddings
from fmm_distill.teachers.prompted.call import RecordedCall

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.conditions import Conditions

__all__ = [
    "ScaledWeights",
    "freeze_base",
    "is_scaled",
    "ranks_of_layers",
    "scaled_ranks",
]

logger = logging.getLogger(__name__)

# Of the rows of a batch and those of its samples, as a fraction of the largest number: that of half precision.
_ROUNDING = 1e-2


@dataclass(frozen=True)
class ScaledWeights:
    """The changes of the weights of a student.

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

    Layers that the network does not call have no gradient and are left out. So are layers whose rows are not grouped by
    sample, since the length of a row's jump would be unknown.

    Raises:
        UserError: if there is none.
    """
    if scaled.layers is not None:
        return dict(scaled.layers)
    network = teacher.network
    layers = {
        name: module
        for name, module in network.named_modules()
        if can_be_scaled(module, scaled.rank) and (not scaled.targets or name.endswith(scaled.targets))
    }
    alone, pair = (_inputs_of_layers(teacher, layers, samples) for samples in (1, 2))
    # In the network's own order, which does not depend on the order of the calls.
    called = [name for name in layers if name in alone]
    call = teacher.parametrization.call
    # Of a network that is called for one sample at a time, every row is that sample's.
    single = isinstance(call, RecordedCall) and call.layout.takes_one
    ordered = [name for name in called if single or _is_grouped(alone[name], pair.get(name, []))]
    if not ordered:
        names = ", ".join(scaled.targets) or "any name"
        kind = "calls with rows that are grouped by sample" if called else "calls"
        raise UserError(
            f"{teacher.source}: expected linear layers or convolutions of {type(network).__name__} for {names}, got "
            f"none that the network {kind}; try other student.lora.targets, or student.kind: embedded"
        )
    if left := [name for name in called if name not in ordered]:
        logger.warning(
            f"{', '.join(left[:4])}{', ...' if len(left) > 4 else ''}: {len(left)} of {len(called)} layers do not "
            "change with the length of the jump, since their rows are not grouped by sample"
        )
    return dict.fromkeys(ordered, scaled.rank)


def _inputs_of_layers(teacher: Teacher, layers: Mapping[str, nn.Module], samples: int) -> dict[str, list[Tensor]]:
    """Return a number for each row of a layer's input, one tensor per call, of the first one or two of two samples."""
    numbers: dict[str, list[Tensor]] = {}

    def record(name: str, x: Tensor) -> None:
        rows = x.flatten(1).float() if x.ndim > 1 else x[:, None].float()
        # Any weights that are not equal. A number per row, since the inputs of all layers together may be large.
        weights = torch.arange(1, rows.shape[1] + 1, device=x.device).cos()
        numbers.setdefault(name, []).append(rows @ weights)

    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, keywords, name=name: record(name, next(iter((*args, *keywords.values())))), with_kwargs=True
        )
        for name, module in layers.items()
    ]
    device = next(teacher.network.parameters()).device
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0)).to(device)
    # Any two times inside of the range.
    t = torch.tensor([0.55, 0.7], dtype=torch.float64, device=device) * teacher.schedule.t_max
    cond = _two_conditions(teacher.conditions)
    cond = None if cond is None else cond.part(0, samples).to(device)
    try:
        teacher.parametrization.velocity(teacher.network, x[:samples], t[:samples], cond)
    finally:
        for hook in hooks:
            hook.remove()
    return numbers


def _two_conditions(conditions: Conditions | None) -> Conditioning | None:
    """Return two conditions, of the largest and of the smallest size where sizes differ."""
    if not isinstance(conditions, Embeddings):
        return None if conditions is None else conditions.pick(torch.tensor([0.0, 0.99]))
    ends = torch.tensor([0, len(conditions.names) - 1])
    for rows in conditions.prompts.inputs.values():
        # Lengths of prompts, or masks. Some networks join prompts of different lengths to one list of tokens. The
        # longest is the first, since the others are padded to it.
        if rows.ndim == 1 or (rows.ndim == 2 and bool(((rows == 0) | (rows == 1)).all())):
            sizes = rows.reshape(len(rows), -1).sum(1)
            ends = torch.stack([sizes.argmax(), sizes.argmin()])
    return conditions.prompts.rows(ends)


def _is_grouped(alone: list[Tensor], pair: list[Tensor]) -> bool:
    """Return whether the rows of two samples are those of the first, then equally many of the second."""
    if [2 * len(one) for one in alone] != [len(both) for both in pair]:
        return False
    # Kernels for batches of other sizes sum in another order.
    return all(
        torch.allclose(both[: len(one)], one, rtol=_ROUNDING, atol=_ROUNDING * float(one.abs().max()))
        for one, both in zip(alone, pair, strict=True)
    )


def freeze_base(network: nn.Module, *, diagonal: bool) -> None:
    """Train the changes of the weights and jump embeddings alone.

    Args:
        diagonal: also train the weights of scaled layers of full rank, whose change at h = 0 this is.
    """
    network.requires_grad_(False)
    for layer in scaled_layers(network).values():
        # A parametrized weight is a parameter of a module below the layer.
        for name, parameter in layer.named_parameters():
            own = name.startswith(("jump_", "diagonal_"))
            parameter.requires_grad_(own or (diagonal and not cast("Any", layer).jump_rank))
    for embedding in jump_embeddings(network):
        embedding.requires_grad_(True)
