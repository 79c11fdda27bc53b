"""A recipe: everything that a distillation run is, as one closed typed object, from YAML or from Python."""

from __future__ import annotations

import difflib
import importlib.resources
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from fmm_distill.config.plain_yaml import read, read_file_text
from fmm_distill.config.settings import (
    PLAIN,
    DataSettings,
    EvaluationSettings,
    ExportSettings,
    ExtraLoss,
    GuidanceSettings,
    LoggingSettings,
    PromptSettings,
    Stage,
    StudentSettings,
    TrainingSettings,
)
from fmm_distill.core.settings import Settings
from fmm_distill.errors import UserError
from fmm_distill.losses.base import Loss
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.losses.registry import GROUP, AnyLoss, find_loss, registered_losses
from fmm_distill.losses.time_sampling import TimeSampling
from fmm_distill.losses.weighting import Distance, Weight
from fmm_distill.teachers.prompted.refused_keywords import refused_keyword

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Recipe", "find_recipe", "load_recipe", "recipe_names"]


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
}
_RENAMED_OF_LOSSES = {"stop": "stop_gradient"}


class Recipe(Settings):
    """A distillation run. ``distill(Recipe(...))`` is what the command line calls."""

    teacher: str = "builtin:digits"
    """Hub id, folder or builtin:<name>."""
    revision: str | None = None
    """Branch, tag or commit of a teacher on the Hub."""
    variant: str | None = None
    """Of the teacher's weights, such as fp16; null: the plain ones. Opened in float32 either way."""
    pipeline: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """Keywords of a teacher's pipeline's call besides prompt and guidance, such as height and width."""
    prompts: PromptSettings = PromptSettings()
    """What a teacher of prompts is told."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Classifier-free guidance of the teacher."""
    data: DataSettings = DataSettings()
    """What jumps start from besides noise."""
    student: StudentSettings = StudentSettings()
    """How the student starts."""
    loss: AnyLoss = Lagrangian()
    """The main loss and its settings."""
    extra_losses: tuple[ExtraLoss, ...] = ()
    """Further losses, each on a fraction of every batch; the main loss has the rest."""
    stages: tuple[Stage, ...] = ()
    """Losses that are trained alone, one after the other, before the main and the extra losses."""
    distance: Distance = Distance()
    """Distance between prediction and target."""
    weight: Weight = Weight()
    """Weight of each sample."""
    time_sampling: TimeSampling = TimeSampling()
    """Distribution of the times at which jumps start and end."""
    training: TrainingSettings = TrainingSettings()
    """The loop."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """What is measured at the end, and on the way."""
    export: ExportSettings = ExportSettings()
    """What is written for others to load."""
    logging: LoggingSettings = LoggingSettings()
    """Where the numbers go besides the run folder."""

    @field_validator("pipeline")
    @classmethod
    def _keywords_are_not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if (refusal := refused_keyword(value)) is not None:
            raise ValueError(refusal)
        return value

    @model_validator(mode="after")
    def _reference_exists(self) -> Self:
        features, reference = self.evaluation.features, self.evaluation.reference
        if features not in ("digits", "none") and reference is None and not self.data.has_images:
            raise ValueError(
                f"evaluation.features: {features} compares with a dataset; give data, or evaluation.reference, or "
                "features: none"
            )
        if self.data.condition is not None and (self.prompts.file, self.prompts.dataset) != (None, None):
            raise ValueError("data.condition and prompts are two sources of what the teacher is told: give one")
        return self

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The main loss, the extra losses, and those of the stages before it."""
        return (self.loss, *(extra.loss for extra in self.extra_losses), *(stage.loss for stage in self.stages))

    @property
    def loss_names(self) -> str:
        """The names of all losses, for people to read."""
        together = " and ".join([self.loss.name, *(extra.loss.name for extra in self.extra_losses)])
        return ", then ".join([*(stage.loss.name for stage in self.stages), together])

    def stage_at(self, step: int) -> tuple[int | None, int]:
        """Return the index of the stage that a step is in, None after the stages; and the step within it.

        Args:
            step: counted from the first after the student's regression.
        """
        start = 0
        for index, stage in enumerate(self.stages):
            length = round(stage.fraction * self.training.steps)
            if step < start + length:
                return index, step - start
            start += length
        return None, step - start

    @model_validator(mode="after")
    def _losses_can_be_computed(self) -> Self:
        self._have_a_velocity()
        for loss in self.losses:
            if loss.needs_data and not self.data.has_images:
                fix = f"{loss.without_data}, or give --data"
                raise ValueError(f"loss {loss.name} learns from data and there are none; {fix}")
        if self.data.on_policy and self.data.has_images and all(loss.needs_data for loss in self.losses):
            raise ValueError("data.on_policy: a loss that learns from data starts on the way to its image; expected 0")
        if (total := sum(extra.fraction for extra in self.extra_losses)) >= 1:
            raise ValueError(f"extra_losses: expected fractions with a sum below 1, got {total:g}")
        if (total := sum(stage.fraction for stage in self.stages)) >= 1:
            raise ValueError(f"stages: expected fractions with a sum below 1, got {total:g}")
        if self.training.refresh_steps and all(loss.target_network != "frozen" for loss in self.losses):
            raise ValueError("training.refresh_steps acts on losses with target: frozen only")
        self._times_fit()
        return self

    def _have_a_velocity(self) -> None:
        """Check that a loss which only makes a map consistent with itself comes with one that is a velocity's."""
        for stage in self.stages:
            if stage.loss.needs_velocity_term:
                raise ValueError(
                    f"stages: loss {stage.loss.name} alone learns no velocity with these settings; make it the main "
                    "loss, with flow_matching in extra_losses"
                )
        together = [self.loss, *(extra.loss for extra in self.extra_losses)]
        for loss in self.losses:
            if loss.needs_velocity_term and not any(other.diagonal for other in together):
                raise ValueError(
                    f"loss {loss.name} alone learns no velocity with these settings; add to extra_losses: "
                    "{loss: {name: flow_matching}, fraction: 0.5, time_sampling: {prior: 0, data: 1}}"
                )

    def _times_fit(self) -> None:
        """Check that each loss is trained on times that it accepts."""
        own = [None, *(extra.time_sampling for extra in self.extra_losses)]
        own += [stage.time_sampling for stage in self.stages]
        for i, (loss, sampling) in enumerate(zip(self.losses, own, strict=True)):
            sampling = sampling or self.time_sampling
            if loss.accepts(sampling) or loss.needed_sampling is None:
                continue
            needed = loss.needed_sampling.model_dump(exclude_unset=True)
            wording = "{" + ", ".join(f"{key}: {value:g}" for key, value in needed.items()) + "}"
            got = ", ".join(f"{key}: {getattr(sampling, key):g}" for key in needed)
            group = "extra_losses" if i <= len(self.extra_losses) else "stages"
            fix = f"in {group} give it time_sampling: {wording}" if i else f"--set 'time_sampling={wording}'"
            raise ValueError(f"loss {loss.name} needs its own times: {fix} (got {got})")

    def to_yaml(self) -> str:
        """The resolved recipe, every field written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _folders() -> list[Path]:
    """Where recipes stand: inside an installed package, beside it in a checkout."""
    inside = Path(str(importlib.resources.files("fmm_distill"))) / "recipes"
    # An installed package has its own; what stands beside it there may be somebody else's.
    return [inside] if inside.is_dir() else [inside.parent.parent / "recipes"]


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def find_recipe(name: str) -> Path:
    """The file of a recipe, by its name or its own path.

    Raises:
        UserError: if there is none.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"recipe {name}: no such file")
        return Path(name)
    for folder in _folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    if Path(name).is_file():
        raise UserError(f"recipe {name}: a recipe's file ends in .yaml or .yml; expected `mv {name} {name}.yaml`")
    if "/" in name or Path(f"{name}.yaml").is_file():
        raise UserError(f"recipe {name}: no such file; a recipe's file ends in .yaml{_yaml_there(name)}")
    raise UserError(f"recipe {name!r} is unknown{_guess(name, recipe_names())}; known: {', '.join(recipe_names())}")


def _yaml_there(name: str) -> str:
    there = [f"{name}{end}" for end in (".yaml", ".yml") if Path(f"{name}{end}").is_file()]
    return f", did you mean {there[0]}?" if there else ""


def load_recipe(
    name: str, overrides: Sequence[str] = (), *, teacher: str | None = None, data: str | None = None
) -> Recipe:
    """A recipe by name or file, with ``key.path=value`` overrides in YAML's notation.

    Raises:
        UserError: with every mistake in one report, each with the path that a user can type.
    """
    path = find_recipe(name)
    where = f"recipe {path}"
    try:
        text = read_file_text(path.read_bytes(), where)
    except OSError as error:
        raise UserError(f"{where}: can't be read ({error.strerror})") from error
    settings = read(text, where)
    # An empty file has every default.
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise UserError(f"{where}: wanted keys and values, got {type(settings).__name__}")
    settings = _written_out(settings)
    options = {"teacher": ("--teacher", teacher), "data.source": ("--data", data)}
    given = {key: option for key, (option, value) in options.items() if value is not None}
    # Not by way of an override: a folder may be called 2024 or no.
    if teacher is not None:
        settings["teacher"] = teacher
    if data is not None:
        place = _group(settings, "data")
        if not isinstance(place, dict):
            raise UserError(f"{where}: data: wanted a source, or a group of settings (got {_shown(place)})")
        place["source"] = data
    return parse(override(settings, overrides, given), f"recipe {name}")


def override(
    settings: dict[str, Any], changes: Sequence[str], given: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Plain settings with ``key.path=value`` changes applied to them in place.

    Args:
        given: settings that options other than ``--set`` have changed, and these options.

    Raises:
        UserError: on a change that can't be read, or that another one undoes.
    """
    made = dict(given or {})
    for change in changes:
        key = change.partition("=")[0]
        for other, option in made.items():
            # A group after one of its fields resets that field; the same key again is an ordinary override.
            if (other == key and not option.startswith("--set")) or other.startswith(f"{key}."):
                raise UserError(f"--set {change!r}: {option} changes {other} too, and one undoes the other: give one")
        _apply(settings, change)
        made[key] = f"--set {change!r}"
    return settings


def parse(settings: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain keys and values; all mistakes in one ``UserError``."""
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        mistakes = "; ".join(_mistake(item, settings) for item in error.errors())
        raise UserError(f"{where}: {mistakes}") from error


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: wanted key=value, e.g. --set training.steps=200")
    value = read(text, f"--set {override!r}")
    *parents, last = key.split(".")
    place = settings
    for parent in parents:
        below = _group(place, parent) if place is settings else place.setdefault(parent, {})
        if not isinstance(below, dict):
            raise UserError(f"--set {override!r}: {parent} is not a group of settings")
        place = below
    place[last] = value


def _group(settings: dict[str, Any], name: str) -> Any:  # noqa: ANN401 whatever stands there
    """A group of a recipe, to change something in it; a plain value becomes its field first."""
    there = settings.setdefault(name, {})
    if name in PLAIN and isinstance(there, str):
        there = settings[name] = {PLAIN[name]: there}
    return there


def _mistake(item: Any, settings: dict[str, Any]) -> str:  # noqa: ANN401 pydantic's error record
    """Return one mistake, with the path that can be typed.

    Args:
        settings: the plain settings that were validated.
    """
    path = ".".join(map(str, item["loc"])) or "recipe"
    if item["type"] == "loss_unknown":
        name, known = item["ctx"]["name"], registered_losses()
        others = f"one of another package needs that package, with an entry point in {GROUP}"
        return f"{path}.name: loss {name!r} is unknown{_guess(name, known)} (fmm-distill losses lists them; {others})"
    if item["type"] == "extra_forbidden":
        return _unknown_key(path, item["loc"], settings)
    message = item["msg"].removeprefix("Value error, ")
    got = "" if isinstance(item["input"], dict | Settings) else f" (got {_shown(item['input'])})"
    return f"{path}: {message}{got}"


def _unknown_key(path: str, keys: tuple[str | int, ...], settings: dict[str, Any]) -> str:
    """Return the mistake of a key that no group of settings has, with the key that was probably meant."""
    if "loss" in keys[:-1]:
        group: Any = settings
        for key in keys[:-1]:
            group = group[key]
        where = path.rpartition(".")[0]
        kind = find_loss(group["name"])
        known = [] if kind is None else [f"{where}.{name}" for name in kind.model_fields]
        renamed = f"{where}.{_RENAMED_OF_LOSSES.get(str(keys[-1]))}"
        meant = f"; expected its new name, {renamed}" if renamed in known else _guess(path, known)
        fresh = f"--set '{where}={{name: {group['name']}}}' starts from that loss's own settings"
        return f"{path} is not a setting of {group['name']}{meant} ({fresh})"
    if new := _RENAMED.get(".".join(part for part in path.split(".") if not part.isdecimal())):
        return f"{path} is not a setting; expected its new name, {new}"
    return f"{path} is not a setting{_guess(path, _paths(Recipe))}"


def _shown(value: object) -> str:
    """A value of any size, in a line."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return " ".join(short.repr(value).split())


def _written_out(value: Any) -> Any:  # noqa: ANN401 plain settings
    """Plain settings of which no part is shared: a change of one place is not one of another that an alias made."""
    if isinstance(value, dict):
        return {key: _written_out(part) for key, part in value.items()}
    return [_written_out(part) for part in value] if isinstance(value, list) else value


def _guess(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _paths(model: type[Settings], prefix: str = "") -> list[str]:
    paths = []
    for name, spec in model.model_fields.items():
        paths.append(prefix + name)
        kinds: Iterable[Any] = getattr(spec.annotation, "__args__", (spec.annotation,))
        if spec.annotation is Loss:
            kinds = registered_losses().values()
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Settings):
                paths += _paths(kind, f"{prefix}{name}.")
    return paths
