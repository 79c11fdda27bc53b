"""Recipes: all settings of a distillation run as one closed, typed object, from YAML or from Python."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from fmm_distill.config.matching import MatchingSettings, check_map_steps, check_matching
from fmm_distill.config.mistakes import describe_mistakes, guess, shown
from fmm_distill.config.plain_yaml import read, read_file_text
from fmm_distill.config.settings import (
    PLAIN,
    DataSettings,
    EvaluationSettings,
    ExportSettings,
    ExtraLoss,
    GuidanceSettings,
    IpAdapterSettings,
    LoggingSettings,
    OptimizerSettings,
    PromptSettings,
    Stage,
    StudentSettings,
    TrainingSettings,
)
from fmm_distill.core.draws import positions_of
from fmm_distill.errors import UserError
from fmm_distill.losses.base import Loss
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.losses.registry import AnyLoss
from fmm_distill.losses.settings import Settings
from fmm_distill.losses.time_sampling import TimeSampling
from fmm_distill.losses.weighting import Distance, Weight
from fmm_distill.teachers.prompted.refused_keywords import refused_keyword

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Recipe", "find_recipe", "load_recipe", "recipe_names"]

# Values of keywords, which the pipeline itself checks.
Plain: TypeAlias = bool | int | float | str | None


class Recipe(Settings):
    """The settings of a distillation run, as ``distill(Recipe(...))`` takes them."""

    teacher: str = "builtin:digits"
    """Teacher: a Hub id, a folder or ``builtin:<name>``."""
    revision: str | None = None
    """Branch, tag or commit of the teacher on the Hub."""
    variant: str | None = None
    """Variant of the teacher's weight files, such as fp16; null: the plain files. All are opened in float32."""
    timesteps: int | None = Field(default=None, ge=2, le=1_000_000)
    """Number of the teacher's timesteps that are used, counted from data; null: all. Fewer leave out the noisiest, at
    which an epsilon prediction is the least accurate."""
    pipeline: dict[str, Plain | list[Plain]] = Field(default_factory=dict)
    """Keyword arguments of the pipeline's call in addition to prompt and guidance, such as height and width: numbers,
    texts, truth values, null, or lists of these."""
    prompts: PromptSettings = PromptSettings()
    """Prompts that condition the teacher."""
    ip_adapter: IpAdapterSettings = IpAdapterSettings()
    """IP-Adapter of the teacher."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Classifier-free guidance of the teacher."""
    data: DataSettings = DataSettings()
    """Data that jumps may start from, in addition to noise."""
    student: StudentSettings = StudentSettings()
    """The student's prediction type, its start and its adapters."""
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
    matching: MatchingSettings | None = None
    """Distribution matching as a second stage, after training.steps; null: none."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """The optimizer and its learning rate."""
    training: TrainingSettings = TrainingSettings()
    """The training loop."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Evaluation at the end of training and during it."""
    export: ExportSettings = ExportSettings()
    """The exported pipelines."""
    logging: LoggingSettings = LoggingSettings()
    """Experiment trackers, in addition to the run folder."""

    @field_validator("pipeline", mode="before")
    @classmethod
    def _keywords_are_plain(cls, value: object) -> object:
        for key, part in value.items() if isinstance(value, dict) else ():
            for one in part if isinstance(part, list | tuple) else [part]:
                if not isinstance(one, bool | int | float | str | None):
                    raise ValueError(f"expected numbers, texts, true, false, null or a list of these for {key}")
        return value

    @field_validator("pipeline")
    @classmethod
    def _keywords_are_not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if (refusal := refused_keyword(value)) is not None:
            raise ValueError(refusal)
        return value

    @model_validator(mode="after")
    def _adapter_has_images(self) -> Self:
        given, source = "ip_adapter_image" in self.prompts.images, self.ip_adapter.source
        if given and source is None:
            raise ValueError(
                "prompts.images.ip_adapter_image: expected ip_adapter.source with it, got none; try ip_adapter: "
                "{source: h94/IP-Adapter, subfolder: models, weight_name: ip-adapter_sd15.safetensors}"
            )
        if source is not None and not given:
            raise ValueError(
                f"ip_adapter.source: expected its images in prompts.images.ip_adapter_image with {source}, got none; "
                "name the column that has them"
            )
        return self

    @model_validator(mode="after")
    def _reference_exists(self) -> Self:
        features, reference = self.evaluation.features, self.evaluation.reference
        if features not in ("digits", "none") and reference is None and not self.data.has_images:
            raise ValueError(
                f"evaluation.features: expected data or evaluation.reference with {features}, got neither; give one of "
                "them, or features: none"
            )
        if self.data.condition is not None and (self.prompts.file, self.prompts.dataset) != (None, None):
            raise ValueError("expected one source of conditions, got data.condition and prompts; leave one out")
        if self.prompts.images and self.data.has_images:
            raise ValueError(
                f"data.source: expected none or teacher with prompts.images, got {self.data.source}, whose images have "
                "no such conditions; for images to compare with, try evaluation.reference"
            )
        return self

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The main loss, the extra losses, and those of the stages before it."""
        return (self.loss, *(extra.loss for extra in self.extra_losses), *(stage.loss for stage in self.stages))

    @property
    def map_steps(self) -> int:
        """The number of optimizer steps before the second stage: the regression's and the losses'."""
        return self.student.regression_steps + self.training.steps

    @property
    def total_steps(self) -> int:
        """The number of all training steps: of the map, of the critic alone, and of the matching."""
        matching = self.matching
        return self.map_steps + (0 if matching is None else matching.critic.warmup_steps + matching.steps)

    @property
    def loss_names(self) -> str:
        """The names of all losses, for messages."""
        together = " and ".join([self.loss.name, *(extra.loss.name for extra in self.extra_losses)])
        return ", then ".join([*(stage.loss.name for stage in self.stages), together])

    def stage_at(self, step: int) -> tuple[int | None, int]:
        """Return the index of a step's stage, None in the main loss, and the number of the step within it.

        Args:
            step: number of the step, from 0 after the student's regression.
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
        check_map_steps(self.training.steps, self.student, self.matching)
        if self.student_kind == "embedded":
            self.check_velocity()
        else:
            # The teacher's velocity is in the weights.
            self._train_jumps()
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
        if self.training.target_update_every and all(loss.target_network != "frozen" for loss in self.losses):
            raise ValueError(
                "training.target_update_every: expected a loss with target: frozen, got none; leave it out"
            )
        self._times_fit()
        self._groups_fit()
        if self.matching is not None:
            check_matching(self.matching, self)
        return self

    @property
    def student_kind(self) -> Literal["scaled", "embedded"]:
        """The kind of the student as far as the losses decide about it; a teacher can require the other one."""
        if self.student.kind != "auto":
            return self.student.kind
        # These losses train u(x, t, t), which is fixed in a scaled student.
        diagonal = any(loss.diagonal or loss.needs_data for loss in self.losses) or self.time_sampling.diagonal > 0
        return "embedded" if diagonal else "scaled"

    def check_velocity(self) -> None:
        """Check that a loss which only makes a map consistent with itself comes with one that is a velocity's.

        Raises:
            ValueError: if an embedded student would learn no velocity.
        """
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

    def _train_jumps(self) -> None:
        """Refuse losses of the velocity alone for a student whose velocity is the teacher's."""
        for loss in self.losses:
            if loss.diagonal:
                raise ValueError(
                    f"loss {loss.name} trains jumps of length 0 alone, where a student of kind scaled is its teacher; "
                    "leave it out, or try student.kind: embedded"
                )
        if self.time_sampling.diagonal:
            raise ValueError(
                f"time_sampling.diagonal: expected 0 for a scaled student, which is its teacher at h = 0, got "
                f"{self.time_sampling.diagonal:g}; leave it out, or try student.kind: embedded"
            )

    def _groups_fit(self) -> None:
        """Check that the groups of samples with common times have one size in every part of a batch."""
        groups, training = self.time_sampling.groups, self.training
        own = [extra.time_sampling for extra in self.extra_losses] + [stage.time_sampling for stage in self.stages]
        if others := {sampling.groups for sampling in own if sampling} - {0, groups}:
            raise ValueError(
                f"time_sampling.groups: expected the recipe's own, {groups}, in extra_losses and stages, got "
                f"{max(others)}; groups are of the complete batch, try --set time_sampling.groups={max(others)}"
            )
        if not groups:
            return
        if self.student_kind != "scaled":
            raise ValueError("time_sampling.groups: expected a scaled student, got an embedded one; leave groups out")
        if training.batch_size % groups:
            raise ValueError(
                f"time_sampling.groups: expected a divisor of training.batch_size {training.batch_size}, got {groups}"
            )
        # The losses of the groups are the same at every step.
        positions, end = positions_of(groups), 1.0
        for extra in reversed(self.extra_losses):
            start = end - extra.fraction
            if not bool(((positions >= start) & (positions < end)).any()):
                raise ValueError(
                    f"time_sampling.groups: expected enough for a group of each loss, got {groups}, of which "
                    f"{extra.loss.name} has none; try more groups, or a larger fraction of it"
                )
            end = start

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
        """Return the resolved recipe as YAML, with every field."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _folders() -> list[Path]:
    """Return the folder of recipes: inside an installed package, next to it in a checkout."""
    inside = Path(str(importlib.resources.files("fmm_distill"))) / "recipes"
    # A folder next to an installed package may belong to another one.
    return [inside] if inside.is_dir() else [inside.parent.parent / "recipes"]


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, by its name or its path.

    Raises:
        UserError: if there is no such recipe.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"recipe {name}: expected a file, got a path without one; check the path")
        return Path(name)
    for folder in _folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    if Path(name).is_file():
        raise UserError(f"recipe {name}: expected a file that ends in .yaml or .yml; try `mv {name} {name}.yaml`")
    if "/" in name or Path(f"{name}.yaml").is_file():
        raise UserError(f"recipe {name}: expected a file that ends in .yaml, got a path without one{_yaml_there(name)}")
    raise UserError(f"recipe {name!r}: expected one of {', '.join(recipe_names())}{guess(name, recipe_names())}")


def _yaml_there(name: str) -> str:
    there = [f"{name}{end}" for end in (".yaml", ".yml") if Path(f"{name}{end}").is_file()]
    return f", did you mean {there[0]}?" if there else ""


def load_recipe(
    name: str, overrides: Sequence[str] = (), *, teacher: str | None = None, data: str | None = None
) -> Recipe:
    """Load a recipe by name or file, with ``key.path=value`` overrides in YAML's notation.

    Args:
        teacher: replaces the recipe's teacher.
        data: replaces the source of the recipe's data.

    Raises:
        UserError: with all mistakes in one line, each with the path that a user can type.
    """
    path = find_recipe(name)
    where = f"recipe {path}"
    try:
        text = read_file_text(path.read_bytes(), where)
    except OSError as error:
        raise UserError(
            f"{where}: expected a readable file, got {error.strerror}; check the path and its permissions"
        ) from error
    settings = read(text, where)
    # An empty file has every default.
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise UserError(f"{where}: expected keys and values, got {type(settings).__name__}")
    settings = _written_out(settings)
    options = {"teacher": ("--teacher", teacher), "data.source": ("--data", data)}
    given = {key: option for key, (option, value) in options.items() if value is not None}
    # Not as an override in YAML's notation: a folder may have the name 2024 or no.
    if teacher is not None:
        settings["teacher"] = teacher
    if data is not None:
        group = _group(settings, "data")
        if not isinstance(group, dict):
            raise UserError(f"{where}: data: expected a source or a group of settings, got {shown(group)}")
        group["source"] = data
    return parse(override(settings, overrides, given), f"recipe {name}")


def override(
    settings: dict[str, Any], changes: Sequence[str], given: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Apply ``key.path=value`` changes to plain settings in place, and return these.

    Args:
        given: settings that options other than ``--set`` have changed, with these options.

    Raises:
        UserError: on a change that is not valid YAML, or that another one undoes.
    """
    made = dict(given or {})
    for change in changes:
        key = change.partition("=")[0]
        for other, option in made.items():
            # A group after one of its fields resets this field. The same key again is an ordinary override.
            if (other == key and not option.startswith("--set")) or other.startswith(f"{key}."):
                raise UserError(f"--set {change!r}: expected one change of {other}, got {option} too; leave one out")
        _apply(settings, change)
        made[key] = f"--set {change!r}"
    return settings


def parse(settings: dict[str, Any], where: str) -> Recipe:
    """Return the recipe of plain keys and values.

    Args:
        where: origin of the settings, for messages.

    Raises:
        UserError: with all mistakes in one line.
    """
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{where}: {describe_mistakes(error, settings, Recipe)}") from error


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: expected key=value, such as --set training.steps=200")
    value = read(text, f"--set {override!r}")
    *parents, last = key.split(".")
    group = settings
    for parent in parents:
        below = _group(group, parent) if group is settings else group.setdefault(parent, {})
        if not isinstance(below, dict):
            raise UserError(f"--set {override!r}: expected a group of settings, got {parent}, which is none")
        group = below
    group[last] = value


def _group(settings: dict[str, Any], name: str) -> Any:  # noqa: ANN401 the user's own value
    """Return a group of settings to be changed; a plain value becomes a group with its field first."""
    group = settings.setdefault(name, {})
    if name in PLAIN and isinstance(group, str):
        group = settings[name] = {PLAIN[name]: group}
    return group


def _written_out(value: Any) -> Any:  # noqa: ANN401 plain settings
    """Return a copy of plain settings without shared parts, such as YAML's aliases make: each can be changed alone."""
    if isinstance(value, dict):
        return {key: _written_out(part) for key, part in value.items()}
    return [_written_out(part) for part in value] if isinstance(value, list) else value
