"""The phase of a training step: regression, a stage, the main loss, the critic alone, or the matching."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmm_distill.config.recipe import Recipe

__all__ = ["phase_of"]


def phase_of(recipe: Recipe, step: int) -> dict[str, Any]:
    """Return the phase of a step as ``steps.jsonl`` has it, with the settings that are still warming up.

    Args:
        step: number of the step, from 0, regression included.
    """
    regression = recipe.student.regression_steps
    if step < regression:
        return {"phase": "regression"}
    if recipe.matching is not None and step >= recipe.map_steps:
        matching = recipe.matching
        warmup = step < recipe.map_steps + matching.critic.warmup_steps
        return {"phase": "critic" if warmup else matching.loss.name}
    index, step = recipe.stage_at(step - regression)
    stage = None if index is None else recipe.stages[index]
    loss = recipe.loss if stage is None else stage.loss
    sampling = (None if stage is None else stage.time_sampling) or recipe.time_sampling
    phase: dict[str, Any] = {"phase": loss.name}
    if step < sampling.band_steps:
        phase["longest_jump"] = sampling.longest_jump(step)
    return phase | loss.progress(step)
