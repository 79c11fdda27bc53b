"""Copies of a teacher's stock pipeline with the student in it: of any number of steps, and folded."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fmm_distill.core.schedules import Angular, FlowMatching, VarianceExploding, VariancePreserving
from fmm_distill.export.remote.stock_pipeline import jumping
from fmm_distill.export.schedulers import stock_scheduler
from fmm_distill.student.fold import fold
from fmm_distill.teachers.codec import LatentCodec, PipelineCodec
from fmm_distill.teachers.components import open_pipeline
from fmm_distill.teachers.prompted.arguments import split_arguments
from fmm_distill.teachers.prompted.call import RecordedCall
from fmm_distill.teachers.recording import record, tensor_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = [
    "any_step_settings",
    "any_step_times",
    "copy_pipeline",
    "folded_network",
    "folded_scheduler",
    "guidance_keyword",
    "pipeline_settings",
    "shared_bytes",
    "start_of",
    "unguided",
    "verification_call",
]

# Configurations, weights, chat templates and vocabularies.
_OPENED = (".json", ".safetensors", ".jinja", ".model", ".spm", ".tiktoken", "vocab.txt", "merges.txt")
_NOT_OPENED = (".bin.index.json",)
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json
_VARIANT = re.compile(r"\.\w+(-\d+-of-\d+)?\.safetensors$|\.safetensors\.index\.\w+\.json$")


def copy_pipeline(
    teacher: Teacher, target: Path, source: Path | None = None, *, linked: bool = False
) -> dict[str, Any]:
    """The pipeline's components besides network and scheduler, copied; gives the index for them.

    Args:
        source: a copy made before on the same disk: its files are linked, not copied.
        linked: write links to the teacher's own files, wherever they are.
    """
    origin = cast("Path", teacher.folder)
    index: dict[str, Any] = json.loads((origin / "model_index.json").read_text(encoding="utf-8"))
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or name in (teacher.component, "scheduler"):
            continue
        # A name is that of a folder in this one.
        if Path(name).name != name:
            continue
        if source is not None and (source / name).is_dir():
            shutil.copytree(source / name, target / name, copy_function=_linked)
        elif (origin / name).is_dir():
            copy_file = _pointed_to if linked else shutil.copy2
            shutil.copytree(origin / name, target / name, ignore=_unused, copy_function=copy_file)
    return index


def shared_bytes(teacher: Teacher) -> int:
    """What ``copy_pipeline`` copies."""
    origin = cast("Path", teacher.folder)
    total = 0
    for name, value in json.loads((origin / "model_index.json").read_text(encoding="utf-8")).items():
        if not name.startswith("_") and isinstance(value, list) and name not in (teacher.component, "scheduler"):
            files = [file for file in (origin / name).rglob("*") if file.is_file()]
            unused = _unused("", [file.name for file in files])
            total += sum(file.stat().st_size for file in files if file.name not in unused)
    return total


def _unused(folder: str, names: list[str]) -> list[str]:
    """The files of a component's folder that stock diffusers does not open: pickles, code, variants, a user's own."""
    return [name for name in names if not (_is_opened(name) or ((Path(folder) / name).is_dir() and name[0] != "."))]


def _is_opened(name: str) -> bool:
    hidden = name.startswith(".")
    return not hidden and name.endswith(_OPENED) and not name.endswith(_NOT_OPENED) and not _VARIANT.search(name)


def _linked(source: str, target: str) -> None:
    """A hard link, or a copy where the disk has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _pointed_to(source: str, target: str) -> None:
    """A symbolic link, or a copy where the disk has none."""
    try:
        Path(target).symlink_to(Path(source).resolve())
    except OSError:
        shutil.copy2(source, target)


def pipeline_settings(teacher: Teacher, scheduler: Any) -> dict[str, Any]:  # noqa: ANN401 a diffusers class
    """The ``flow_map`` entry of a network's configuration, for the pipeline that starts from a count of images."""
    kind = "discrete" if isinstance(teacher.schedule, VariancePreserving) else "exploding"
    kind = "flow" if isinstance(teacher.schedule, FlowMatching) else kind
    latents = isinstance(teacher.codec, LatentCodec)
    return {"kind": kind, "latents": latents, "scheduler": _own_settings(scheduler)}


def any_step_settings(teacher: Teacher, scheduler: Any) -> dict[str, Any]:  # noqa: ANN401 a diffusers class
    """The ``flow_map`` entry of a network's configuration, for the pipeline of a stock class.

    Args:
        scheduler: the one that the student is exported with.
    """
    schedule, ask = teacher.schedule, teacher.parametrization.call
    slope, offset = (ask.slope, ask.offset) if isinstance(ask, RecordedCall) else (1.0, 0.0)
    inverted = bool(teacher.scheduler_config.get("invert_sigmas"))
    own: dict[str, Any] = {"slope": slope, "offset": offset, "flip": schedule.num_timesteps if inverted else None}
    own |= {"call": teacher.call | unguided(teacher), "guidance": guidance_keyword(teacher)}
    own |= {"scheduler": _own_settings(scheduler)}
    own |= {"scale": None if teacher.guidance is None else teacher.guidance.scale}
    if isinstance(schedule, VariancePreserving):
        return own | {"kind": "discrete", "total": schedule.num_timesteps}
    if isinstance(schedule, Angular):
        return own | {"kind": "angular"}
    if isinstance(schedule, FlowMatching):
        return own | {"kind": "flow", "shift": schedule.shift, "told_before": schedule.uses_unshifted_time}
    exploding = cast("VarianceExploding", schedule)
    rho = None if math.isinf(exploding.rho) else exploding.rho
    own |= {"kind": "exploding", "told": exploding.network_input}
    return own | {"sigma_min": exploding.sigma_min, "sigma_max": exploding.sigma_max, "rho": rho}


def _own_settings(scheduler: Any) -> dict[str, Any]:  # noqa: ANN401 a diffusers class
    """The scheduler's configuration as JSON, without the settings of the teacher's class that it does not take."""
    settings: dict[str, Any] = json.loads(scheduler.to_json_string())
    own = inspect.signature(type(scheduler).__init__).parameters
    return {name: value for name, value in settings.items() if name == "_class_name" or name in own}


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
    if isinstance(teacher.parametrization.call, RecordedCall):
        index = json.loads((cast("Path", teacher.folder) / "model_index.json").read_text(encoding="utf-8"))
        # A pipeline of pixels has no latents to give.
        output = "latent" if any(name.startswith(("vae", "vq", "movq")) for name in index) else "np"
        return teacher.call | unguided(teacher) | {"prompt": some, "output_type": output}
    return {"class_labels": [int(name) for name in some], "output_type": "np"} | unguided(teacher)


def _opened(teacher: Teacher, scheduler: Any) -> Any:  # noqa: ANN401 a diffusers class
    """The teacher's pipeline on the CPU with another scheduler; its encoders are opened once for all calls."""
    parts = {teacher.component: teacher.network, "scheduler": scheduler}
    if isinstance(teacher.codec, PipelineCodec):
        pipeline = copy.copy(teacher.codec.opened().to("cpu"))
        for name, part in parts.items():
            setattr(pipeline, name, part)
    else:
        pipeline = open_pipeline(cast("Path", teacher.folder), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def start_of(
    teacher: Teacher, call: dict[str, Any], seed: int
) -> tuple[Float[Tensor, "batch *event"], Conditioning | None]:
    """The N(0, I) that the stock pipeline starts from with this seed, and what it tells its network of its prompts.

    These may be padded otherwise than among all prompts of a run. None of a pipeline that is told classes or nothing.
    """
    scheduler = stock_scheduler(teacher, teacher.prediction)
    if isinstance(teacher.schedule, FlowMatching):
        # Some pipelines need more of a scheduler than the stock one of flow models has.
        scheduler = jumping(scheduler, any_step_settings(teacher, scheduler))
    pipeline = _opened(teacher, scheduler)
    count = next((len(value) for value in call.values() if isinstance(value, list)), call.get("batch_size", 1))
    given = copy.deepcopy(call) | {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(seed)}
    seen = record(pipeline, teacher.component, given, first_only=True)
    x = tensor_of(next(iter(seen.calls[0].arguments.values())))
    ask, cond = teacher.parametrization.call, None
    if isinstance(ask, RecordedCall):
        one = copy.deepcopy(given) | {"prompt": call["prompt"][:1]}
        single = record(pipeline, teacher.component, one, first_only=True).calls[0].arguments
        cond = split_arguments(seen.calls[0].arguments, (ask.sample, ask.time), count, single)
    return x[:count] / _gain_of_start(teacher), cond


def _gain_of_start(teacher: Teacher) -> float:
    """The size of the network's first input; of exploding levels the scheduler's own start, preconditioned."""
    schedule, spread = teacher.schedule, teacher.parametrization.sigma_data
    if not isinstance(schedule, VarianceExploding):
        return 1.0
    high = schedule.sigma_max**2
    return ((high + 1) / (1 if spread is None else high + spread**2)) ** 0.5


def folded_network(student: Student, teacher: Teacher, steps: int) -> tuple[Any, Any, Tensor]:
    """The folded network, its scheduler, and the times between which the stock pipeline then jumps."""
    scheduler, times = folded_scheduler(student, teacher, steps)
    return fold(student, teacher, times), scheduler, times


def folded_scheduler(student: Student, teacher: Teacher, steps: int) -> tuple[Any, Tensor]:
    """The scheduler of the folded pipeline, and the times between which that pipeline jumps."""
    scheduler = stock_scheduler(teacher, student.prediction)
    schedule = student.schedule
    if isinstance(schedule, VariancePreserving):
        return scheduler, schedule.grid(steps)
    times = _stock_times(teacher, scheduler, steps)
    last = float(schedule.warp(times[-2:-1]))
    # Where the network is told the time before the shift the pipeline gives its own timesteps, which don't stretch.
    told_before = isinstance(schedule, FlowMatching) and schedule.uses_unshifted_time
    if steps > 1 and last < 0.5 / steps and not told_before:
        # The stock grid ends in an almost empty step: stretched, its last level is that of equal steps.
        terminal = float(schedule.grid(steps)[-2])
        scheduler = stock_scheduler(teacher, student.prediction, terminal)
        times = _stock_times(teacher, scheduler, steps)
    return scheduler, times


def any_step_times(student: Student, teacher: Teacher, steps: int) -> Tensor:
    """The times between which the any-step pipeline jumps."""
    if not isinstance(teacher.schedule, FlowMatching):
        return student.schedule.grid(steps)
    stock = stock_scheduler(teacher, student.prediction)
    scheduler = jumping(stock, any_step_settings(teacher, stock))
    return _stock_times(teacher, scheduler, steps)


def _stock_times(teacher: Teacher, scheduler: Any, steps: int) -> Tensor:  # noqa: ANN401 a diffusers class
    """The times that the stock pipeline takes with this scheduler, data at the end; the network does not run."""
    pipeline = _opened(teacher, scheduler)
    call = verification_call(teacher, 1) | {"num_inference_steps": steps}
    record(pipeline, teacher.component, call | {"generator": torch.Generator().manual_seed(0)}, first_only=True)
    sigmas: Tensor = scheduler.sigmas.double().cpu()
    return 1 - sigmas if scheduler.config.get("invert_sigmas") else sigmas
