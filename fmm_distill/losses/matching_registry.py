"""The registry of the losses of distribution matching, for the setting ``matching.loss``."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

from pydantic_core import PydanticCustomError

from fmm_distill.losses.base import Loss
from fmm_distill.losses.distribution_matching import MatchingLoss
from fmm_distill.losses.registry import MATCHING, ByName, find_loss

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["AnyMatchingLoss", "find_matching_loss", "matching_losses"]

# Classes of instances that a recipe was given in this process: a run that is resumed by the same Python program reads
# them from its recipe's file.
_passed: dict[str, type[MatchingLoss]] = {}


@cache
def matching_losses() -> Mapping[str, type[MatchingLoss]]:
    """Return every loss of distribution matching by its name."""
    references = {name: reference.partition(":")[::2] for name, reference in MATCHING.items()}
    return {name: getattr(import_module(module), attribute) for name, (module, attribute) in references.items()}


def find_matching_loss(name: str) -> type[MatchingLoss] | None:
    """Return the class of a loss by its name: one of this package, or one that this process passed to a recipe."""
    return matching_losses().get(name) or _passed.get(name)


def _validate(value: object) -> MatchingLoss:
    """Return a loss from a group of settings with its name, or the instance of a loss as it is."""
    if isinstance(value, MatchingLoss):
        other = matching_losses().get(value.name, type(value))
        if other is not type(value):
            raise PydanticCustomError(
                "matching_loss_name_taken",
                "{own} has the name of {other}: give it another name",
                {"own": type(value).__name__, "other": f"{other.__module__}.{other.__name__}"},
            )
        if value.name not in matching_losses():
            _passed[value.name] = type(value)
        return value
    name = value.name if isinstance(value, Loss) else value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        raise PydanticCustomError(
            "matching_loss_without_name", "expected a group with a name, such as {name: distribution_matching}"
        )
    if isinstance(value, Loss) or (kind := find_matching_loss(name)) is None:
        raise PydanticCustomError(
            "matching_loss_unknown",
            "expected one of {known}, got {name}{reason}",
            {
                "known": ", ".join(matching_losses()),
                "name": repr(name),
                "reason": "" if find_loss(name) is None else ", a loss of the map; try the recipe's loss for it",
            },
        )
    return kind.model_validate(value)


AnyMatchingLoss = Annotated[MatchingLoss, ByName(_validate, matching_losses)]
"""The type of a setting that is a loss of distribution matching: by its name, or any instance of ``MatchingLoss``."""
