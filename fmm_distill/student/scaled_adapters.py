"""The network that a scaled student shares with its teacher, and its changes as merged weights and as adapters."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fmm_distill.core.staged import stages_of
from fmm_distill.student.scaled_layers import product_of, scaled_layers
from fmm_distill.student.shared_network import SharedNetwork
from fmm_distill.student.stages import key_of
from fmm_distill.teachers.codec import PipelineCodec

if TYPE_CHECKING:
    from torch import Tensor

    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["adapter_states", "merge_diagonal", "share_network", "stock_network", "without_changes"]


def stock_network(teacher: Teacher) -> nn.Module:
    """Return the teacher's network as a pipeline takes it: a student's own, which without a jump is the teacher's."""
    network = teacher.network
    # A network with peft's adapters is the teacher's only while these are disabled.
    return network.shared if type(network) is SharedNetwork else network


def share_network(student: Student, teacher: Teacher) -> Teacher:
    """Return the teacher on the student's network, which is the teacher's without a jump."""
    codec = copy.copy(teacher.codec)
    if isinstance(codec, PipelineCodec):
        codec.network = student.network
        # An open pipeline holds the teacher's first network, which would stay in memory.
        codec.release()
    return replace(teacher, network=SharedNetwork(student.network).eval(), codec=codec)


def without_changes(network: nn.Module) -> nn.Module:
    """Return a copy of a scaled network without the changes of its weights: its teacher's network."""
    layers = scaled_layers(network)
    changes = {
        id(parameter): parameter
        for layer in layers.values()
        for name, parameter in layer.named_parameters(recurse=False)
        if name.startswith("jump_")
    }
    # The changes are as large as the weights: they are shared, and not copied to be deleted.
    plain = copy.deepcopy(network, dict(changes))
    for layer in scaled_layers(plain).values():
        for name in [name for name, _ in layer.named_parameters(recurse=False) if name.startswith("jump_")]:
            delattr(layer, name)
        layer.__class__ = type(layer).__bases__[-1]
    return plain


@torch.no_grad()
def merge_diagonal(student: Student) -> Student:
    """Return the student with G added to its weights; the student itself if it has no G."""
    network = student.network
    if not any(hasattr(layer, "diagonal_A") for layer in scaled_layers(network).values()):
        return student
    # A copy: an export also saves the adapters, which the student itself still has.
    plain = copy.deepcopy(student)
    for module in scaled_layers(plain.network).values():
        layer = cast("Any", module)
        layer.weight.add_(product_of(layer.diagonal_A, layer.diagonal_B).to(layer.weight))
        del layer.diagonal_A, layer.diagonal_B
    for part in stages_of(plain.network):
        if hasattr(part, "register_to_config"):
            cast("Any", part).register_to_config(diagonal=False)
    return plain


def adapter_states(student: Student, component: str) -> dict[str, dict[str, Tensor]]:
    """Return the adapters of a student of low rank under the names that diffusers loads, by the adapter's name.

    ``student`` is multiplied by the length of the jump, ``guidance`` is not.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in student.network.state_dict().items():
        layer, _, last = name.rpartition(".")
        kind, _, factor = last.partition("_")
        if last in ("jump_A", "jump_B", "diagonal_A", "diagonal_B"):
            adapter = {"jump": "student", "diagonal": "guidance"}[kind]
            key = key_of(student.network, component, f"{layer}.lora_{factor}.weight")
            found.setdefault(adapter, {})[key] = value.detach().cpu().contiguous()
    return found
