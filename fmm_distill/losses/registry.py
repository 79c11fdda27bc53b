"""The registry of losses: those of this package, and those that other distributions register as entry points."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic_core import PydanticCustomError, core_schema

from fmm_distill.losses.base import Loss

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue

    from fmm_distill.losses.settings import Settings

__all__ = [
    "BUILT_IN",
    "GROUP",
    "MATCHING",
    "AnyLoss",
    "ByName",
    "find_loss",
    "incomplete",
    "registered_losses",
    "reload_losses",
]

logger = logging.getLogger(__name__)

GROUP = "fmm_distill.losses"
# One line per loss, in the notation of an entry point.
BUILT_IN = {
    "lagrangian": "fmm_distill.losses.lagrangian:Lagrangian",
    "eulerian": "fmm_distill.losses.eulerian:Eulerian",
    "progressive": "fmm_distill.losses.progressive:Progressive",
    "flow_map_matching": "fmm_distill.losses.flow_map_matching:FlowMapMatching",
    "flow_matching": "fmm_distill.losses.flow_matching:FlowMatching",
    "mean_flow": "fmm_distill.losses.mean_flow:MeanFlow",
    "consistency": "fmm_distill.losses.consistency:Consistency",
    "consistency_trajectory": "fmm_distill.losses.consistency_trajectory:ConsistencyTrajectory",
    "progressive_distillation": "fmm_distill.losses.progressive_distillation:ProgressiveDistillation",
    "operator_regression": "fmm_distill.losses.operator_regression:OperatorRegression",
    "terminal_velocity": "fmm_distill.losses.terminal_velocity:TerminalVelocity",
}
# The losses of distribution matching, for the setting matching.loss alone; ``matching_registry`` has the classes.
MATCHING = {
    "distribution_matching": "fmm_distill.losses.distribution_matching:DistributionMatching",
    "flow_generator_matching": "fmm_distill.losses.flow_generator_matching:FlowGeneratorMatching",
    "score_implicit_matching": "fmm_distill.losses.score_implicit_matching:ScoreImplicitMatching",
    "score_identity_distillation": "fmm_distill.losses.score_identity_distillation:ScoreIdentityDistillation",
}


@dataclass(frozen=True)
class _Registry:
    """The losses by name.

    Attributes:
        losses: of this package and of entry points.
        passed: classes of instances that a recipe was given in this process: a run that is resumed by the same Python
            program reads them from its recipe's file.
        broken: the reason why an entry point is not among the losses.
    """

    losses: dict[str, type[Loss]] = field(default_factory=dict)
    passed: dict[str, type[Loss]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def registered_losses() -> Mapping[str, type[Loss]]:
    """Return every registered loss by its name: those of this package first, then those of installed distributions.

    Entry points are loaded at the first call. One that cannot be used is reported as a warning and left out; a recipe
    that names it is refused with the same reason.
    """
    return dict(_registry().losses)


def find_loss(name: str) -> type[Loss] | None:
    """Return the class of a loss by its name: a registered one, or one that this process passed to a recipe."""
    known = _registry()
    return known.losses.get(name) or known.passed.get(name)


def reload_losses() -> None:
    """Forget the losses, so that the next use reads the entry points again, after an installation for instance."""
    _registry.cache_clear()


@cache
def _registry() -> _Registry:
    made = _Registry()
    for name, reference in BUILT_IN.items():
        module, _, attribute = reference.partition(":")
        made.losses[name] = getattr(import_module(module), attribute)
    # Grouped first: the error names every distribution that registers the same loss.
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, []).append(entry)
    for name, entries in found.items():
        try:
            made.losses[name] = _load(name, entries)
        except ImportError as error:
            made.broken[name] = str(error)
            logger.warning("%s", error)
    return made


def _load(name: str, entries: list[EntryPoint]) -> type[Loss]:
    """Return the class that an entry point names.

    Raises:
        ImportError: if its name is taken, its module fails, or what it names is not a complete loss; with the
            distribution's name.
    """
    owners = sorted(_distribution(entry) for entry in entries)
    if name in BUILT_IN:
        raise ImportError(f"loss {name} of {owners[0]}: the name is one of fmm_distill's own losses; rename the loss")
    if len(entries) > 1:
        raise ImportError(f"loss {name} is registered by {' and by '.join(owners)}; uninstall all but one of them")
    where = f"loss {name} of {owners[0]} ({entries[0].value})"
    try:
        kind = entries[0].load()
    # Any error: a broken package must not prevent the use of the other losses.
    except Exception as error:
        raise ImportError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if (reason := incomplete(kind, name)) is not None:
        raise ImportError(f"{where}: {reason}")
    loaded: type[Loss] = kind
    return loaded


def incomplete(kind: object, name: str) -> str | None:
    """Return the reason why an object cannot be registered as the loss of this name; None if it can."""
    if not isinstance(kind, type) or not issubclass(kind, Loss):
        return f"expected a subclass of fmm_distill.losses.Loss, got {kind!r}"
    if inspect.isabstract(kind):
        return "expected a class that defines __call__"
    # Recipes find the class by this literal, so it must be the name of the entry point.
    if get_args(kind.model_fields["name"].annotation) != (name,) or kind.model_fields["name"].default != name:
        return f'expected the field name: Literal["{name}"] = "{name}"'
    absent = [attribute for attribute in ("summary", "paper") if not isinstance(getattr(kind, attribute, None), str)]
    if absent:
        return f"expected the class attribute {absent[0]}, a text"
    if required := [key for key, value in kind.model_fields.items() if value.is_required()]:
        return f"expected a default for every field, and {required[0]} has none"
    return None


def _distribution(entry: EntryPoint) -> str:
    """Return the name and version of the distribution that an entry point is of."""
    return "an unnamed distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def _validate(value: object) -> Loss:
    """Return a loss from a group of settings with its name, or the instance of a loss as it is."""
    known = _registry()
    if isinstance(value, Loss):
        other = known.losses.get(value.name, type(value))
        if other is not type(value):
            # The recipe of the run would name the other one.
            raise PydanticCustomError(
                "loss_name_taken",
                "{own} has the name of {other}: give it another name",
                {"own": type(value).__name__, "other": f"{other.__module__}.{other.__name__}"},
            )
        if value.name not in known.losses:
            known.passed[value.name] = type(value)
        return value
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    if isinstance(name, str) and name in MATCHING:
        raise PydanticCustomError(
            "loss_of_matching",
            "expected a loss of the map, got {name}, a loss of distribution matching; try {fix}",
            {"name": name, "fix": f"--set 'matching={{steps: 100, loss: {{name: {name}}}}}'"},
        )
    if not isinstance(value, dict) or not isinstance(name, str):
        raise PydanticCustomError("loss_without_name", "expected a group with a name, such as {name: lagrangian}")
    if name in known.broken:
        raise PydanticCustomError("loss_broken", "{reason}", {"reason": known.broken[name]})
    # At validation and not in the schema: losses can be registered after this module was imported.
    if (kind := find_loss(name)) is None:
        raise PydanticCustomError("loss_unknown", "loss {name} is unknown", {"name": name})
    return kind.model_validate(value)


@dataclass(frozen=True)
class ByName:
    """The schema of a field that holds any registered loss, built when a value is validated.

    Attributes:
        validate: returns the loss that a value describes.
        known: returns the losses by name, for the JSON schema.
    """

    validate: Callable[[object], Settings]
    known: Callable[[], Mapping[str, type[Settings]]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:  # noqa: ANN401 any annotation
        return core_schema.no_info_plain_validator_function(self.validate)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"oneOf": [handler(kind.__pydantic_core_schema__) for kind in self.known().values()]}


AnyLoss = Annotated[Loss, ByName(_validate, registered_losses)]
"""The type of a setting that is a loss: a registered one by its name, or any instance of ``Loss``."""
