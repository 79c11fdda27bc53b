"""The network's inputs for prompts, and for the empty prompt, with which a stock pipeline guides."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch

from fmm_distill.errors import UserError, named
from fmm_distill.teachers.conditions import Embeddings, NullInputs
from fmm_distill.teachers.guiders import guider_names
from fmm_distill.teachers.prompted.cache import cache_file, embed_all
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
# Relative difference between the pipeline's guided output and ours: a difference of two outputs times the scale
# amplifies their rounding, and the weight is itself a quotient of such differences.
_TOLERANCE = 1e-2


def embed_prompts(probe: PipelineProbe, prompts: Prompts, index: PipelineIndex) -> Embeddings:
    """Return the embeddings of prompts, and those of the empty prompt where the pipeline uses it for guidance."""
    fixed = {name: repr(value) for name, value in sorted(probe.keywords.fixed.items())}
    null, reason = find_null(probe)
    rows = embed_all(probe.embed, prompts, cache_file(index, prompts, fixed))
    if null is not None and null.per_image:
        empty = prompts.with_texts("")
        rows = null.add_to(rows, embed_all(probe.embed, empty, cache_file(index, empty, fixed)))
    return Embeddings(prompts.texts, rows, null, reason, prompts.images)


def find_null(probe: PipelineProbe) -> tuple[NullInputs | None, str]:
    """Return the network's inputs of the empty prompt; or None and the reason.

    There are none if the pipeline's guidance is not the plain combination of two outputs.
    """
    kind = type(probe.pipeline).__name__
    if probe.keywords.guidance is None and not guider_names(probe.pipeline):
        return None, f"{kind} has no classifier-free guidance"
    cond = probe.embed(probe.two)
    try:
        found = _null_of(probe, _record(probe), cond)
        takes_prompt = "negative_prompt" in inspect.signature(probe.pipeline.__call__).parameters
        if takes_prompt and (isinstance(found, str) or not _is_empty_prompt(probe, found, cond)):
            # Some pipelines have a negative prompt of their own, others have one for the complete batch.
            found = _null_of(probe, _record(probe, empty=True), cond)
        null = found if isinstance(found, str) else _by_origin(probe, found, cond)
    except UserError as error:
        # Unguided students need no empty prompt, of which some tokenizers make no token.
        cause = error if error.__cause__ is None else error.__cause__
        return None, f"{kind} does not run with guidance by the empty prompt ({named(cause)})"
    return (None, f"{kind} {null}") if isinstance(null, str) else (null, "")


def _record(probe: PipelineProbe, *, empty: bool = False) -> Recording:
    """Return a run with the pipeline's own guidance.

    Args:
        empty: by the empty prompt, whatever negative prompt the pipeline has by default.
    """
    return record_guided(probe.pipeline, probe.component, probe.keywords, probe.two, _STEPS, _SCALE, empty=empty)


def _null_of(probe: PipelineProbe, guided: Recording, cond: Conditioning) -> Conditioning | str:
    """Return the inputs with which a guided run calls its network besides ``cond``; or the reason against them."""
    count, first = len(probe.two), guided.calls[0].arguments
    calls = len(guided.calls) // len(guided.steps)
    rows = len(tensor_of(first[probe.call.sample])) // count
    if calls * rows == 1:
        return "has no classifier-free guidance"
    if calls * rows > 2:
        return f"guides by {calls * rows} outputs, not by a plain combination of two"
    others = "passes other inputs to its network with guidance"
    try:
        if calls == 2:
            one, other = (probe.call.conditions_of(call.arguments, count) for call in guided.calls[:2])
        else:
            both = probe.call.conditions_of(first, 2 * count)
            one, other = both.part(0, count), both.part(count, 2 * count)
    except UserError:
        return others
    if not _is_same(one, cond) and not _is_same(other, cond):
        return others
    null = one if _is_same(other, cond) else other
    if any(not any(path.startswith(f"{side.name}.") for path in null.inputs) for side in probe.call.sides):
        return f"guides without its {probe.call.sides[0].name}"
    if not _combines(probe, guided, cond, null):
        return "guides by more than a plain combination of two outputs"
    return null


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


@torch.no_grad()
def _combines(probe: PipelineProbe, guided: Recording, cond: Conditioning, null: Conditioning) -> bool:
    """Return whether ``null + w (output - null)``, one w at two steps, is what the scheduler gets."""
    call, calls_per_step, weights = probe.call, len(guided.calls) // len(guided.steps), []
    for i in (0, len(guided.steps) - 1):
        arguments = guided.calls[i * calls_per_step].arguments
        x = call.sample_of(arguments)[: len(probe.two)]
        time = call.time_of(arguments).expand(len(x))
        output, uncond = (call(probe.network, x, time, each, None).flatten() for each in (cond, null))
        stepped = guided.steps[i].output * (-1 if probe.spec.inverted != probe.turned else 1)
        # A learned variance is not guided.
        stepped = call.output_of(stepped, x) if stepped.ndim == x.ndim else stepped
        if stepped.numel() != output.numel():
            return False
        # The mean does not depend on the layout of the numbers.
        weight = float((stepped.mean() - uncond.mean()) / (output.mean() - uncond.mean()))
        weights.append(weight)
        combined, expected = (uncond + weight * (output - uncond)).sort().values, stepped.flatten().sort().values
        if not bool((combined - expected).abs().max() <= _TOLERANCE * stepped.abs().max()):
            return False
    return abs(weights[0] - weights[1]) < _TOLERANCE * abs(weights[0])


def _is_same(one: Conditioning, other: Conditioning) -> bool:
    # With guidance, text encoders may run on batches of another size.
    return one.inputs.keys() == other.inputs.keys() and all(
        is_close(rows, other.inputs[name]) for name, rows in one.inputs.items()
    )
