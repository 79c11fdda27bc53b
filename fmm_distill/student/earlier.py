"""The weights of an earlier student as the start of another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from fmm_distill.errors import UserError
from fmm_distill.student.scaled_layers import scaled_layers
from fmm_distill.student.student import is_new

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from fmm_distill.student.student import Student

__all__ = ["Form", "form_of", "load_earlier", "same_base"]

_ADAPTERS = (".lora_A.", ".lora_B.")


@dataclass(frozen=True)
class Form:
    """The kind of a student and the rank of what was trained; 0: full rank."""

    kind: Literal["scaled", "embedded"]
    rank: int

    def __str__(self) -> str:
        return f"a student of kind {self.kind}, {f'rank {self.rank}' if self.rank else 'full rank'}"


def form_of(weights: Mapping[str, Tensor]) -> Form:
    """Return the form of a student by the names of its network's weights."""
    scaled: int | None = None
    adapters = 0
    for name, value in weights.items():
        last = name.rpartition(".")[2]
        if last in ("jump_A", "jump_weight"):
            scaled = len(value) if last == "jump_A" else 0
        elif ".lora_A." in name:
            adapters = len(value)
    return Form("embedded", adapters) if scaled is None else Form("scaled", scaled)


def _advice(expected: Form, got: Form) -> str:
    if expected.kind != got.kind:
        return f"--set student.kind={got.kind}"
    if not expected.rank and got.kind == "embedded":
        return f"--set student.lora.rank={got.rank}, or the exported folder, whose adapters are merged"
    return f"--set student.lora.rank={got.rank}"


@torch.no_grad()
def load_earlier(student: Student, weights: Mapping[str, Tensor], source: str, *, diagonal: bool = True) -> None:
    """Load what was trained of an earlier student; all other weights stay the teacher's.

    Of an embedded student of full rank that is every weight, of one with adapters the adapters and the jump embeddings,
    of a scaled student the changes of the weights.

    Args:
        weights: those of the earlier student's network, by the names of this one; others that are the teacher's may be
            among them.
        source: the name of the earlier student, for messages.
        diagonal: also load the change at h = 0 of a scaled student that has one.

    Raises:
        UserError: if the earlier student is of another form or architecture.
    """
    network = student.network
    state = network.state_dict()
    expected, got = form_of(state), form_of(weights)
    if expected != got:
        raise UserError(f"student.init {source}: expected {expected}, got {got}; try {_advice(expected, got)}")
    trained = _trained_names(network, state, expected, diagonal=diagonal)
    there = _present_names(weights, expected)
    if other := sorted((trained - weights.keys()) | (there - state.keys())):
        has = "without" if other[0] in trained else "with"
        raise UserError(
            f"student.init {source}: expected the weights of {type(network).__name__} with this recipe's settings, got "
            f"those of a student {has} {other[0]} ({len(other)} names differ); try the student of a teacher of this "
            "architecture, with the same student.lora.targets"
        )
    for name in sorted(trained):
        if weights[name].shape != state[name].shape:
            shapes = f"{list(state[name].shape)}, got {list(weights[name].shape)}"
            raise UserError(
                f"student.init {source}: expected {name} of shape {shapes}; try the student of a network of this size"
            )
    for name in trained:
        state[name].copy_(weights[name])


def _trained_names(network: nn.Module, state: Mapping[str, Tensor], form: Form, *, diagonal: bool) -> set[str]:
    """Return the names of the weights of a student that its training changes."""
    if form.kind == "embedded":
        return {name for name in state if not form.rank or _is_adapter(name) or "jump_embedding." in name}
    names = {name for name in state if is_new(name) and (diagonal or not _is_diagonal(name))}
    if diagonal and not form.rank:
        # Of full rank the weights themselves are the change at h = 0.
        for layer, module in scaled_layers(network).items():
            if any(parameter.requires_grad for name, parameter in module.named_parameters() if not is_new(name)):
                names |= {f"{layer}.{name}" for name in module.state_dict()}
    return names


def _present_names(weights: Mapping[str, Tensor], form: Form) -> set[str]:
    """Return the names of an earlier student's weights that another one of its form has to have."""
    if form.kind == "embedded" and not form.rank:
        return set(weights)
    return {name for name in weights if _is_adapter(name) or (is_new(name) and not _is_diagonal(name))}


def _is_adapter(name: str) -> bool:
    return any(part in name for part in _ADAPTERS)


def _is_diagonal(name: str) -> bool:
    return name.rpartition(".")[2].startswith("diagonal_")


@torch.no_grad()
def same_base(weights: Mapping[str, Tensor], network: nn.Module) -> bool:
    """Return whether those weights of a scaled student that no training changes are the ones of a teacher's network.

    Args:
        weights: those of the student's network; names that it lacks are not compared.
    """
    changed = {name.rpartition(".")[0] for name in weights if is_new(name)}
    for name, value in network.state_dict().items():
        # A network that is no diffusers model is inside of the student's.
        found = next((key for key in (name, f"network.{name}") if key in weights), None)
        if found is None or any(found.startswith(f"{layer}.") for layer in changed):
            continue
        if not torch.equal(weights[found].to(value), value):
            return False
    return True
