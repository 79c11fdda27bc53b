"""Load an exported student as a flow map, from its folder or from the Hub."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from fmm_distill import __version__
from fmm_distill.core.flow_map import diagonal
from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.core.solvers import solve
from fmm_distill.core.staged import parts_of
from fmm_distill.core.torch_state import own_state
from fmm_distill.errors import UserError, first_line
from fmm_distill.export.adapter_code import own_adapter
from fmm_distill.export.manifest import MANIFEST, StudentManifest, read_manifest
from fmm_distill.export.pipeline_files import further_folders
from fmm_distill.export.place import recover
from fmm_distill.export.weights import NETWORK, SCALED
from fmm_distill.io.reading import read_mapping
from fmm_distill.student.fold import OWN_SETTINGS
from fmm_distill.student.sampling import sample
from fmm_distill.student.scaled import ScaledWeights
from fmm_distill.student.student import Student, StudentPrediction
from fmm_distill.teachers.components import without_progress_bars
from fmm_distill.teachers.first_timesteps import on_first_timesteps
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.hub.errors import HUB_ERRORS, hub_reason
from fmm_distill.teachers.hub.links import linked_folder
from fmm_distill.teachers.ip_adapter import FOLDER
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompted.refused_keywords import refused_keyword
from fmm_distill.teachers.prompts import as_prompts
from fmm_distill.teachers.velocity_field import as_teacher

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.prompts import Prompts
    from fmm_distill.teachers.velocity_field import KnownVelocity

__all__ = ["ADAPTERS", "LoadedStudent", "components_of", "fetch_initial", "fetch_student", "load_student"]

# The stems of the files of adapters that another student can start from.
ADAPTERS = ("pytorch_lora_weights", "jump_embedding", "guidance")

# The first of a caller's times may be t_max in float32.
_CLOSE = 1e-6
_TODO = "fetch or export the student again"


@dataclass
class LoadedStudent:
    """A loaded student, with what its use needs.

    Attributes:
        flow_map: ``flow_map(x, t, r, cond)`` is X(x, t, r); t = 1 is noise, t = 0 data.
        manifest: the facts of the student, and where it comes from.
        teacher: the network that the student was made of, with the student's weights on the diagonal, and its codec;
            of a student of weights alone the teacher that was passed.
    """

    flow_map: Student
    manifest: StudentManifest
    teacher: Teacher

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one sample: of an image, or of a latent."""
        return self.teacher.event_shape

    def conditioned_on(self, count: int, conditions: Sequence[int] | None = None) -> Conditioning | None:
        """Return the conditions of ``count`` samples.

        Args:
            conditions: the numbers of the classes or prompts, one per sample; None: all in turn.

        Raises:
            UserError: on conditions that the student has not.
        """
        known = self.teacher.conditions
        if known is None:
            if conditions is not None:
                raise UserError("conditions: expected none for an unconditional student; leave them out")
            return None
        numbers = [i % len(known.names) for i in range(count)] if conditions is None else list(conditions)
        if len(numbers) != count or not all(0 <= number < len(known.names) for number in numbers):
            raise UserError(
                f"conditions: expected {count} numbers below {len(known.names)}, one per sample, got {numbers}; they "
                "count the classes, or the prompts that load_student was called with"
            )
        return self.teacher.conditioned_on((torch.tensor(numbers, dtype=torch.float64) + 0.5) / len(known.names))

    def generate(
        self,
        noise: Float[Tensor, "batch *event"],
        steps: int | Float[Tensor, " points"] = 4,
        conditions: Sequence[int] | None = None,
        *,
        stochasticity: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """Generate samples, or latents of them.

        Args:
            noise: N(0, I), shape ``[batch, *event]``.
            steps: the number of jumps, or the decreasing times between which to jump, from ``t_max`` to 0.
            conditions: the numbers of the classes or prompts, one per sample; None: all in turn.
            stochasticity: the strength of the fresh noise in each step, at least 0; 0: none.
            generator: of the fresh noise, one or one per sample; None: torch's own.

        Raises:
            UserError: on conditions that the student has not, times that don't decrease from noise to data, or a
                stochasticity that is negative or not finite.
        """
        if not isinstance(steps, int):
            self._check_times(steps)
        cond = self.conditioned_on(len(noise), conditions)
        return sample(self.flow_map, noise, steps, cond, stochasticity=stochasticity, generator=generator)

    def _check_times(self, times: Float[Tensor, " points"]) -> None:
        t_max = self.flow_map.t_max
        falls = times.ndim == 1 and len(times) > 1 and bool((times.diff() < 0).all())
        if not falls or times[-1] < 0 or abs(float(times[0]) - t_max) > _CLOSE:
            raise UserError(
                f"steps: expected two or more times that decrease from {t_max:g} (noise) to 0 (data), got "
                f"{times.tolist()}; or pass a number of steps"
            )

    @torch.no_grad()
    def encode(
        self,
        samples: Float[Tensor, "batch *event"],
        steps: int = 32,
        conditions: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """Return the noise, N(0, I), that generates these samples, or latents of them.

        Students learn to jump from noise towards data. The inverse integrates the map's diagonal, ``u(x, t, t)``, which
        is a velocity and has no direction, by Heun's method.

        Args:
            steps: the number of steps of Heun's method, of two network calls each.

        Raises:
            UserError: on conditions that the student has not.
        """
        schedule = self.flow_map.schedule
        times = schedule.time_at(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).to(samples.device)
        cond = self.conditioned_on(len(samples), conditions)
        # Heun from data to noise: it calls the field at both ends of a step and nowhere outside of the axis.
        ends = solve(diagonal(self.flow_map), samples, times, method="heun", cond=cond)
        return ends / self.flow_map.parametrization.prior(torch.ones_like(samples))

    def decode(self, samples: Float[Tensor, "batch *event"]) -> Tensor:
        """Decode samples to images in [-1, 1], videos or waves; pixels are returned as they are."""
        return self.teacher.codec.decode(samples)


@own_state()
def load_student(
    source: str | Path,
    *,
    revision: str | None = None,
    prompts: Sequence[str] | Prompts = (),
    teacher: Teacher | KnownVelocity | None = None,
    network: nn.Module | None = None,
) -> LoadedStudent:
    """Load a student that fmm_distill exported, for any number of steps and any times.

    Args:
        source: an id on the Hub, or a folder.
        revision: branch, tag or commit on the Hub.
        prompts: the prompts that the student is called with, ``Prompts`` with images; none: the empty prompt.
        teacher: the teacher of a student that was exported as weights alone; None: the one that the manifest names.
        network: the network that such a student was started from, where the teacher has none.

    Raises:
        UserError: if the student can't be found, or is not what fmm_distill exports.
    """
    folder = Path(source).expanduser()
    recover(folder)
    if not folder.is_dir():
        folder = fetch_student(str(source), revision)
    elif revision is not None:
        raise UserError(f"revision: expected none for the folder {source}, got {revision}; leave it out")
    manifest = read_manifest(folder)
    if manifest.not_any_step:
        opened = _on_timesteps_of(manifest, _teacher_of_weights(manifest, str(source), teacher))
        component = NETWORK
        changed = manifest.scheduler.get("prediction_type") == "v_prediction" and opened.prediction != "v_prediction"
        prediction: StudentPrediction = "v_prediction" if changed else "teacher"
        student = Student.from_teacher(opened, prediction, network=network, scaled=_scaled_weights(folder / component))
    else:
        if teacher is not None or network is not None:
            raise UserError(f"teacher: expected none, {source} is complete; leave teacher and network out")
        given = as_prompts(prompts)
        _check_images(manifest, given, str(source))
        opened, student = _student_of_pipeline(folder, str(source), manifest, given)
        component = "unet" if opened.pipeline is None else opened.pipeline.component
    for name, part in parts_of(student.network, component).items():
        _load_weights(part, folder / name, str(source))
    return LoadedStudent(student.eval(), manifest, opened)


def _check_images(manifest: StudentManifest, prompts: Prompts, source: str) -> None:
    """Check that the images are those that the student was trained with, by their keywords."""
    if set(prompts.images) == set(manifest.images):
        return
    expected, got = (", ".join(sorted(names)) or "none" for names in (manifest.images, prompts.images))
    given = ", ".join(f'"{name}": [...]' for name in manifest.images)
    raise UserError(
        f"{source}: expected images with the prompts by the keywords {expected}, got {got}; try "
        f"load_student(..., prompts=Prompts(texts, {{{given}}})), with an image per text"
    )


def _load_weights(network: nn.Module, folder: Path, source: str) -> None:
    try:
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        network.load_state_dict(weights)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _incomplete(source, error) from error


def _incomplete(source: str, error: Exception) -> UserError:
    return UserError(
        f"{source}: expected the files of a complete student ({type(error).__name__}: {first_line(error)}); fetch or "
        "export it again"
    )


def _teacher_of_weights(manifest: StudentManifest, source: str, teacher: Teacher | KnownVelocity | None) -> Teacher:
    """Return the teacher of a student that was exported as weights alone."""
    if teacher is not None:
        return as_teacher(teacher)
    try:
        return load_teacher(manifest.teacher, revision=manifest.revision)
    except UserError as error:
        raise UserError(
            f"{source} holds weights alone, and its teacher {manifest.teacher} is not a pipeline that can be loaded "
            f"({error}); pass load_student(..., teacher=...)"
        ) from error


def _on_timesteps_of(manifest: StudentManifest, teacher: Teacher) -> Teacher:
    """Return the teacher on the timesteps that the student was trained on: some students leave out the noisiest."""
    betas = manifest.scheduler.get("trained_betas")
    discrete = isinstance(teacher.schedule, VariancePreserving)
    return on_first_timesteps(teacher, len(betas) if betas is not None and discrete else None)


def _student_of_pipeline(
    folder: Path, source: str, manifest: StudentManifest, prompts: Prompts
) -> tuple[Teacher, Student]:
    """Open the diagonal of an exported student by the adapter of its teacher, and make the student of it."""
    guidance = None
    if manifest.guidance is not None:
        scales = manifest.guidance["range"]
        guidance = Guidance(manifest.guidance["scale"], range=None if scales is None else tuple(scales))
    try:
        # The manifest has the keywords of the recipe, and those that the program sets itself and will set again.
        call = {name: value for name, value in manifest.call.items() if refused_keyword((name,)) is None}
        teacher = _open(_teacher_view(folder, manifest), source, manifest, prompts, call, guidance)
        component = "unet" if teacher.pipeline is None else teacher.pipeline.component
        return teacher, Student.from_teacher(teacher, scaled=_scaled_weights(folder / component))
    except (OSError, RuntimeError, LookupError, ValueError, SafetensorError) as error:
        raise _incomplete(source, error) from error


def _scaled_weights(network: Path) -> ScaledWeights | None:
    """Return the changes of the weights that an exported network has; None: it embeds the length of the jump."""
    layers = read_mapping(network / "config.json", todo=_TODO).get(SCALED)
    return ScaledWeights(layers=layers) if layers else None


def _open(
    view: Path,
    source: str,
    manifest: StudentManifest,
    prompts: Prompts,
    call: dict[str, Any],
    guidance: Guidance | None,
) -> Teacher:
    facts = manifest.ip_adapter
    adapter = None if facts is None else own_adapter(str(view), facts)
    try:
        with _without_warnings():
            return load_teacher(str(view), prompts=prompts, call=call, guidance=guidance, ip_adapter=adapter)
    except UserError as error:
        raise UserError(str(error).replace(str(view), source)) from error


def fetch_student(source: str, revision: str | None = None) -> Path:
    """Download an exported student from the Hub, without its pipelines of fixed numbers of steps.

    Returns:
        The folder.

    Raises:
        UserError: if it can't be had, or holds no exported student.
    """
    # The folded pipelines and adapters repeat the weights, and nothing here reads them.
    return _download(source, revision, left_out=["steps-*", "lora/*"])


def fetch_initial(source: str, revision: str | None = None) -> Path:
    """Download of an exported student on the Hub what another student starts from: its network and its adapters.

    Returns:
        The folder, whose name is the commit.

    Raises:
        UserError: if it can't be had, or holds no exported student.
    """
    folder = _download(source, revision, [MANIFEST, "recipe.yaml", "model_index.json"])
    # Text encoders and autoencoders are large, and those of the teacher are used.
    names = [*(f"{name}/*" for name in components_of(folder)), *(f"lora/{stem}.safetensors" for stem in ADAPTERS)]
    return _download(source, folder.name, [MANIFEST, *names])


def components_of(folder: Path) -> tuple[str, ...]:
    """Return the names of the folders of the networks in an exported folder.

    Raises:
        UserError: if its pipeline has none.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return (NETWORK,)
    entries = read_mapping(index, todo=_TODO).items()
    # The module of a network is code of the export.
    found = [name for name, value in entries if isinstance(value, list) and str(value[0]).startswith("two_time_")]
    if not found:
        raise UserError(f"{index}: expected the network of a student in it, got none; {_TODO}")
    return tuple(sorted(found))


def _download(
    source: str, revision: str | None, files: list[str] | None = None, *, left_out: list[str] | None = None
) -> Path:
    """Download files of a repository that holds an exported student.

    Args:
        files: patterns of their names; None: all.
        left_out: patterns of the names of files that are not downloaded.
    """
    try:
        path = snapshot_download(source, revision=revision, allow_patterns=files, ignore_patterns=left_out)
        folder = Path(path)
    except HFValidationError as error:
        raise UserError(f"{source}: expected owner/name on the Hub or an existing folder, got neither") from error
    except (*HUB_ERRORS, ValueError, RuntimeError) as error:
        raise UserError(f"{source}: no such folder here, and on the Hub: {hub_reason(error)}") from error
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{source}: expected a student that fmm-distill publish sends, got a repository without {MANIFEST}"
        )
    return folder


def _teacher_view(folder: Path, manifest: StudentManifest) -> Path:
    """Return the folder of the stock pipeline that the student's diagonal is, with the teacher's scheduler.

    It consists of links to the student's files, so that the adapter of its teacher opens it.
    """

    def fill(view: Path) -> None:
        index = read_mapping(folder / "model_index.json", todo=_TODO)
        plain: dict[str, Any] = {"_class_name": manifest.pipeline or "DDPMPipeline"}
        # StableDiffusionInpaintPipeline does not open without the version of diffusers that wrote its folder.
        plain["_diffusers_version"] = index.get("_diffusers_version", diffusers.__version__)
        for name, value in index.items():
            if name.startswith("_"):
                continue
            plain[name] = value
            settings = folder / name / "config.json"
            config = read_mapping(settings, todo=_TODO) if settings.is_file() else {}
            if name == "scheduler":
                plain[name] = ["diffusers", manifest.scheduler["_class_name"]]
                (view / name).mkdir()
                (view / name / "scheduler_config.json").write_text(json.dumps(manifest.scheduler), encoding="utf-8")
            elif isinstance(value, list) and str(value[0]).startswith("two_time_"):
                plain[name] = ["diffusers", _one_time_network(folder / name, view / name, config)]
            elif (folder / name).is_dir():
                for each in (name, *further_folders(folder, name, index)):
                    (view / each).symlink_to((folder / each).resolve())
        if manifest.ip_adapter is not None:
            (view / FOLDER).symlink_to((folder / FOLDER).resolve())
        (view / "model_index.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")

    # The version is part of the key: another version may write the view in another way.
    return linked_folder("students", folder, __version__, fill)


def _one_time_network(folder: Path, target: Path, config: dict[str, Any]) -> str:
    """Link the weights of a two-time network under the configuration of its stock class, and return that class."""
    stock = str(config["_class_name"]).removeprefix("TwoTime")
    plain = {key: value for key, value in config.items() if key not in (*OWN_SETTINGS, "auto_map")}
    target.mkdir()
    # The index of a sharded file as well.
    for path in folder.glob("*.safetensors*"):
        (target / path.name).symlink_to(path.resolve())
    (target / "config.json").write_text(json.dumps(plain | {"_class_name": stock}), encoding="utf-8")
    return stock


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the warning that the stock network has no weights for the embedding of the jump."""
    logging = diffusers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        logging.set_verbosity(before)
