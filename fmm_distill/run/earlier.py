"""The earlier student that a recipe starts from (``student.init``): its facts, its checks and its weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from fmm_distill.config.recipe import Recipe
from fmm_distill.config.settings import GuidanceSettings, IpAdapterSettings, StudentSettings
from fmm_distill.core.staged import stages_of
from fmm_distill.errors import UserError, first_line
from fmm_distill.export.load import fetch_initial
from fmm_distill.export.local_paths import public_name
from fmm_distill.export.manifest import read_manifest
from fmm_distill.export.place import recover
from fmm_distill.export.public import public_teacher
from fmm_distill.io.hashes import sha256_of_file
from fmm_distill.io.reading import BrokenFileError, read_mapping
from fmm_distill.run import inputs
from fmm_distill.run.earlier_files import RECIPE, StudentFiles, files_of
from fmm_distill.run.given import check_given
from fmm_distill.student.earlier import Form, form_of, load_earlier, same_base
from fmm_distill.teachers.scheduler import FLOW

if TYPE_CHECKING:
    from torch import Tensor

    from fmm_distill.export.manifest import StudentManifest
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["EarlierStudent", "read_earlier"]

logger = logging.getLogger(__name__)

_TODO = "restore it, or choose another student.init"
_COMMITS = "teacher.json"
# Settings of schedulers that decide about the noise levels.
_LEVELS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
    "shift",
    "flow_shift",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "rho",
)


@dataclass(frozen=True)
class EarlierStudent:
    """A student that was trained before, of a run or of an export.

    Attributes:
        source: the setting ``student.init``.
        commit: on the Hub; None: it is a folder.
        teacher: the name of its teacher.
        settings, guidance, ip_adapter, timesteps: of its recipe.
        manifest: of an export; None: it is a run.
        adapted: its adapters are loaded, and not the weights that they are merged into.
    """

    source: str
    files: StudentFiles
    commit: str | None
    teacher: str
    settings: StudentSettings
    guidance: GuidanceSettings
    ip_adapter: IpAdapterSettings
    timesteps: int | None
    manifest: StudentManifest | None
    adapted: bool

    def __str__(self) -> str:
        of_run = f" ({self.files.described})" if self.files.described else ""
        return f"{self.source}{f' at {self.commit}' if self.commit else ''}{of_run}"

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The weights by their names in the network of a student; of a run those that were trained."""
        try:
            found = _named(self.files, adapted=self.adapted)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"student.init {self.source}: expected complete files of weights ({type(error).__name__}: "
                f"{first_line(error)}); {_TODO}"
            ) from error
        return found

    @property
    def form(self) -> Form:
        """The kind and the rank of the student."""
        return form_of(self.weights)

    def prediction(self, teacher: Teacher) -> str | None:
        """Return the prediction of its network; None: its files don't have it.

        Args:
            teacher: that of the new student, which a run's has to be.
        """
        if self.settings.prediction != "teacher":
            return self.settings.prediction
        if self.manifest is None:
            return teacher.prediction
        config = self.manifest.scheduler
        return "flow_prediction" if config.get("_class_name") in FLOW else config.get("prediction_type")

    def check(self, recipe: Recipe, teacher: Teacher) -> None:
        """Refuse an earlier student whose map has another meaning than that of the recipe.

        Raises:
            UserError: on another time axis, another prediction, another range of guidance, or a run of another teacher.
        """
        name = f"student.init {self.source}"
        if self.timesteps != recipe.timesteps:
            then, now = ("null" if n is None else n for n in (self.timesteps, recipe.timesteps))
            raise UserError(f"{name}: expected timesteps {now}, got {then}; try --set timesteps={then}")
        if self.manifest is None:
            self._check_teacher_of_run(recipe, teacher)
        expected = recipe.student.prediction if recipe.student.prediction != "teacher" else teacher.prediction
        got = self.prediction(teacher)
        if got not in (None, expected):
            other = "v_prediction" if got == "v_prediction" else "teacher"
            raise UserError(
                f"{name}: expected a student that predicts {expected}, got {got}; try --set student.prediction={other}"
                f"{'' if other != recipe.student.prediction else ', or a student of this teacher'}"
            )
        if self.guidance.range != recipe.guidance.range:
            scales, ours = (
                "null" if one.range is None else list(one.range) for one in (self.guidance, recipe.guidance)
            )
            raise UserError(
                f"{name}: expected guidance.range {ours}, got {scales}; try --set 'guidance.range={scales}'"
            )
        here, there = teacher.scheduler_config, {} if self.manifest is None else self.manifest.scheduler
        for key in _LEVELS:
            if key in here and key in there and _plain(here[key]) != _plain(there[key]):
                raise UserError(
                    f"{name}: expected the noise levels of {teacher.source}, got others ({key} differs); try a student "
                    "of this teacher, or of a fine-tuned version of it"
                )

    def _check_teacher_of_run(self, recipe: Recipe, teacher: Teacher) -> None:
        """Refuse a run of another teacher: its files have neither the teacher's weights nor its noise levels."""
        folder = self.files.folder
        here = inputs.with_paths(recipe).teacher
        before = inputs.read_inputs(folder) or {}
        if self.teacher != here and not (
            "teacher" in before and inputs.same_content("teacher", before, inputs.contents(Recipe(teacher=here)))
        ):
            raise UserError(
                f"student.init {self.source}: expected a run of {here}, got one of {self.teacher}; to start from the "
                f"student of another teacher, try its exported folder, {folder / 'student'}"
            )
        commits = folder / _COMMITS
        commit = read_mapping(commits, todo=_TODO).get("revision") if commits.is_file() else None
        if commit is not None and teacher.revision not in (None, commit):
            raise UserError(
                f"student.init {self.source}: expected a run of {here} at {teacher.revision}, got one at {commit}; try "
                f"--set revision={commit}, or the exported folder, {folder / 'student'}"
            )
        check_given(folder, recipe, teacher)

    def _is_of(self, teacher: Teacher) -> bool:
        """Return whether its teacher is this one, by its name and by the weights that no training changes."""
        if self.manifest is None:
            return True
        names = {self.manifest.teacher, public_teacher(self.manifest.teacher, self.manifest.revision)}
        named = not names.isdisjoint((teacher.source, public_teacher(teacher.source, teacher.revision)))
        return named and (self.form.kind == "embedded" or same_base(self.weights, teacher.network))

    def _changed_velocity(self, recipe: Recipe) -> str | None:
        """Return a setting of its teacher's velocity that the recipe does not have; None: all are the recipe's."""
        for key in ("weight_name", "scale"):
            if getattr(self.ip_adapter, key) != getattr(recipe.ip_adapter, key):
                return f"ip_adapter.{key} {getattr(self.ip_adapter, key)}"
        for key in ("scale", "range", "interval", "image_scale"):
            if getattr(self.guidance, key) != getattr(recipe.guidance, key):
                return f"guidance.{key} {getattr(self.guidance, key)}"
        then, now = self.guidance.weaker, recipe.guidance.weaker
        # By their public names, since the recipe of an export has no path.
        same = then == now or (then is not None and now is not None and public_name(then) == public_name(now))
        return None if same else f"guidance.weaker {then}"

    def why_not_at_zero(self, recipe: Recipe, teacher: Teacher) -> str | None:
        """Return the reason why its change at h = 0 is not the recipe's; None: it is."""
        if self.form.kind != "scaled":
            return "it is of kind embedded"
        if not self._is_of(teacher):
            return f"its teacher is {self.teacher}"
        different = self._changed_velocity(recipe)
        return None if different is None else f"it has {different}"

    def load_into(self, student: Student, recipe: Recipe, teacher: Teacher) -> None:
        """Load its weights into a student that was made of the recipe's teacher.

        Args:
            teacher: as it was opened, with a network of its own.

        Raises:
            UserError: if it is of another form or architecture.
        """
        networks = [type(part).__name__ for part in stages_of(student.network)]
        if names := self.files.components:
            configs = [read_mapping(self.files.folder / name / "config.json", todo=_TODO) for name in names]
            classes = [config.get("_class_name", network) for config, network in zip(configs, networks, strict=False)]
            if classes != networks or len(names) != len(networks):
                expected, got = (
                    " and ".join(str(one).removeprefix("TwoTime") for one in ones) for ones in (networks, classes)
                )
                raise UserError(
                    f"student.init {self.source}: expected a student of {expected}, got one of {got}; try a student of "
                    "this teacher, or of a fine-tuned version of it"
                )
        reason, form = self.why_not_at_zero(recipe, teacher), self.form
        load_earlier(student, self.weights, self.source, diagonal=reason is None)
        name = f"student.init {self.source}"
        if not self._is_of(teacher):
            complete = form == Form("embedded", 0)
            how = "its weights replace those of" if complete else "its changes are added to the weights of"
            logger.warning(f"{name}: {how} {teacher.source}, which is not its teacher, {self.teacher}")
        if different := self._changed_velocity(recipe):
            logger.warning(f"{name}: it was trained with {different}, which this recipe has not")
        if form.kind == "scaled" and reason is not None and recipe.student.regression_steps:
            logger.warning(f"{name}: the regression starts from the teacher's weights, since {reason}")
        # The tensors are copied.
        self.__dict__.pop("weights", None)


def read_earlier(recipe: Recipe) -> EarlierStudent | None:
    """Find the student that a recipe starts from and read its facts, from the Hub if it is there; None: it has none.

    Raises:
        UserError: if there is no student, or its files are damaged.
    """
    source, revision = recipe.student.init, recipe.student.init_revision
    if source is None:
        return None
    folder, commit = Path(source).expanduser(), None
    recover(folder)
    if not folder.is_dir() and not source.startswith(("/", ".", "~")):
        try:
            folder = fetch_initial(source, revision)
        except UserError as error:
            raise UserError(f"student.init {error}") from error
        commit = folder.name
    elif revision is not None:
        raise UserError(f"student.init_revision: expected none for the folder {source}, got {revision}; leave it out")
    files = files_of(folder, source)
    manifest = read_manifest(files.folder) if files.components else None
    written = files.folder / RECIPE
    settings = read_mapping(written, {"teacher": str}, todo=_TODO)
    try:
        student = StudentSettings.model_validate(settings.get("student", {}))
        guidance = GuidanceSettings.model_validate(settings.get("guidance", {}))
        adapter = IpAdapterSettings.model_validate(settings.get("ip_adapter", {}))
    except ValidationError as error:
        raise BrokenFileError(f"{written}: expected the settings of a recipe ({first_line(error)}); {_TODO}") from error
    # An export has the weights that the adapters are merged into as well.
    adapted = manifest is not None and manifest.kind == "embedded" and recipe.student.lora.rank > 0
    adapted = adapted and not {"pytorch_lora_weights", "jump_embedding"} - files.adapters.keys()
    teacher = settings["teacher"] if manifest is None else manifest.teacher
    timesteps = settings.get("timesteps")
    return EarlierStudent(source, files, commit, teacher, student, guidance, adapter, timesteps, manifest, adapted)


def _named(files: StudentFiles, *, adapted: bool) -> dict[str, Tensor]:
    """Read the weights of a student by their names in its network."""
    if not files.components:
        (path,) = files.weights
        digests = read_mapping(path.parent / "manifest.json", {"sha256": dict}, todo=_TODO)["sha256"]
        if sha256_of_file(path) != digests.get(path.name):
            raise UserError(f"{path}: expected the file that the run wrote, got a changed one; {_TODO}")
        stored = load_file(path)
        return {name.removeprefix("network."): value for name, value in stored.items() if name != "n_averaged"}
    # The weights of two networks have the names of their components in the network of a student.
    alone = len(files.components) == 1
    prefix = f"{files.components[0]}." if alone else ""
    if adapted:
        lora = load_file(files.adapters["pytorch_lora_weights"])
        # The name of peft's adapter is no part of the file format of diffusers.
        named = {name.removeprefix(prefix).replace(".weight", ".default.weight"): v for name, v in lora.items()}
        return named | load_file(files.adapters["jump_embedding"])
    found: dict[str, Tensor] = {}
    for path in files.weights:
        of_network = "" if alone else f"{path.parent.name}."
        found |= {f"{of_network}{name}": value for name, value in load_file(path).items()}
    # The export merges the change at h = 0 of low rank into the weights.
    if "guidance" in files.adapters and any(name.endswith("jump_A") for name in found):
        for name, value in load_file(files.adapters["guidance"]).items():
            layer, _, factor = name.removeprefix(prefix).removesuffix(".weight").rpartition(".")
            found[f"{layer}.{factor.replace('lora', 'diagonal')}"] = value
    return found


def _plain(value: Any) -> Any:  # noqa: ANN401 a setting of a scheduler
    """Return a setting as JSON has it."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, tuple) else value
