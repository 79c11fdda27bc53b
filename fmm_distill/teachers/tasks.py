"""Pipelines that use a base model for another task: they refine an image or a video, or fill a part of it.

Such a pipeline starts from a given image with noise on it, or puts the known part of it back between the steps. Its
network is that of the base pipeline, by which a teacher of it is opened, and whose student does the task too.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fmm_distill.errors import UserError
from fmm_distill.teachers.hub.links import linked_folder
from fmm_distill.teachers.requirements import call_parameters, data_parameters, pipeline_class

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from fmm_distill.teachers.index import PipelineIndex

__all__ = ["Task", "as_base", "link_base", "task_of"]

# The part of a class name that says the task, and what the name of the base class has in its place.
_NAMED = re.compile(r"Img2Img|Inpaint(ing)?|VideoToVideo")
_IN_BASE = ("", "TextToVideo")
# By a setting of the task: the keyword of the base's call for the same input of the network, and the keyword of the
# task's call for its value. The refiner of Stable Diffusion XL embeds a score in place of the size of the sample.
_INSTEAD = {"requires_aesthetics_score": ("target_size", "aesthetic_score")}
_A = {"image": "an image", "video": "a video"}


@dataclass(frozen=True)
class Task:
    """A task of a pipeline class that calls the network of another one, its base.

    Attributes:
        pipeline: the name of its class.
        base: the name of the base class, without the task.
        does: what it does, as text.
        method: of the any-step pipeline, which returns the pipeline of the task.
        images: keywords of the given image or video, and of its mask.
    """

    pipeline: str
    base: str
    does: str
    method: str
    images: tuple[str, ...]

    def keyword(self, name: str) -> str:
        """Return the keyword of the task's call for an image of the base's call.

        A control image is ``image`` for the base of some pipelines with a ControlNet. Where the network sees the given
        image itself, both calls name it alike.
        """
        renamed = name == "image" and "control_image" in call_parameters(_known(self.pipeline))
        return "control_image" if renamed else name


def task_of(name: str) -> Task | None:
    """Return the task of a pipeline class by its signature; None: it has none, or diffusers has no base class of it.

    Whether the network of a pipeline with a mask sees the mask is not in the signature.
    """
    kind = pipeline_class(name)
    parameters = {} if kind is None else call_parameters(kind)
    strength, data = parameters.get("strength"), data_parameters(parameters)
    given = next((one for one in ("image", "video") if one in data), None)
    masks = [one for one in data if one.startswith("mask")]
    if strength is None or given is None or not isinstance(strength.default, int | float):
        return None
    base = _base_of(name)
    if base is None or not (masks or strength.default < 1):
        return None
    if masks:
        return Task(name, base, f"fills a part of {_A[given]}", "inpaint", (given, *masks))
    method = {"image": "image_to_image", "video": "video_to_video"}[given]
    return Task(name, base, f"refines {_A[given]}", method, (given,))


def as_base(
    index: PipelineIndex, settings: Mapping[str, object], config_of: Callable[[str], dict[str, Any]]
) -> PipelineIndex:
    """Return the index of the base pipeline if a pipeline is a task of it, and the index itself otherwise.

    Args:
        settings: the entries of the index.
        config_of: returns the configuration of a component.

    Raises:
        UserError: if it has a setting without which its network can't be called, and that the base lacks.
    """
    task = task_of(index.pipeline)
    if task is None:
        return index
    taken = inspect.signature(_known(task.base)).parameters
    if task.method == "inpaint" and _sees_mask(index.components, config_of):
        return index
    own, call = _own_settings(index, task, settings)
    parts = {name: part for name, part in index.components.items() if name in taken}
    return replace(index, pipeline=task.base, components=parts, task=index.pipeline, task_settings=own, call=call)


def link_base(index: PipelineIndex) -> Path:
    """Return a folder of links to the files of a pipeline, which opens as its base; the folder itself if it has none.

    All that opens the folder, and copies of it, then gets the base pipeline.
    """
    if index.task is None:
        return index.folder
    folder, taken = index.folder, inspect.signature(_known(index.pipeline)).parameters
    entries = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    entries = {name: value for name, value in entries.items() if name.startswith("_") or name in taken}

    def fill(target: Path) -> None:
        for path in folder.iterdir():
            if path.name != "model_index.json":
                (target / path.name).symlink_to(path.resolve())
        text = json.dumps(entries | {"_class_name": index.pipeline}, indent=2)
        (target / "model_index.json").write_text(text, encoding="utf-8")

    return linked_folder("bases", folder, [index.pipeline, entries], fill)


def _own_settings(
    index: PipelineIndex, task: Task, settings: Mapping[str, object]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that the base does not have, and the keywords of the base's call in place of them."""
    own, base = (inspect.signature(_known(name)).parameters for name in (task.pipeline, task.base))
    keywords = call_parameters(_known(task.pipeline))
    found, call = {}, {}
    for name, one in own.items():
        value = settings.get(name, one.default)
        if name in base or name in index.components or value in (one.default, [None, None]):
            continue
        if name not in _INSTEAD:
            raise UserError(
                f"{index.source}: expected a network for {task.base}, got one for {task.pipeline} alone ({name}: "
                f"{value}); try the base model"
            )
        keyword, given = _INSTEAD[name]
        found[name], call[keyword] = value, (keywords[given].default,)
    return found, call


def _base_of(name: str) -> str | None:
    """Return the name of the class without the task; None: diffusers has none."""
    if not _NAMED.search(name):
        return None
    candidates = (_NAMED.sub(instead, name, count=1) for instead in _IN_BASE)
    return next((each for each in candidates if pipeline_class(each) is not None), None)


def _known(name: str) -> type:
    kind = pipeline_class(name)
    assert kind is not None
    return kind


def _sees_mask(components: Collection[str], config_of: Callable[[str], dict[str, Any]]) -> bool:
    """Return whether a network has the one channel of a mask in addition to those of samples and images."""
    config = config_of("transformer" if "transformer" in components else "unet")
    given, made = config.get("in_channels"), config.get("out_channels")
    return isinstance(given, int) and isinstance(made, int) and made > 1 and given % made == 1
