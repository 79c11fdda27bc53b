"""The network's inputs for prompts, and for the empty prompt, with which a stock pipeline guides."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fmm_distill.errors import UserError, named
from fmm_distill.teachers.conditions import Embeddings, ImageGuidance, NullInputs
from fmm_distill.teachers.guiders import guider_names
from fmm_distill.teachers.prompted.cache import cache_file, embed_all
from fmm_distill.teachers.prompted.combination import find_norm_axis, has_numbers, outputs_of_step
from fmm_distill.teachers.prompted.rows import is_close
from fmm_distill.teachers.prompted.runs import record_guided
from fmm_distill.teachers.recording import tensor_of

if TYPE_CHECKING:
    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.index import PipelineIndex
    from fmm_distill.teachers.prompted.probe import PipelineProbe
    from fmm_distill.teachers.prompts import Prompts
    from fmm_distill.teachers.recording import Recording

__all__ = ["embed_prompts", "find_null"]

# Of the guided run; PNDM needs at least four.
_STEPS = 4
# The scale at which the pipeline's own guidance is compared: far from 1, where guidance does nothing.
_SCALE = 3.0
# Of the second guidance: neither 1 nor the other scale, at both of which an output drops out.
_IMAGE_SCALE = 2.0
# Of the network for one guided output: with prompt and image, with the image, with neither.
_MOST_OUTPUTS = 3


@dataclass(frozen=True)
class _Nulls:
    """Inputs with which a guided run calls its network besides those of the sample; see ``NullInputs``."""

    inputs: tuple[Conditioning, ...]
    norm_axis: int = 0


def embed_prompts(probe: PipelineProbe, prompts: Prompts, index: PipelineIndex) -> Embeddings:
    """Return the embeddings of prompts, and those of the empty prompt where the pipeline uses it for guidance."""
    fixed = {name: repr(value) for name, value in sorted(probe.keywords.fixed.items())}
    null, reason, by_image = find_null(probe)
    rows = embed_all(probe.embed, prompts, cache_file(index, prompts, fixed))
    for one in (null, None if by_image is None else by_image.null):
        if one is not None and one.per_image:
            empty = prompts.with_texts("")
            rows = one.add_to(rows, embed_all(probe.embed, empty, cache_file(index, empty, fixed)))
    return Embeddings(prompts.texts, rows, null, reason, prompts.images, by_image)


def find_null(probe: PipelineProbe) -> tuple[NullInputs | None, str, ImageGuidance | None]:
    """Return the network's inputs of the empty prompt, or None and the reason; and a second guidance, by the image.

    There are none if the pipeline's guidance is not the plain combination of two outputs, with or without the norms of
    the first, nor that of InstructPix2Pix of three.
    """
    kind = type(probe.pipeline).__name__
    if probe.keywords.guidance is None and not guider_names(probe.pipeline):
        return None, f"{kind} has no classifier-free guidance", None
    cond = probe.embed(probe.two)
    try:
        found = _nulls(probe, cond)
    except UserError as error:
        # Unguided students need no empty prompt, of which some tokenizers make no token.
        cause = error if error.__cause__ is None else error.__cause__
        return None, f"{kind} does not run with guidance by the empty prompt ({named(cause)})", None
    return (None, f"{kind} {found}", None) if isinstance(found, str) else (found[0], "", found[1])


def _nulls(probe: PipelineProbe, cond: Conditioning) -> tuple[NullInputs, ImageGuidance | None] | str:
    found, empty = _nulls_of(probe, _record(probe), cond), False
    takes_prompt = "negative_prompt" in inspect.signature(probe.pipeline.__call__).parameters
    if takes_prompt and (isinstance(found, str) or not _is_empty_prompt(probe, found.inputs[0], cond)):
        # Some pipelines have a negative prompt of their own, others have one for the complete batch.
        found, empty = _nulls_of(probe, _record(probe, empty=True), cond), True
    if isinstance(found, str):
        return found
    first, *more = found.inputs
    keyword = _image_keyword(probe, cond, found.inputs, empty=empty) if more else None
    if more and keyword is None:
        return _not_plain(len(found.inputs) + 1)
    null = _by_origin(probe, first, cond)
    if isinstance(null, str) or keyword is None:
        return null if isinstance(null, str) else (replace(null, norm_axis=found.norm_axis), None)
    without_image = _by_origin(probe, more[0], cond)
    return without_image if isinstance(without_image, str) else (null, ImageGuidance(keyword, without_image))


def _not_plain(outputs: int) -> str:
    return f"guides by {outputs} outputs, not by a plain combination of two"


def _record(probe: PipelineProbe, *, empty: bool = False, more: dict[str, float] | None = None) -> Recording:
    """Return a run with the pipeline's own guidance.

    Args:
        empty: by the empty prompt, whatever negative prompt the pipeline has by default.
        more: keywords of the call in addition.
    """
    keywords = replace(probe.keywords, fixed=probe.keywords.fixed | (more or {}))
    return record_guided(probe.pipeline, probe.component, keywords, probe.two, _STEPS, _SCALE, empty=empty)


def _nulls_of(probe: PipelineProbe, guided: Recording, cond: Conditioning) -> _Nulls | str:
    """Return the inputs with which a guided run calls its network besides ``cond``; or the reason against them.

    Of two, the first are those with more of the inputs of the sample, such as its image.
    """
    count, first = len(probe.two), guided.calls[0].arguments
    calls = len(guided.calls) // len(guided.steps)
    outputs = calls * (len(tensor_of(first[probe.call.sample])) // count)
    if outputs == 1:
        return "has no classifier-free guidance"
    if outputs > _MOST_OUTPUTS:
        return _not_plain(outputs)
    others = "passes other inputs to its network with guidance"
    try:
        if calls == outputs:
            parts = [probe.call.conditions_of(call.arguments, count) for call in guided.calls[:calls]]
        else:
            every = probe.call.conditions_of(first, outputs * count)
            parts = [every.part(i * count, (i + 1) * count) for i in range(outputs)]
    except UserError:
        return others
    nulls = [part for part in parts if not _is_same(part, cond)]
    if len(nulls) == outputs:
        return others
    sides = [f"{side.name}." for side in probe.call.sides]
    if any(not any(path.startswith(side) for path in null.inputs) for null in nulls for side in sides):
        return f"guides without its {probe.call.sides[0].name}"
    if outputs == _MOST_OUTPUTS:
        nulls.sort(key=lambda null: -len(_own_inputs(null, cond)))
        ordered = len(nulls) == outputs - 1 and _own_inputs(nulls[0], cond) > _own_inputs(nulls[1], cond)
        return _Nulls(tuple(nulls)) if ordered else _not_plain(outputs)
    axis = find_norm_axis(probe, guided, cond, nulls[0], _scale_of_prompt(probe)) if nulls else None
    return "guides by more than a plain combination of two outputs" if axis is None else _Nulls(tuple(nulls), axis)


def _scale_of_prompt(probe: PipelineProbe) -> float:
    """Return the scale of the recorded guidance: where the keyword counts from 0, it is larger by 1."""
    return 1 + _SCALE - probe.keywords.off


def _own_inputs(null: Conditioning, cond: Conditioning) -> set[str]:
    """Return the names of the inputs that are those of the sample."""
    return {name for name, rows in null.inputs.items() if name in cond.inputs and is_close(rows, cond.inputs[name])}


def _image_keyword(
    probe: PipelineProbe, cond: Conditioning, nulls: tuple[Conditioning, ...], *, empty: bool
) -> str | None:
    """Return the keyword that scales the second guidance in the way of InstructPix2Pix; None: there is none.

    Args:
        nulls: the inputs without the prompt, and without prompt and image.
        empty: guide by the empty prompt, whatever negative prompt the pipeline has by default.
    """
    parameters = inspect.signature(probe.pipeline.__call__).parameters
    scale = _scale_of_prompt(probe)
    for name in parameters:
        if "guidance_scale" not in name or name == probe.keywords.guidance:
            continue
        guided, matches = _record(probe, empty=empty, more={name: _IMAGE_SCALE}), []
        for step in (0, len(guided.steps) - 1):
            (output, image, none), stepped = outputs_of_step(probe, guided, step, (cond, *nulls))
            if stepped.numel() == output.numel():
                expected = none + scale * (output - image) + _IMAGE_SCALE * (image - none)
                matches.append(has_numbers(expected, stepped))
        if matches and all(matches):
            return name
    return None


def _by_origin(probe: PipelineProbe, null: Conditioning, cond: Conditioning) -> NullInputs | str:
    """Sort the inputs of the empty prompt: equal for all samples, those of the sample, or a function of its image."""
    first = null.rows(torch.tensor([0]))
    if not probe.samples.images:
        # The rows are equal.
        return NullInputs(first)
    own, per_image, empty = [], [], probe.embed(probe.two.with_texts(""))
    for name, rows in null.inputs.items():
        if is_close(rows, rows.flip(0)):
            continue
        if name in cond.inputs and is_close(rows, cond.inputs[name]):
            own.append(name)
        elif name in empty.inputs and is_close(rows, empty.inputs[name]):
            per_image.append(name)
        else:
            return f"guides by an input ({name}) that is neither that of the empty prompt nor that of the sample"
    return NullInputs(first, frozenset(own), frozenset(per_image))


def _is_empty_prompt(probe: PipelineProbe, null: Conditioning, cond: Conditioning) -> bool:
    """Return whether the inputs are those of the empty prompt, or zeros, which some networks learn instead."""
    if any(not rows.any() and cond.inputs[name].any() for name, rows in null.inputs.items()):
        return True
    return _is_same(null, probe.embed(probe.two.with_texts("")))


def _is_same(one: Conditioning, other: Conditioning) -> bool:
    # With guidance, text encoders may run on batches of another size.
    return one.inputs.keys() == other.inputs.keys() and all(
        is_close(rows, other.inputs[name]) for name, rows in one.inputs.items()
    )
