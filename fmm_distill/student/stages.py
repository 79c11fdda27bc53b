"""Teachers and students of two networks as two of one network each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from fmm_distill.core.staged import StagedNetwork, stages_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fmm_distill.core.parametrization import Parametrization
    from fmm_distill.teachers.base import Teacher

__all__ = ["jump_embeddings", "key_of", "of_stage", "per_stage"]


def of_stage(parametrization: Parametrization) -> Parametrization:
    """Return the parametrization of one of two networks, which is called at all times."""
    call = cast("Any", parametrization.call)
    return replace(parametrization, call=call.of_stage()) if hasattr(call, "of_stage") else parametrization


def per_stage(teacher: Teacher, change: Callable[[Teacher], nn.Module]) -> nn.Module:
    """Return what ``change`` makes of a teacher; of one with two networks, what it makes of each, together."""
    if not isinstance(teacher.network, StagedNetwork):
        return change(teacher)
    parametrization = of_stage(teacher.parametrization)
    return teacher.network.map(lambda part: change(replace(teacher, network=part, parametrization=parametrization)))


def jump_embeddings(network: nn.Module) -> list[nn.Module]:
    """Return the jump embeddings of a student's network, those of both where there are two."""
    return [embedding for part in stages_of(network) for embedding in cast("Any", part).jump_embedding]


def key_of(network: nn.Module, component: str, name: str) -> str:
    """Return the name of a weight or a layer of a network in its pipeline."""
    # The networks of a staged one have the names of the components.
    return name if isinstance(network, StagedNetwork) else f"{component}.{name}"
