"""Early stopping of the second stage: a function of the evaluations during training, without torch."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fmm_distill.io.reading import read_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fmm_distill.config.recipe import Recipe

__all__ = [
    "Verdict",
    "describe_end",
    "evaluation_settings",
    "evaluations_of_stage",
    "is_evaluated",
    "judge",
    "judge_run",
    "judged",
    "quantity_of",
    "value_of",
]

_NAMES = {"frechet": "Fréchet distance", "recall": "recall", "endpoint_error": "endpoint error"}
_KEYS = {"step": int, "rows": list, "settings": dict}


@dataclass(frozen=True)
class Verdict:
    """The judgment of all evaluations of a second stage so far.

    Attributes:
        step: number of steps done at the best evaluation, whose average is exported.
        value: the metric there.
        since: number of evaluations after it.
        last: number of steps done at the last evaluation.
        reason: the reason to end the stage at ``last``; None: it continues.
    """

    step: int
    value: float
    since: int
    last: int
    reason: str | None


def is_evaluated(recipe: Recipe, step: int) -> bool:
    """Return whether the first average is evaluated during training after this number of steps.

    The first evaluation of a second stage is of the map, at its start. The critic's warm-up changes no average and has
    none. The state after the last step has the final evaluation and, with ``matching.stop``, one like the others.
    """
    every, matching = recipe.evaluation.every, recipe.matching
    if matching is None or step < recipe.map_steps:
        return bool(every) and 0 < step < recipe.total_steps and step % every == 0
    if not (every := matching.evaluate_every or every):
        return False
    if step in (recipe.map_steps, recipe.total_steps):
        return step == recipe.map_steps or matching.stop is not None
    done = step - recipe.map_steps - matching.critic.warmup_steps
    return done > 0 and done % every == 0


def evaluation_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that evaluations must share to be comparable, as ``evaluations.jsonl`` has them."""
    return recipe.evaluation.model_dump(mode="json", exclude={"every"})


def judged(recipe: Recipe, step: int) -> bool:
    """Return whether the evaluation after this number of steps decides about the end of the second stage."""
    stop = None if recipe.matching is None else recipe.matching.stop
    return stop is not None and step >= recipe.map_steps and is_evaluated(recipe, step)


def judge_run(recipe: Recipe, folder: Path) -> Verdict | None:
    """Judge the evaluations in the folder of a run.

    Returns:
        None without ``matching.stop``, and before the first evaluation of the stage.

    Raises:
        UserError: if ``evaluations.jsonl`` is damaged.
    """
    if recipe.matching is None or recipe.matching.stop is None:
        return None
    return judge(evaluations_of_stage(recipe, folder), recipe.matching.stop.model_dump())


def evaluations_of_stage(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``evaluations.jsonl`` of the second stage, the map's first.

    Raises:
        UserError: if the file is damaged.
    """
    log, settings = folder / "evaluations.jsonl", evaluation_settings(recipe)
    lines = read_lines(log, _KEYS, todo=f"remove the lines from there on of {log.name}, and run it again")
    # Values of other settings, from before a change of the recipe, are not comparable.
    return [line for line in lines if line["step"] >= recipe.map_steps and line["settings"] == settings]


def judge(lines: Sequence[Mapping[str, Any]], rule: Mapping[str, Any]) -> Verdict | None:
    """Return the verdict on evaluations in the order of their steps; None if there are none.

    Args:
        lines: of ``evaluations.jsonl``, those of the second stage, the map's first.
        rule: the settings of ``matching.stop``.
    """
    if not lines:
        return None
    best, best_value, since = lines[0]["step"], _score(lines[0], rule), 0
    last, reason = best, _crossed(lines[0], rule)
    for line in lines[1:]:
        if reason is not None:
            break
        last, since, reason = line["step"], since + 1, _crossed(line, rule)
        value = _score(line, rule)
        if reason is None and value < best_value:
            best, best_value, since = line["step"], value, 0
        elif reason is None and rule["patience"] is not None and since >= rule["patience"]:
            count = "1 evaluation" if since == 1 else f"{since} evaluations"
            reason = f"the {quantity_of(rule)} had not improved for {count}"
    return Verdict(best, -best_value if rule["metric"] == "recall" else best_value, since, last, reason)


def describe_end(recipe: Recipe, verdict: Verdict) -> str:
    """Return a sentence without its subject, the second stage: how long it was, why it ended, and what is exported."""
    matching = recipe.matching
    if matching is None or matching.stop is None:
        return "has no early stopping"
    first = recipe.map_steps + matching.critic.warmup_steps
    last, best = (max(0, step - first) for step in (verdict.last, verdict.step))
    rule = matching.stop.model_dump()
    ended = "had all its" if verdict.reason is None else f"ended after {last} of its"
    why = "" if verdict.reason is None else f": {verdict.reason} (early stopping)"
    which = "the map before it" if verdict.step <= recipe.map_steps else f"the average after {best} steps"
    within = " within the bounds" if matching.stop.has_bounds else ""
    return f"{ended} {matching.steps} steps{why}; exported is {which}, with the best {quantity_of(rule)}{within}"


def quantity_of(rule: Mapping[str, Any], metric: str | None = None) -> str:
    """Return the name of the metric of a rule, such as "Fréchet distance at 1 call".

    Args:
        metric: of a bound; None: the rule's own.
    """
    calls = rule["calls"]
    where = "1 call" if calls == 1 else f"{calls} calls"
    name = _NAMES[metric or rule["metric"]]
    return f"mean {name} over the numbers of calls" if calls is None else f"{name} at {where}"


def value_of(line: Mapping[str, Any], metric: str, calls: int | None) -> float:
    """Return a metric of the student in a line of ``evaluations.jsonl``; NaN if it was not measured.

    Args:
        calls: the number of steps of the student; None: the mean over all of them.
    """
    rows = [row for row in line["rows"] if row["sampler"] == "student" and calls in (None, row["steps"])]
    values = [row.get(metric) for row in rows]
    return math.nan if not values or None in values else statistics.fmean(values)


def _score(line: Mapping[str, Any], rule: Mapping[str, Any]) -> float:
    """Return a number that is lower for a better average; infinity for samples that are not finite."""
    value = value_of(line, rule["metric"], rule["calls"])
    value = -value if rule["metric"] == "recall" else value
    return math.inf if math.isnan(value) else value


def _crossed(line: Mapping[str, Any], rule: Mapping[str, Any]) -> str | None:
    """Return the bound that an evaluation crosses, as the reason to stop; None: it is within all."""
    for metric, key, sign in (("endpoint_error", "max_endpoint_error", 1), ("recall", "min_recall", -1)):
        bound = rule[key]
        if bound is None:
            continue
        value = value_of(line, metric, rule["calls"])
        # Not finite is outside.
        if not sign * value <= sign * bound:
            side = "above" if sign > 0 else "below"
            return f"the {quantity_of(rule, metric)} was {value:.4g}, {side} {bound:g}"
    return None
