"""Inputs of a stock pipeline besides noise and prompts: images, videos, masks, and the like.

A teacher gives its pipeline nothing but noise and prompts. What else a pipeline needs is in the signature of its call
and in its components. Where an input is optional by the signature, only a run shows whether the pipeline needs it.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import diffusers

from fmm_distill.errors import UserError, named

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from fmm_distill.teachers.index import PipelineIndex

__all__ = [
    "call_parameters",
    "check_requirements",
    "data_parameters",
    "describe_optional_inputs",
    "find_missing_input",
    "pipeline_class",
    "takes_prompts",
]

_EMPTY = inspect.Parameter.empty
# Parameters that are data of another kind than prompts. IP adapters are not part of a pipeline's own weights.
_DATA = re.compile(
    r"(?!ip_adapter|negative_|text_|masked_)(\w+_)?"
    r"(images?|videos?|image_reference|mask|conditions|controls|hint|depth_map|audio|conditioning_frames)"
)
# Images of what is loaded into a pipeline, which are checked where that is.
_OF_ADAPTERS = {"ip_adapter_image"}
_NOT_DATA = re.compile(r"(\w+_)?(attention_mask|embeds_mask|padding_mask)")
# The first pattern that is in a name says what the parameter is.
_WORDS = {
    "image_embed": "the embedding of an image",
    "mask": "a mask",
    "control.*video": "a control video",
    "^control|^hint|condtioning_image|conditioning_(image|frames)": "a control image",
    "depth_map": "a depth map",
    "audio": "a sound",
    "reference|ref_": "a reference image",
    "conditions": "images or videos as conditions",
    "video": "a video",
    "image": "an image",
    "latent": "latents",
}
# Names of the components of another network, which makes what the last one is conditioned on.
_STAGES = re.compile(r"(prior_)?prior|decoder")
# Networks that change the output of the main one, by an image.
_CONTROLS = ("controlnet", "adapter")
# What stock pipelines report of an input that is None.
_NOTHING_GIVEN = re.compile(r"None|incorrect format|provided|undefined|has to be of type")
_PLAIN = "expected a pipeline that starts from noise and prompts alone"


def pipeline_class(name: str) -> type | None:
    """Return the pipeline class of this name in diffusers; None: there is none."""
    kind = getattr(diffusers, name, None) if name else None
    return kind if inspect.isclass(kind) else None


def call_parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline class's call, ``self`` excluded; empty if it has no call."""
    call = next((vars(one)["__call__"] for one in kind.__mro__ if "__call__" in vars(one)), None)
    parameters = {} if call is None else dict(inspect.signature(call).parameters)
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: one for name, one in parameters.items() if name != "self" and one.kind not in variadic}


def data_parameters(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the parameters that are data: a setting has a default value of its own."""
    return [
        name
        for name, one in parameters.items()
        if _DATA.fullmatch(name) and not _NOT_DATA.fullmatch(name) and one.default in (None, _EMPTY)
    ]


def takes_prompts(index: PipelineIndex) -> bool:
    """Return whether a pipeline is called with prompts: by its class, or by its text encoders if diffusers lacks it."""
    parameters = {} if (kind := pipeline_class(index.pipeline)) is None else call_parameters(kind)
    return "prompt" in parameters if parameters else _has_text_encoder(index)


def check_requirements(index: PipelineIndex, given: Collection[str] = ()) -> None:
    """Check by its class and components that a pipeline starts from noise, prompts or classes, and given images alone.

    Args:
        given: keywords of the images that it is called with.

    Raises:
        UserError: otherwise.
    """
    kind = pipeline_class(index.pipeline)
    if kind is None:
        return
    name, parameters = index.pipeline, call_parameters(kind)
    data = data_parameters(parameters)
    accepted = {*data, *(_OF_ADAPTERS & parameters.keys())}
    if unknown := [key for key in given if key not in accepted]:
        base = "" if index.task is None else f", by which {index.task} is opened,"
        takes = ", ".join(data) or "no image"
        raise UserError(f"prompts.images.{unknown[0]}: {name}{base} takes no image {unknown[0]}; it takes {takes}")
    known = ("prompt", "class_labels", *given)
    required = [key for key, one in parameters.items() if one.default is _EMPTY and key not in known]
    stages = [part for part in index.components if _STAGES.fullmatch(part)]
    if stages or any("image_embed" in key for key in required):
        reason = ", ".join(stages) if stages else f"it needs {_listed(required)}"
        raise UserError(
            f"{index.source}: expected one network from noise to data, got {name}, which is a cascade of several "
            f"networks or a part of one ({reason}); try a pipeline with a single denoiser"
        )
    if _refines(parameters):
        raise UserError(
            f"{index.source}: {_PLAIN}, got {name}, which refines {_listed(data_parameters(parameters)[:1])}, and "
            "diffusers has no pipeline of its network without that; try another model"
        )
    # A signature that requires images requires all that the pipeline needs.
    declared = any(one.default is _EMPTY and key in data_parameters(parameters) for key, one in parameters.items())
    needed = required or (
        [] if declared else [key for key in _needed(parameters, index.components) if key not in given]
    )
    if needed:
        advice = "; try --set prompts.images.KEYWORD=COLUMN for each of them (docs/image-conditions.md)"
        given_as_images = all(key in data_parameters(parameters) for key in needed)
        raise UserError(
            f"{index.source}: {_PLAIN}, got {name}, which needs {_listed(needed, index.components)}"
            f"{advice if given_as_images else ''}"
        )
    if parameters and "prompt" not in parameters and not given and _has_text_encoder(index):
        raise UserError(f"{index.source}: {_PLAIN}, got {name}, whose call takes no prompt")


def describe_optional_inputs(name: str, given: Collection[str] = ()) -> str | None:
    """Return what a pipeline class can take in addition to prompts, as text; None: nothing, or diffusers lacks it.

    Args:
        given: keywords of the images that it is called with.
    """
    kind = pipeline_class(name)
    data = [] if kind is None or given else data_parameters(call_parameters(kind))
    return _listed(data) if data else None


def find_missing_input(pipeline: Any, call: Mapping[str, Any], error: BaseException) -> str | None:  # noqa: ANN401
    """Return the inputs, as text, without which a pipeline has failed; None: it has failed for another reason.

    Args:
        call: the keywords of the failed call.
        error: raised by the pipeline.
    """
    names = [name for name in data_parameters(call_parameters(type(pipeline))) if call.get(name) is None]
    reported = named(error)
    if not _NOTHING_GIVEN.search(reported):
        return None
    mentioned = [name for name in names if re.search(rf"(?<!\w){name}(?!\w)", reported)]
    # Prompts that are of a wrong type are no missing image.
    about_prompt = re.search(r"(?<!\w)prompt(?!\w)", reported) is not None
    return _listed(mentioned or names[:1]) if mentioned or (names and not about_prompt) else None


def _has_text_encoder(index: PipelineIndex) -> bool:
    return any(name.startswith("text_encoder") for name in index.components)


def _refines(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether a pipeline starts from an image with noise on it: the strength of the noise is below 1."""
    data, strength = data_parameters(parameters), parameters.get("strength")
    masked = any("mask" in name for name in data)
    return bool(data) and not masked and strength is not None and strength.default is not None and strength.default < 1


def _needed(parameters: Mapping[str, inspect.Parameter], components: Collection[str]) -> list[str]:
    """Return the optional parameters without which a pipeline is another one, by its signature and components."""
    data = data_parameters(parameters)
    controls = [name for name in data if name.startswith(("control", "conditioning"))]
    if controls or any(part in components for part in _CONTROLS):
        return controls or data[:1]
    if any(name in data for name in ("mask_image", "mask_video")):
        return [name for name in data if name.removeprefix("mask_") in ("image", "video")]
    return [name for name in data if "mask" not in name][:1] if "prompt" not in parameters else []


def _listed(names: Iterable[str], components: Collection[str] = ()) -> str:
    """Return parameters in words, each with its name."""
    controlled = any(part in components for part in _CONTROLS)
    words = [_in_words(name, controlled=controlled) for name in names if not name.startswith("negative_")]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _in_words(name: str, *, controlled: bool) -> str:
    if controlled and name == "image":
        return "a control image (image)"
    if not (_DATA.fullmatch(name) or re.search("image_embed|_latent$|^latents$", name)) or _NOT_DATA.fullmatch(name):
        return name
    return f"{next(words for pattern, words in _WORDS.items() if re.search(pattern, name))} ({name})"
