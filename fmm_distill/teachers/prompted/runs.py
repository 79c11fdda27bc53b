"""Recorded runs of a pipeline without guidance, and with guidance of its own."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fmm_distill.errors import UserError
from fmm_distill.teachers.guiders import plain_guiders
from fmm_distill.teachers.recording import record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fmm_distill.teachers.prompted.call_keywords import CallKeywords
    from fmm_distill.teachers.recording import Recording

__all__ = ["record_guided", "record_unguided"]


def record_unguided(
    pipeline: Any,  # noqa: ANN401 a diffusers class
    component: str,
    keywords: CallKeywords,
    prompts: Sequence[str],
    steps: int,
    scale: float,
) -> tuple[CallKeywords, Recording]:
    """Run a pipeline without guidance; return the keywords with the value at which guidance is off, and the run.

    Args:
        scale: the guidance scale of a network that is conditioned on it.

    Raises:
        UserError: if the pipeline does not run, or guides at every value.
    """
    recording = record(pipeline, component, keywords.call(prompts, steps))
    if keywords.guidance == "guidance_scale" and recording.takes_guidance:
        keywords = keywords.with_guidance_input(scale)
        return keywords, record(pipeline, component, keywords.call(prompts, steps))
    if keywords.guidance is not None and _rows_per_sample(recording) > 1:
        # Where the scale times a difference is added to the conditional output, 0 is off.
        other = replace(keywords, off=0.0)
        trial = record(pipeline, component, other.call(prompts, steps))
        if _rows_per_sample(trial) < _rows_per_sample(recording):
            keywords, recording = other, trial
        elif _is_doubled(trial):
            raise UserError(
                f"{type(pipeline).__name__}: expected one output per sample without guidance, got "
                f"{_rows_per_sample(trial):g} at every {keywords.guidance}; write an adapter for it "
                "(docs/add-a-teacher.md)"
            )
    return keywords, recording


def record_guided(
    pipeline: Any,  # noqa: ANN401 a diffusers class
    component: str,
    keywords: CallKeywords,
    prompts: Sequence[str],
    steps: int,
    scale: float,
) -> Recording:
    """Run a pipeline with its own guidance of this scale, by the empty prompt.

    Raises:
        UserError: if the pipeline does not run.
    """
    call = keywords.call(prompts, steps, guidance=scale)
    empty = {"negative_prompt": [""] * len(prompts)}
    with plain_guiders(pipeline, scale):
        if keywords.guidance == "true_cfg_scale":
            # Without a negative prompt these pipelines ignore true_cfg_scale.
            return record(pipeline, component, call | empty)
        try:
            return record(pipeline, component, call)
        except UserError:
            # Not in every run: where there is no negative prompt some pipelines use zeros, which a network has learned
            # in place of the empty prompt.
            if "negative_prompt" not in inspect.signature(pipeline.__call__).parameters:
                raise
            return record(pipeline, component, call | empty)


def _rows_per_sample(recording: Recording) -> float:
    """Return the number of outputs of the network per sample and step."""
    return sum(len(call.output) for call in recording.calls) / sum(len(step.sample) for step in recording.steps)


def _is_doubled(recording: Recording) -> bool:
    """Return whether several samples enter the network for one of the scheduler, and not the frames of one."""
    output, sample = recording.calls[0].output, recording.steps[0].sample
    return len(output) > len(sample) and output.shape[2:] == sample.shape[2:]
