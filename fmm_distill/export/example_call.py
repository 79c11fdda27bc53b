"""A line of Python that calls an exported pipeline, for its model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fmm_distill.teachers.conditions import Embeddings
from fmm_distill.teachers.requirements import call_parameters, pipeline_class
from fmm_distill.teachers.tasks import task_of

if TYPE_CHECKING:
    from fmm_distill.teachers.base import Teacher

__all__ = ["example_call", "imports_of", "task_call"]

# Of longer lists the example opens a video, which is a list of frames.
_MOST_FILES = 3
_LOADERS = ("load_image", "load_video")
_ENDINGS = {"load_image": "png", "load_video": "mp4"}
# Of the noise on a given image, in an example.
_STRENGTH = 0.75


def example_call(teacher: Teacher, *, any_step: bool) -> str:
    """Return a line of Python that calls a pipeline, with ``{steps}`` for the number of steps."""
    conditions, pipeline = teacher.conditions, teacher.pipeline
    if conditions is None:
        outputs = teacher.codec.outputs
        return f"{outputs} = pipeline(batch_size=4, num_inference_steps={{steps}}).{outputs}"
    given = {} if pipeline is None else pipeline.call | pipeline.unguided()
    if any_step and pipeline is not None and teacher.guidance is not None and teacher.guidance.range is not None:
        given |= {str(pipeline.guidance): teacher.guidance.scale}
    keywords = "".join(f", {key}={value!r}" for key, value in given.items())
    if not isinstance(conditions, Embeddings):
        return f"images = pipeline(class_labels=[0, 1], num_inference_steps={{steps}}{keywords})[0]"
    if not conditions.images:
        return f'samples = pipeline("a prompt", num_inference_steps={{steps}}{keywords})[0]'
    # Named: the first argument of some pipelines is the image.
    prompt = ['prompt="a prompt"'] if pipeline is None or pipeline.condition == "prompt" else []
    images = [f"{name}={_opened(name, own[0])}" for name, own in conditions.images.items()]
    return f"samples = pipeline({', '.join(prompt + images)}, num_inference_steps={{steps}}{keywords})[0]"


def task_call(teacher: Teacher) -> str | None:
    """Return a line of Python that calls the task of the teacher's own class; None: it was opened by that class."""
    pipeline, conditions = teacher.pipeline, teacher.conditions
    task = None if pipeline is None or pipeline.task is None else task_of(pipeline.task)
    kind = None if task is None else pipeline_class(task.pipeline)
    if pipeline is None or task is None or kind is None:
        return None
    seen = conditions.images if isinstance(conditions, Embeddings) else {}
    images = {name: "load_video" if name == "video" else "load_image" for name in task.images}
    opened = {name: f'{loader}("{name}.{_ENDINGS[loader]}")' for name, loader in images.items()}
    opened |= {name: _opened(name, own[0]) for each, own in seen.items() if (name := task.keyword(each)) not in opened}
    # The size of the samples is that of the given image in most of these pipelines.
    call = {key: value for key, value in (pipeline.call | pipeline.unguided()).items() if key in call_parameters(kind)}
    # A masked part is made from noise alone.
    call |= {"strength": 1.0 if task.method == "inpaint" else _STRENGTH, "num_inference_steps": 4}
    prompt = ['prompt="a prompt"'] if pipeline.condition == "prompt" else []
    given = [f"{name}={text}" for name, text in opened.items()] + [f"{name}={value!r}" for name, value in call.items()]
    return f"samples = pipeline.{task.method}()({', '.join(prompt + given)})[0]"


def imports_of(call: str) -> list[str]:
    """Return the import line of the functions that a call opens its images with; none without images."""
    used = [name for name in _LOADERS if f"{name}(" in call]
    return [f"from diffusers.utils import {', '.join(used)}"] if used else []


def _opened(name: str, image: Any) -> str:  # noqa: ANN401 a PIL image, or a list of them
    """Return the expression that opens an image, or a list of them, from files of an example's names."""
    if not isinstance(image, list | tuple):
        return f'load_image("{name}.png")'
    if len(image) > _MOST_FILES:
        return f'load_video("{name}.mp4")'
    opened = [f'load_image("{name}-{i + 1}.png")' for i in range(len(image))]
    return f"[{', '.join(opened)}]"
