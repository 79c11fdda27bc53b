"""The changes of a scaled student of full rank as adapters of low rank, by singular value decomposition."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fmm_distill.errors import UserError
from fmm_distill.student.own_network import TwoTimeNetwork
from fmm_distill.student.scaled_layers import product_of, scaled_layers
from fmm_distill.student.stages import key_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fmm_distill.student.student import Student

__all__ = ["Extracted", "extract_adapters"]

# Up to this number of rows or columns a decomposition of a layer takes seconds in float64.
_EXACT_SIZE = 1024
# Of the randomized decomposition of larger layers (Halko et al. 2011, arXiv 0909.4061): more vectors than the rank, and
# power iterations, which separate the largest singular values from the others.
_MORE, _ITERATIONS = 16, 4


@dataclass(frozen=True)
class Extracted:
    """The adapters of low rank that are closest to a student's changes, layer by layer.

    Attributes:
        rank: of the adapters; layers with fewer rows or columns have zeros in the others.
        adapters: by name, as ``adapter_states`` returns them.
        errors: by the name of the adapter, the Frobenius norm of what is lost of the weights as a fraction of the
            norm of the change.
        student: the student with the adapters' changes in place of its own, without changes of biases.
        without_biases: the student with its own changes of the weights, without changes of biases.
    """

    rank: int
    adapters: dict[str, dict[str, Tensor]]
    errors: dict[str, float]
    student: Student
    without_biases: Student


@torch.no_grad()
def extract_adapters(student: Student, teacher: nn.Module | None, rank: int, component: str) -> Extracted:
    """Return the changes of a student of full rank as adapters. ``student`` is multiplied by the length of the jump.

    Args:
        teacher: the teacher's network, from which the student's weights at h = 0 differ by the change ``guidance``;
            None: they are the teacher's.
        component: the name of the network in its pipeline.

    Raises:
        UserError: if the student is no scaled one of full rank, or does not start from its teacher's network.
    """
    layers = _layers_of(student)
    if student.started_from is not None:
        raise UserError(
            "export.lora_rank: expected a student that starts from its teacher's network, got one that starts from "
            f"{student.started_from}; leave it out"
        )
    if not layers or any(cast("Any", layer).jump_rank for layer in layers.values()):
        raise UserError(
            "export.lora_rank: expected a scaled student of full rank (student.kind: scaled, student.lora.rank: 0), "
            f"got {'one with adapters' if layers else 'an embedded one'}; leave it out"
        )
    plain = _copy_of(student, ("jump_bias", "bias"))
    low = _copy_of(student, ("jump_weight", "jump_bias", "bias", *(("weight",) if teacher is not None else ())))
    lost = _Losses(rank, partial(key_of, student.network, component))
    for name, layer in layers.items():
        base = None if teacher is None else teacher.get_submodule(name)
        for target in (low, plain):
            _without_bias(_layers_of(target)[name], base)
        approximate = cast("Any", _layers_of(low)[name])
        change = cast("Any", layer).jump_weight
        approximate.jump_weight.copy_(lost.approximated("student", name, layer, change))
        if base is not None:
            own = cast("Any", base).weight.to(change)
            difference = cast("Any", layer).weight - own
            approximate.weight.copy_(own + lost.approximated("guidance", name, layer, difference))
    if not lost.sizes.get("guidance"):
        lost.adapters.pop("guidance", None)
    errors = {key: (lost.squares[key] / lost.sizes[key]) ** 0.5 if lost.sizes[key] else 0.0 for key in lost.adapters}
    return Extracted(rank, lost.adapters, errors, low, plain)


def _layers_of(student: Student) -> dict[str, nn.Module]:
    # A network that is no diffusers model is inside of the student's.
    network = student.network
    return scaled_layers(network.network if isinstance(network, TwoTimeNetwork) else network)


def _copy_of(student: Student, changed: tuple[str, ...]) -> Student:
    """Return a copy that shares all parameters but those of these names with the student."""
    named = student.named_parameters()
    shared = [value for name, value in named if name.rpartition(".")[2] not in changed]
    # deepcopy takes the objects in its memo as already copied.
    return copy.deepcopy(student, {id(value): value for value in (*shared, *student.buffers())})


def _without_bias(layer: nn.Module, base: nn.Module | None) -> None:
    scaled = cast("Any", layer)
    if hasattr(scaled, "jump_bias"):
        scaled.jump_bias.zero_()
    if base is not None and scaled.bias is not None:
        scaled.bias.copy_(cast("Any", base).bias)


class _Losses:
    """The adapters that are made so far, with the squares of the norms of the changes and of what is lost of them."""

    def __init__(self, rank: int, key: Callable[[str], str]) -> None:
        self.rank, self.key = rank, key
        self.adapters: dict[str, dict[str, Tensor]] = {}
        self.squares: dict[str, float] = {}
        self.sizes: dict[str, float] = {}

    def approximated(self, adapter: str, name: str, layer: nn.Module, change: Tensor) -> Tensor:
        """Add a layer's change to an adapter, and return what the adapter has of it."""
        made = torch.zeros_like(change)
        tensors = self.adapters.setdefault(adapter, {})
        # Adapters of a grouped convolution have no form that other tools read.
        if _has_adapter(layer):
            first, second = _factors(change, self.rank)
            key = self.key(name)
            tensors |= {f"{key}.lora_A.weight": first.contiguous(), f"{key}.lora_B.weight": second.contiguous()}
            made = product_of(first, second).to(change)
        self.squares[adapter] = self.squares.get(adapter, 0.0) + float((change - made).double().square().sum())
        self.sizes[adapter] = self.sizes.get(adapter, 0.0) + float(change.double().square().sum())
        return made


def _has_adapter(layer: nn.Module) -> bool:
    """Return whether a scaled layer has adapters that other tools read."""
    return not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or layer.groups == 1


def _factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the two factors of the closest weight of a rank, in the shapes of adapters."""
    matrix = change.detach().cpu().flatten(1)
    if min(matrix.shape) <= max(_EXACT_SIZE, rank + _MORE):
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix.float(), rank + _MORE, _ITERATIONS)
        right = right.T
    count = min(rank, len(values))
    # Both factors have the same size, which rounds least in half precision.
    roots = values[:count].sqrt()
    first, second = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(len(matrix), rank)
    # One rank for all layers: tools take the scale of an adapter from the rank of its first layer.
    first[:count], second[:, :count] = (roots[:, None] * right[:count]).float(), (left[:, :count] * roots).float()
    return first.reshape(rank, *change.shape[1:]), second.reshape(len(second), rank, *(1 for _ in change.shape[2:]))
