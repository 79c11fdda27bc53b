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
    GuidanceSettings,
    LoggingSettings,
    PromptSettings,
    Stage,
    StudentSettings,
    Term,
    TrainingSettings,
)
from fmm_distill.errors import UserError
from fmm_distill.losses import LOSSES, SETTINGS, AnyLossSettings, LagrangianSettings
from fmm_distill.losses.base import Settings
from fmm_distill.losses.time_sampling import Pairs
from fmm_distill.losses.weighting import Metric, Weight
from fmm_distill.teachers.prompted.refused_keywords import refused_keyword

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Recipe", "find_recipe", "load_recipe", "recipe_names"]


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
    loss: AnyLossSettings = LagrangianSettings()
    """Which loss, and its settings."""
    also: tuple[Term, ...] = ()
    """Further losses, each on a share of every batch; the main loss has the rest."""
    before: tuple[Stage, ...] = ()
    """Losses that are trained alone, one after the other, before the main one and what is beside it."""
    metric: Metric = Metric()
    """How large a residual is."""
    weight: Weight = Weight()
    """How much a sample counts."""
    pairs: Pairs = Pairs()
    """Where jumps start and end."""
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
    def losses(self) -> tuple[AnyLossSettings, ...]:
        """The main loss, those beside it, and those before it."""
        return (self.loss, *(term.loss for term in self.also), *(stage.loss for stage in self.before))

    @property
    def loss_names(self) -> str:
        """The names of all losses, to be read by people."""
        beside = " and ".join([self.loss.name, *(term.loss.name for term in self.also)])
        return ", then ".join([*(stage.loss.name for stage in self.before), beside])

    def stage_at(self, step: int) -> tuple[int | None, int]:
        """Which of the stages before the main loss a step is in, None after them; and its number within the stage.

        Args:
            step: counted from the first after the student's regression.
        """
        start = 0
        for index, stage in enumerate(self.before):
            length = round(stage.share * self.training.steps)
            if step < start + length:
                return index, step - start
            start += length
        return None, step - start

    @model_validator(mode="after")
    def _losses_can_be_computed(self) -> Self:
        for stage in self.before:
            if stage.loss.sees_no_teacher:
                raise ValueError(
                    f"before: loss {stage.loss.name} alone sees no teacher with these settings; make it the main loss, "
                    "with flow_matching in also"
                )
        names = [self.loss.name, *(term.loss.name for term in self.also)]
        for loss in self.losses:
            if loss.velocity == "data" and not self.data.has_images:
                raise ValueError(f"loss {loss.name} learns from data and there are none; {_without_data(loss)}")
            if loss.sees_no_teacher and "flow_matching" not in names:
                raise ValueError(
                    f"loss {loss.name} alone sees no teacher with these settings; add to also: "
                    "{loss: {name: flow_matching}, share: 0.5, pairs: {prior: 0, data: 1}}"
                )
        if self.data.on_policy and self.data.has_images and all(loss.velocity == "data" for loss in self.losses):
            raise ValueError("data.on_policy: a loss that learns from data starts on the way to its image; wanted 0")
        if (share := sum(term.share for term in self.also)) >= 1:
            raise ValueError(f"also: the shares come to {share:g}; the main loss needs a part of the batch")
        if (share := sum(stage.share for stage in self.before)) >= 1:
            raise ValueError(f"before: the shares come to {share:g}; the main loss needs a part of the steps")
        if self.training.refresh_steps and all(loss.follows != "frozen" for loss in self.losses):
            raise ValueError("training.refresh_steps acts on losses with target: frozen only")
        self._pairs_fit()
        return self

    def _pairs_fit(self) -> None:
        wanted = {
            "consistency": ("data", "{prior: 0, data: 1}"),
            "operator_regression": ("prior", "{prior: 1}"),
            "progressive_distillation": ("dyadic", "{prior: 0, dyadic: 3}"),
        }
        own = [None, *(term.pairs for term in self.also), *(stage.pairs for stage in self.before)]
        places = [pairs or self.pairs for pairs in own]
        for i, (loss, pairs) in enumerate(zip(self.losses, places, strict=True)):
            key, fit = wanted.get(loss.name, ("spacing", ""))
            if fit and (got := getattr(pairs, key)) < 1:
                group = "also" if i <= len(self.also) else "before"
                cure = f"in {group} give it pairs: {fit}" if i else f"--set 'pairs={fit}'"
                raise ValueError(f"loss {loss.name} trains its own pairs of times only: {cure} (got {key}: {got:g})")

    def to_yaml(self) -> str:
        """The resolved recipe, every field written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _without_data(loss: AnyLossSettings) -> str:
    """What comes nearest to a loss when there is no data."""
    nearest = {
        "flow_map_matching": "take lagrangian, or give --data",
        "mean_flow": "take eulerian with stop: target, or give --data",
        "terminal_velocity": "take lagrangian with velocity: self and flow_matching in also, or give --data",
    }
    return nearest.get(loss.name, "set its velocity: teacher, or give --data")


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
        mistakes = "; ".join(_mistake(item) for item in error.errors())
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


def _mistake(item: Any) -> str:  # noqa: ANN401 pydantic's error record
    """One mistake, by the path that can be typed: the tag of a union is no part of it."""
    place = item["loc"]
    tags = [i > 0 and place[i - 1] == "loss" and part in LOSSES for i, part in enumerate(place)]
    path = ".".join(str(part) for part, tag in zip(place, tags, strict=True) if not tag) or "recipe"
    if item["type"] == "union_tag_invalid":
        name = item["ctx"]["tag"]
        return f"{path}.name: loss {name!r} is unknown{_guess(name, LOSSES)} (fmm-distill losses lists them)"
    if item["type"] == "union_tag_not_found":
        return f"{path}: wanted a group with a name, e.g. {{name: lagrangian}} (got {_shown(item['input'])})"
    if item["type"] == "extra_forbidden":
        of = next((part for part, tag in zip(place, tags, strict=True) if tag), None)
        if of is not None:
            known = [f"{path.rpartition('.')[0]}.{name}" for name in SETTINGS[of].model_fields]
            whole = f"--set '{path.rpartition('.')[0]}={{name: {of}}}' starts from that loss's own settings"
            return f"{path} is not a setting of {of}{_guess(path, known)} ({whole})"
        return f"{path} is not a setting{_guess(path, _paths(Recipe))}"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if isinstance(item["input"], dict | Settings) else f" (got {_shown(item['input'])})"
    return f"{path}: {message}{got}"


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
        kinds = getattr(spec.annotation, "__args__", (spec.annotation,))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Settings):
                paths += _paths(kind, f"{prefix}{name}.")
    return paths
