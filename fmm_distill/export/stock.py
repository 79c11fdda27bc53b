"""Copies of a teacher's stock pipeline with the student in it: of any number of steps, and folded."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
from typing import TYPE_CHECKING, Any, cast

import diffusers
import torch

from fmm_distill.export.stock_pipeline import jumping
from fmm_distill.schedules import Angular, FlowMatching, VarianceExploding, VariancePreserving
from fmm_distill.student import fold
from fmm_distill.teachers.components import open_pipeline
from fmm_distill.teachers.embedding import told_apart
from fmm_distill.teachers.prompted import RecordedCall
from fmm_distill.teachers.recording import record, run_pipeline, tensor_of

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.student import Student
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.velocity import Conditioning

__all__ = [
    "any_step_settings",
    "any_step_times",
    "copy_pipeline",
    "folded_network",
    "guidance_keyword",
    "start_of",
    "stock_scheduler",
    "unguided",
    "verification_call",
]

_NOT_OPENED = (".bin", ".bin.index.json", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".py")
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json
_VARIANT = re.compile(r"\.\w+(-\d+-of-\d+)?\.safetensors$|\.safetensors\.index\.\w+\.json$")


def copy_pipeline(teacher: Teacher, target: Path, source: Path | None = None) -> dict[str, Any]:
    """The pipeline's components besides network and scheduler, copied; gives the index for them.

    Args:
        source: a copy made before on the same disk: its files are linked, not copied.
    """
    origin = cast("Path", teacher.folder)
    index: dict[str, Any] = json.loads((origin / "model_index.json").read_text(encoding="utf-8"))
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or name in (teacher.component, "scheduler"):
            continue
        if source is not None and (source / name).is_dir():
            shutil.copytree(source / name, target / name, copy_function=_linked)
        elif (origin / name).is_dir():
            shutil.copytree(origin / name, target / name, ignore=_unused)
    return index


def _unused(folder: str, names: list[str]) -> list[str]:
    """What a component's folder has besides what stock diffusers opens: pickles, code, other variants' weights."""
    return [name for name in names if name.endswith(_NOT_OPENED) or _VARIANT.search(name)]


def _linked(source: str, target: str) -> None:
    """A hard link, or a copy where the disk has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def stock_scheduler(teacher: Teacher, prediction: str) -> Any:  # noqa: ANN401 a diffusers class
    """A stock scheduler with the teacher's levels, of first order where there is one; nothing clipped."""
    config, kind = teacher.scheduler_config, teacher.scheduler_config["_class_name"]
    if isinstance(teacher.schedule, VariancePreserving):
        stock = diffusers.CogVideoXDDIMScheduler if kind.startswith("CogVideoX") else diffusers.DDIMScheduler
        changes = {"prediction_type": prediction, "timestep_spacing": "trailing", "set_alpha_to_one": True}
        if str(config.get("variance_type")).startswith("learned"):
            # Some pipelines hand their scheduler the learned variance if it says so, and this one takes none.
            config = config | {"variance_type": "fixed_small"}
        return stock.from_config(config, **changes, clip_sample=False, **_no_thresholding(stock))
    if isinstance(teacher.schedule, Angular):
        return diffusers.IPNDMScheduler.from_config(config)
    if isinstance(teacher.schedule, VarianceExploding):
        return diffusers.EDMEulerScheduler.from_config(config)
    if kind == "FlowMatchEulerDiscreteScheduler":
        # Stretched to a last level, a grid of one step divides by zero; its last step is empty anyway.
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, shift_terminal=None)
    return diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=teacher.schedule.num_timesteps, shift=cast("FlowMatching", teacher.schedule).shift
    )


def _no_thresholding(stock: Any) -> dict[str, bool]:  # noqa: ANN401 a diffusers class
    return {"thresholding": False} if stock is diffusers.DDIMScheduler else {}


def any_step_settings(teacher: Teacher) -> dict[str, Any]:
    """What the travelling pipeline has to know of the teacher's times, for the network's configuration."""
    schedule, ask = teacher.schedule, teacher.parametrisation.call
    slope, offset = (ask.slope, ask.offset) if isinstance(ask, RecordedCall) else (1.0, 0.0)
    inverted = bool(teacher.scheduler_config.get("invert_sigmas"))
    own: dict[str, Any] = {"slope": slope, "offset": offset, "flip": schedule.num_timesteps if inverted else None}
    own |= {"call": teacher.call | unguided(teacher), "guidance": guidance_keyword(teacher)}
    own |= {"scale": None if teacher.guidance is None else teacher.guidance.scale}
    if isinstance(schedule, VariancePreserving):
        return own | {"kind": "discrete", "total": schedule.num_timesteps}
    if isinstance(schedule, Angular):
        return own | {"kind": "angular"}
    if isinstance(schedule, FlowMatching):
        return own | {"kind": "flow", "shift": schedule.shift, "told_before": schedule.told_before}
    exploding = cast("VarianceExploding", schedule)
    rho = None if math.isinf(exploding.rho) else exploding.rho
    return own | {"kind": "exploding", "sigma_min": exploding.sigma_min, "sigma_max": exploding.sigma_max, "rho": rho}


def guidance_keyword(teacher: Teacher) -> str | None:
    """The keyword of the pipeline's own classifier-free guidance."""
    if teacher.conditions is None:
        return None
    keys = getattr(teacher.codec, "keys", None)
    return keys.guidance if keys is not None else "guidance_scale"


def unguided(teacher: Teacher) -> dict[str, Any]:
    """The keywords that turn the pipeline's own guidance off, and tell a guided network its guidance."""
    if teacher.conditions is None:
        return {}
    keys = getattr(teacher.codec, "keys", None)
    if keys is None:
        return {"guidance_scale": 1.0}
    told = {name: value for name, value in keys.fixed.items() if name == "guidance_scale"}
    return told | ({keys.guidance: keys.off} if keys.guidance else {})


def verification_call(teacher: Teacher, count: int) -> dict[str, Any]:
    """Keywords under which stock pipelines make ``count`` samples, of the teacher's first conditions if it has any."""
    if teacher.conditions is None:
        return {"batch_size": count}
    names = cast("Any", teacher.conditions).names
    some = [names[i % len(names)] for i in range(count)]
    if isinstance(teacher.parametrisation.call, RecordedCall):
        index = json.loads((cast("Path", teacher.folder) / "model_index.json").read_text(encoding="utf-8"))
        # A pipeline of pixels has no latents to give.
        output = "latent" if any(name.startswith(("vae", "vq", "movq")) for name in index) else "np"
        return teacher.call | unguided(teacher) | {"prompt": some, "output_type": output}
    return {"class_labels": [int(name) for name in some], "output_type": "np"} | unguided(teacher)


def _opened(teacher: Teacher, prediction: str) -> Any:  # noqa: ANN401 a diffusers class
    given = {teacher.component: teacher.network, "scheduler": stock_scheduler(teacher, prediction)}
    pipeline = open_pipeline(cast("Path", teacher.folder), **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def start_of(
    teacher: Teacher, call: dict[str, Any], seed: int
) -> tuple[Float[Tensor, "batch *event"], Conditioning | None]:
    """The N(0, I) that the stock pipeline starts from with this seed, and what it tells its network of its prompts.

    These may be padded otherwise than among all prompts of a run. None of a pipeline that is told classes or nothing.
    """
    pipeline = _opened(teacher, teacher.prediction)
    count = next((len(value) for value in call.values() if isinstance(value, list)), call.get("batch_size", 1))
    given = copy.deepcopy(call) | {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(seed)}
    seen = record(pipeline, teacher.component, given)
    x = tensor_of(next(iter(seen.asked[0].given.values())))
    ask, cond = teacher.parametrisation.call, None
    if isinstance(ask, RecordedCall):
        one = copy.deepcopy(given) | {"prompt": call["prompt"][:1]}
        single = record(pipeline, teacher.component, one, first_only=True).asked[0].given
        cond = told_apart(seen.asked[0].given, (ask.sample, ask.time), count, single)
    if isinstance(teacher.schedule, VarianceExploding):
        return seen.steps[0].sample / (teacher.schedule.sigma_max**2 + 1) ** 0.5, cond
    return x[:count], cond


def folded_network(student: Student, teacher: Teacher, steps: int) -> tuple[Any, Any, Tensor]:
    """The folded network, its scheduler, and the times between which the stock pipeline then jumps."""
    scheduler = stock_scheduler(teacher, student.prediction)
    if isinstance(teacher.schedule, VariancePreserving):
        times = student.schedule.grid(steps)
        return fold(student, teacher, times), scheduler, times
    times = _stock_times(student, teacher, scheduler, steps)
    schedule = student.schedule
    last = float(schedule.position(times[-2:-1]))
    # Where the network is told the time before the shift the pipeline gives its own timesteps, which don't stretch.
    told_before = isinstance(schedule, FlowMatching) and schedule.told_before
    if steps > 1 and last < 0.5 / steps and not told_before:
        # The stock grid ends in an almost empty step: stretched, its last level is that of equal steps.
        terminal = float(schedule.grid(steps)[-2])
        scheduler = type(scheduler).from_config(scheduler.config, shift_terminal=terminal)
        times = _stock_times(student, teacher, scheduler, steps)
    return fold(student, teacher, times), scheduler, times


def any_step_times(student: Student, teacher: Teacher, steps: int) -> Tensor:
    """The times between which the any-step pipeline jumps."""
    if not isinstance(teacher.schedule, FlowMatching):
        return student.schedule.grid(steps)
    scheduler = jumping(stock_scheduler(teacher, student.prediction), any_step_settings(teacher))
    return _stock_times(student, teacher, scheduler, steps)


def _stock_times(student: Student, teacher: Teacher, scheduler: Any, steps: int) -> Tensor:  # noqa: ANN401 diffusers
    """The times that the stock pipeline takes with this scheduler, data at the end."""
    pipeline = _opened(teacher, student.prediction)
    pipeline.scheduler = scheduler
    call = verification_call(teacher, 1) | {"num_inference_steps": steps}
    run_pipeline(pipeline, call | {"generator": torch.Generator().manual_seed(0)})
    sigmas: Tensor = scheduler.sigmas.double().cpu()
    return 1 - sigmas if scheduler.config.get("invert_sigmas") else sigmas
