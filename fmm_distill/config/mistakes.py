"""Mistakes in a recipe, each in words that name the setting as a user types it."""

from __future__ import annotations

import difflib
import reprlib
from typing import TYPE_CHECKING, Any

from fmm_distill.losses.base import Loss
from fmm_distill.losses.distribution_matching import MatchingLoss
from fmm_distill.losses.matching_registry import find_matching_loss, matching_losses
from fmm_distill.losses.registry import GROUP, find_loss, registered_losses
from fmm_distill.losses.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic import ValidationError

__all__ = ["describe_mistakes", "guess", "setting_paths", "shown"]

# Names of settings before the first release: the new ones are often too different to be guessed.
_RENAMED = {
    "also": "extra_losses",
    "before": "stages",
    "extra_losses.pairs": "extra_losses.time_sampling",
    "extra_losses.share": "extra_losses.fraction",
    "metric": "distance",
    "pairs": "time_sampling",
    "stages.pairs": "stages.time_sampling",
    "stages.share": "stages.fraction",
    "training.accumulation": "training.gradient_accumulation_steps",
    "training.bad_steps": "training.max_non_finite_steps",
    "training.betas": "optimizer.betas",
    "training.clip": "training.max_grad_norm",
    "training.decay": "training.lr_schedule",
    "training.keep_checkpoints": "training.checkpoints_total_limit",
    "training.learning_rate": "optimizer.lr",
    "training.refresh_steps": "training.target_update_every",
    "training.weight_decay": "optimizer.weight_decay",
}
_RENAMED_OF_LOSSES = {"stop": "stop_gradient"}


def describe_mistakes(error: ValidationError, settings: dict[str, Any], model: type[Settings]) -> str:
    """Return all mistakes of settings in one line.

    Args:
        settings: the plain settings that were validated.
        model: the class that they were validated by.
    """
    return "; ".join(_mistake(item, settings, model) for item in error.errors())


def _mistake(item: Any, settings: dict[str, Any], model: type[Settings]) -> str:  # noqa: ANN401 pydantic's error record
    """Return one mistake, with the path that can be typed.

    Args:
        settings: the plain settings that were validated.
    """
    path = ".".join(map(_key, item["loc"])) or "recipe"
    if item["type"] == "loss_unknown":
        name, known = item["ctx"]["name"], registered_losses()
        others = f"for one of another package, install the package that registers it, with an entry point in {GROUP}"
        return f"{path}.name: expected a loss of fmm-distill losses, got {name!r}{guess(name, known)} ({others})"
    if item["type"] == "extra_forbidden":
        return _unknown_key(path, item["loc"], settings, model)
    message = item["msg"].removeprefix("Value error, ")
    got = "" if isinstance(item["input"], dict | Settings) else f" (got {shown(item['input'])})"
    return f"{path}: {message}{got}"


def _unknown_key(path: str, keys: tuple[str | int, ...], settings: dict[str, Any], model: type[Settings]) -> str:
    """Return the mistake of a key that no group of settings has, with the key that was probably meant."""
    if "loss" in keys[-2:-1]:
        group: Any = settings
        for key in keys[:-1]:
            group = group[key]
        where = path.rpartition(".")[0]
        kind = (find_matching_loss if keys[0] == "matching" else find_loss)(group["name"])
        known = [] if kind is None else [f"{where}.{name}" for name in kind.model_fields]
        renamed = f"{where}.{_RENAMED_OF_LOSSES.get(str(keys[-1]))}"
        meant = f"; expected its new name, {renamed}" if renamed in known else guess(path, known)
        fresh = f"--set '{where}={{name: {group['name']}}}' starts from the defaults of that loss"
        return f"{path} is not a setting of {group['name']}{meant} ({fresh})"
    if new := _RENAMED.get(".".join(part for part in path.split(".") if not part.isdecimal())):
        return f"{path} is not a setting; expected its new name, {new}"
    return f"{path} is not a setting{guess(path, setting_paths(model))}"


def _key(part: int | str) -> str:
    """Return a key as a message has it: in quotes if it has a line break or another letter that can't be printed."""
    text = str(part)
    return text if text.isprintable() else repr(text)


def shown(value: object) -> str:
    """Return a value of any size in one short line."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return " ".join(short.repr(value).split())


def guess(name: str, known: Iterable[str]) -> str:
    """Return the known name that was probably meant, as the end of a message; empty if there is none."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def setting_paths(model: type[Settings], prefix: str = "") -> list[str]:
    """Return the paths of all settings of a class and of its groups."""
    paths = []
    for name, spec in model.model_fields.items():
        paths.append(prefix + name)
        kinds: Iterable[Any] = getattr(spec.annotation, "__args__", (spec.annotation,))
        if spec.annotation in (Loss, MatchingLoss):
            kinds = (registered_losses() if spec.annotation is Loss else matching_losses()).values()
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Settings):
                paths += setting_paths(kind, f"{prefix}{name}.")
    return paths
