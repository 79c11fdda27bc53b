"""A student from its folder or from the Hub, as the map that it is."""

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
from fmm_distill.core.solvers import solve
from fmm_distill.core.torch_state import own_state
from fmm_distill.errors import UserError, first_line
from fmm_distill.export.manifest import ABOUT, About, read_about
from fmm_distill.export.place import recover
from fmm_distill.io.reading import read_mapping
from fmm_distill.student.fold import OWN_SETTINGS
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.components import quiet
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.hub.errors import HUB_ERRORS, hub_reason
from fmm_distill.teachers.hub.links import linked_folder
from fmm_distill.teachers.load import load_teacher

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["LoadedStudent", "fetch_student", "load_student"]

_CLOSE = 1e-6
_TODO = "fetch or export the student again"


@dataclass
class LoadedStudent:
    """A student that was loaded, and what it takes to use it.

    Attributes:
        flow_map: ``flow_map(x, t, r, cond)`` is X(x, t, r); t = 1 is noise, t = 0 data.
        about: what it is and where it comes from.
        teacher: the network that it was made of, with the student's weights on the diagonal, and its codec.
    """

    flow_map: Student
    about: About
    teacher: Teacher

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Of one sample: of an image, or of a latent."""
        return self.teacher.event_shape

    def told(self, count: int, conditions: Sequence[int] | None = None) -> Conditioning | None:
        """What ``count`` samples are told: the classes or prompts of these numbers; None: all in turn."""
        known = self.teacher.conditions
        if known is None:
            if conditions is not None:
                raise UserError("this student is unconditional; wanted no conditions")
            return None
        numbers = [i % len(known.names) for i in range(count)] if conditions is None else list(conditions)
        if len(numbers) != count or not all(0 <= number < len(known.names) for number in numbers):
            raise UserError(
                f"conditions {numbers}: wanted {count} numbers below {len(known.names)}, one a sample; they are those "
                "of the classes, or of the prompts that load_student was given"
            )
        return self.teacher.conditioned_on((torch.tensor(numbers, dtype=torch.float64) + 0.5) / len(known.names))

    def generate(
        self,
        noise: Float[Tensor, "batch *event"],
        steps: int | Float[Tensor, " points"] = 4,
        conditions: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """Samples, or latents of them, from N(0, I) by ``steps`` jumps, or between the times given, from 1 to 0.

        Raises:
            UserError: on conditions that it has not, or times that don't go down from noise to data.
        """
        if not isinstance(steps, int):
            self._check_times(steps)
        return sample(self.flow_map, noise, steps, self.told(len(noise), conditions))

    def _check_times(self, times: Float[Tensor, " points"]) -> None:
        t_max = self.flow_map.t_max
        falls = times.ndim == 1 and len(times) > 1 and bool((times.diff() < 0).all())
        if not falls or times[-1] < 0 or abs(float(times[0]) - t_max) > _CLOSE:
            raise UserError(f"times {times.tolist()}: wanted two or more, falling from {t_max:g} (noise) to 0 (data)")

    @torch.no_grad()
    def encode(
        self,
        samples: Float[Tensor, "batch *event"],
        steps: int = 32,
        conditions: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """The noise, N(0, I), that samples or their latents come from: ``generate`` the other way.

        Students learn to jump from noise towards data. This way goes along the map's diagonal, ``u(x, t, t)``, which is
        a velocity and has no direction, by ``steps`` steps of Heun's method, two network calls each.

        Raises:
            UserError: on conditions that it has not.
        """
        schedule = self.flow_map.schedule
        times = schedule.time_at(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).to(samples.device)
        cond = self.told(len(samples), conditions)
        ends = solve(diagonal(self.flow_map), samples, times, method="heun", cond=cond)
        return ends / self.flow_map.parametrization.prior(torch.ones_like(samples))

    def decode(self, samples: Float[Tensor, "batch *event"]) -> Tensor:
        """What samples stand for: images of range -1 to 1, videos or waves; pixels are themselves."""
        return self.teacher.codec.decode(samples)


@own_state()
def load_student(source: str | Path, *, revision: str | None = None, prompts: Sequence[str] = ()) -> LoadedStudent:
    """A student that fmm_distill exported, for any number of steps and any times.

    Args:
        source: the Hub's id, or a folder.
        revision: branch, tag or commit on the Hub.
        prompts: what a student of prompts is to be asked for; none: the empty prompt.

    Raises:
        UserError: if it can't be found, or is not what fmm_distill exports.
    """
    folder = Path(source).expanduser()
    recover(folder)
    if not folder.is_dir():
        folder = fetch_student(str(source), revision)
    elif revision is not None:
        raise UserError(f"{source}: revision {revision} is of a student on the Hub, this is a folder; leave it out")
    about = read_about(folder)
    guidance = None
    if about.guidance is not None:
        scales = about.guidance["range"]
        guidance = Guidance(about.guidance["scale"], range=None if scales is None else tuple(scales))
    try:
        teacher = _open(_stock_view(folder, about), str(source), prompts, about.call, guidance)
        student = Student.from_teacher(teacher)
        weights: dict[str, Tensor] = {}
        for file in sorted((folder / teacher.component).glob("*.safetensors")):
            weights |= load_file(file)
        student.network.load_state_dict(weights)
    except (OSError, RuntimeError, LookupError, ValueError, SafetensorError) as error:
        first = first_line(error)
        raise UserError(
            f"{source}: its files are not those of a whole student ({type(error).__name__}: {first}); fetch or export "
            "it again"
        ) from error
    return LoadedStudent(student.eval(), about, teacher)


def _open(view: Path, source: str, prompts: Sequence[str], call: dict[str, Any], guidance: Guidance | None) -> Teacher:
    try:
        with _silent():
            return load_teacher(str(view), prompts=prompts, call=call, guidance=guidance)
    except UserError as error:
        raise UserError(str(error).replace(str(view), source)) from error


def fetch_student(source: str, revision: str | None = None) -> Path:
    """The folder of an exported student of the Hub, without its folded pipelines.

    Raises:
        UserError: if it can't be had, or holds no exported student.
    """
    try:
        folder = Path(snapshot_download(source, revision=revision, ignore_patterns=["steps-*", "lora/*"]))
    except HFValidationError as error:
        raise UserError(f"{source}: neither a folder nor a Hub id; wanted owner/name or an existing path") from error
    except (*HUB_ERRORS, ValueError, RuntimeError) as error:
        raise UserError(f"{source}: no such folder here, and of the Hub: {hub_reason(error)}") from error
    if not (folder / ABOUT).is_file():
        raise UserError(f"{source} holds no exported student (no {ABOUT}); wanted what fmm-distill publish sends")
    return folder


def _stock_view(folder: Path, about: About) -> Path:
    """The student's folder as the stock pipeline that its diagonal is: links to its files, and the teacher's scheduler.

    So it is opened by the adapter that opened its teacher.
    """

    def fill(view: Path) -> None:
        index = read_mapping(folder / "model_index.json", todo=_TODO)
        plain: dict[str, Any] = {"_class_name": about.pipeline or "DDPMPipeline"}
        for name, value in index.items():
            if name.startswith("_"):
                continue
            plain[name] = value
            settings = folder / name / "config.json"
            config = read_mapping(settings, todo=_TODO) if settings.is_file() else {}
            if name == "scheduler":
                plain[name] = ["diffusers", about.scheduler["_class_name"]]
                (view / name).mkdir()
                (view / name / "scheduler_config.json").write_text(json.dumps(about.scheduler), encoding="utf-8")
            elif isinstance(value, list) and str(value[0]).startswith("two_time_"):
                plain[name] = ["diffusers", _stock_network(folder / name, view / name, config)]
            elif (folder / name).is_dir():
                (view / name).symlink_to((folder / name).resolve())
        (view / "model_index.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")

    return linked_folder("students", folder, __version__, fill)


def _stock_network(folder: Path, target: Path, config: dict[str, Any]) -> str:
    """Link a two-time network's weights under the configuration of the stock one; gives the stock class."""
    stock = str(config["_class_name"]).removeprefix("TwoTime")
    kept = {key: value for key, value in config.items() if key not in (*OWN_SETTINGS, "auto_map")}
    target.mkdir()
    for path in folder.glob("*.safetensors*"):
        (target / path.name).symlink_to(path.resolve())
    (target / "config.json").write_text(json.dumps(kept | {"_class_name": stock}), encoding="utf-8")
    return stock


@contextmanager
def _silent() -> Iterator[None]:
    """The stock network has no place for the embedding of the jump, and diffusers would say so."""
    logging = diffusers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with quiet():
            yield
    finally:
        logging.set_verbosity(before)
