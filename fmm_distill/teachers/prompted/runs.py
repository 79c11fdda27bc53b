"""Recorded runs of a pipeline without guidance, and with guidance of its own."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError
from fmm_distill.teachers.guiders import plain_guiders
from fmm_distill.teachers.prompted.encoding import encoding_by_mode
from fmm_distill.teachers.prompted.one_by_one import join_recordings
from fmm_distill.teachers.recording import record

if TYPE_CHECKING:
    from fmm_distill.teachers.prompted.call_keywords import CallKeywords
    from fmm_distill.teachers.prompts import Prompts
    from fmm_distill.teachers.recording import Recording

__all__ = ["record_guided", "record_prompts", "record_unguided"]


def record_prompts(
    pipeline: Any,  # noqa: ANN401 a diffusers class
    component: str,
    keywords: CallKeywords,
    prompts: Prompts,
    steps: int,
    *,
    first_only: bool = False,
    more: dict[str, Any] | None = None,
) -> Recording:
    """Run a pipeline with these prompts, one after the other if it takes no list.

    Args:
        first_only: stop at the first call of the network, before the network runs.
        more: keywords in addition to those of a call without guidance.

    Raises:
        UserError: if the pipeline does not run.
    """
    with encoding_by_mode(pipeline, prompts):
        if not keywords.one_prompt:
            call = keywords.call(prompts, steps) | (more or {})
            return record(pipeline, component, call, first_only=first_only)
        runs = []
        for number in range(len(prompts)):
            # Each sample has noise of its own, as in a batch.
            own = {"generator": torch.Generator().manual_seed(number)} | (more or {})
            call = keywords.call(prompts.some((number,)), steps) | own
            runs.append(record(pipeline, component, call, first_only=first_only))
    return join_recordings(runs)


def record_unguided(
    pipeline: Any,  # noqa: ANN401 a diffusers class
    component: str,
    keywords: CallKeywords,
    prompts: Prompts,
    steps: int,
    scale: float,
) -> tuple[CallKeywords, Recording]:
    """Run a pipeline without guidance; return the keywords with what the run shows, and the run.

    It shows the value at which guidance is off, and whether the pipeline takes one prompt at a time.

    Args:
        prompts: two or more, of which the first two are recorded.
        scale: the guidance scale of a network that is conditioned on it.

    Raises:
        UserError: if the pipeline does not run, or guides at every value.
    """
    few = prompts.some((0, 1))
    try:
        recording = record_prompts(pipeline, component, keywords, few, steps)
    except UserError:
        # Where this fails too, its reason is the true one: a list fails for being a list.
        keywords, few = replace(keywords, one_prompt=True), prompts.some((0,))
        recording = record_prompts(pipeline, component, keywords, few, steps)
    if keywords.guidance == "guidance_scale" and recording.takes_guidance:
        keywords = keywords.with_guidance_input(scale)
        return keywords, record_prompts(pipeline, component, keywords, prompts.some((0, 1)), steps)
    if keywords.guidance is not None and _rows_per_sample(recording) > 1:
        # Where the scale times a difference is added to the conditional output, 0 is off.
        other = replace(keywords, off=0.0)
        trial = record_prompts(pipeline, component, other, few, steps)
        if _rows_per_sample(trial) < _rows_per_sample(recording):
            keywords, recording = other, trial
        elif _is_doubled(trial):
            raise UserError(
                f"{type(pipeline).__name__}: expected one output per sample without guidance, got "
                f"{_rows_per_sample(trial):g} at every {keywords.guidance}; write an adapter for it "
                "(docs/add-a-teacher.md)"
            )
    if keywords.one_prompt:
        recording = record_prompts(pipeline, component, keywords, prompts.some((0, 1)), steps)
    return keywords, recording


def record_guided(
    pipeline: Any,  # noqa: ANN401 a diffusers class
    component: str,
    keywords: CallKeywords,
    prompts: Prompts,
    steps: int,
    scale: float,
    *,
    empty: bool = False,
) -> Recording:
    """Run a pipeline with its own guidance of this scale.

    Args:
        empty: by the empty prompt, whatever negative prompt the pipeline has by default.

    Raises:
        UserError: if the pipeline does not run.
    """
    more = keywords.guided(scale)
    negative = {"negative_prompt": "" if keywords.one_prompt else [""] * len(prompts)}
    with plain_guiders(pipeline, scale):
        if empty or keywords.guidance == "true_cfg_scale":
            # Without a negative prompt these pipelines ignore true_cfg_scale.
            return record_prompts(pipeline, component, keywords, prompts, steps, more=more | negative)
        try:
            return record_prompts(pipeline, component, keywords, prompts, steps, more=more)
        except UserError:
            # Not in every run: where there is no negative prompt some pipelines use zeros, which a network has learned
            # in place of the empty prompt.
            if "negative_prompt" not in inspect.signature(pipeline.__call__).parameters:
                raise
            return record_prompts(pipeline, component, keywords, prompts, steps, more=more | negative)


def _rows_per_sample(recording: Recording) -> float:
    """Return the number of outputs of the network per sample and step."""
    return sum(len(call.output) for call in recording.calls) / sum(len(step.sample) for step in recording.steps)


def _is_doubled(recording: Recording) -> bool:
    """Return whether several samples enter the network for one of the scheduler, and not the frames of one."""
    output, sample = recording.calls[0].output, recording.steps[0].sample
    return len(output) > len(sample) and output.ndim == sample.ndim
