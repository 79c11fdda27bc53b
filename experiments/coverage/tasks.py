"""Pipelines that refine or fill a given image: they are opened by their base, and compared with its student's task."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from experiments.coverage.checks import PROMPTS, open_stock, relative
from experiments.coverage.images import draw_prompts
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.remote.scheduler import FlowMapScheduler
from fmm_distill.student.scaled import ScaledWeights
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import find_index
from fmm_distill.teachers.requirements import call_parameters, data_parameters, pipeline_class
from fmm_distill.teachers.tasks import task_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from experiments.coverage.images import Form
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.tasks import Task

__all__ = ["call_base", "compare_task", "task_in"]

_STEPS, _STRENGTH = 4, 0.75
# Pixels per side.
_LEAST = 64


def task_in(folder: Path) -> Task | None:
    """Return the task of the pipeline in a folder; None: it is opened by its own class."""
    index = find_index(str(folder))
    return None if index.task is None else task_of(index.task)


def call_base(
    task: Task | None, call: Mapping[str, Any], forms: Mapping[str, Form]
) -> tuple[dict[str, Any], dict[str, Form]]:
    """Return the keywords and the images of a base for those of its task; without a task, the same.

    The samples are of the size of the given image, and as long as the given video.
    """
    if task is None:
        return dict(call), dict(forms)
    kind = pipeline_class(task.base)
    parameters = {} if kind is None else call_parameters(kind)
    images = {}
    for name in data_parameters(parameters):
        if (keyword := task.keyword(name)) in forms:
            images[name] = _large(forms[keyword]) if keyword in task.images else forms[keyword]
    given, size = forms.get(task.images[0]), {}
    if isinstance(given, list) and task.images[0] == "video":
        size["num_frames"] = len(given)
    while isinstance(given, list):
        given = given[0]
    if given is not None:
        width, height = given["size"]
        size |= {"width": width, "height": height, "max_area": width * height}
    return {name: value for name, value in (size | dict(call)).items() if name in parameters}, images


def _large(form: Form) -> Form:
    """Return the form of an image that the network of the base sees, which some pipelines refuse if it is small."""
    if isinstance(form, list):
        return [_large(one) for one in form]
    return form | {"size": [max(side, _LEAST) for side in form["size"]]}


def compare_task(
    teacher: Teacher, task: Task, folder: Path, call: Mapping[str, Any], forms: Mapping[str, Form]
) -> float:
    """Compare the task of an exported student that equals its teacher with the stock pipeline of the task.

    Both make three of four steps, on the grid of the any-step pipeline.

    Args:
        folder: of the pipeline of the task.
        call: the keywords of its test.
        forms: of the images that its test calls it with.

    Returns:
        the largest relative difference of the samples.
    """
    assert teacher.pipeline is not None
    stock = open_stock(folder)
    kind = pipeline_class(task.pipeline)
    parameters = {} if kind is None else call_parameters(kind)
    given = draw_prompts(PROMPTS[:1], forms).keywords(one=True)
    keywords = {**call, **teacher.pipeline.call, **teacher.pipeline.unguided(), **given}
    keywords = {name: value for name, value in keywords.items() if name in parameters}
    latents = any(hasattr(stock, name) for name in ("vae", "movq"))
    keywords |= {"strength": _STRENGTH, "num_inference_steps": _STEPS, "output_type": "latent" if latents else "np"}

    def sampled(pipeline: Any) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        with torch.no_grad():
            return torch.as_tensor(pipeline(**keywords, generator=torch.Generator().manual_seed(0))[0])

    with tempfile.TemporaryDirectory() as scratch:
        student = Student.from_teacher(teacher, scaled=ScaledWeights())
        made = export_pipeline(student, teacher, Path(scratch) / "student", ())
        any_step = diffusers.DiffusionPipeline.from_pretrained(made, trust_remote_code=True)
        levels = getattr(any_step, teacher.pipeline.component).config.flow_map
        stock.scheduler = FlowMapScheduler.from_stock(any_step.scheduler, levels)
        return relative(sampled(getattr(any_step, task.method)()), sampled(stock))
