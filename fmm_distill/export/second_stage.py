"""The second stage of a student's training, in its manifest and on its card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fmm_distill.io.reading import check_keys
from fmm_distill.training.early_stopping import describe_end, evaluations_of_stage, judge_run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import UnionType

    from fmm_distill.config.recipe import Recipe

__all__ = ["check_facts", "describe_stage", "facts_of"]

_TYPES: dict[str, type | UnionType] = {
    "loss": str,
    "paper": str,
    "map_steps": int,
    "warmup_steps": int,
    "steps": int,
    "fraction": float,
    "rollout": list,
    "end": str | None,
    "before": list,
    "precision_recall": str | None,
}
_QUANTITIES = {
    "endpoint_error": ("endpoint error", ".4f"),
    "frechet": ("Fréchet distance", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
}
# Both depend on the number of samples that are compared.
_FRACTIONS = ("precision", "recall")


def facts_of(recipe: Recipe, run: Path | None, trained: int) -> dict[str, Any] | None:
    """Return the facts of the second stage; None: it has none, or is not in the exported state.

    Args:
        run: the run's folder, for the evaluations during training.
        trained: the number of training steps of the exported state.

    Raises:
        UserError: if ``evaluations.jsonl`` is damaged.
    """
    matching = recipe.matching
    if matching is None:
        return None
    verdict = None if run is None else judge_run(recipe, run)
    ended = verdict is not None and (verdict.reason is not None or verdict.last == recipe.total_steps)
    chosen = ended and verdict is not None and verdict.step == trained
    if trained <= recipe.map_steps and not chosen:
        return None
    lines = [] if run is None else evaluations_of_stage(recipe, run)
    of_map = lines[0] if lines and lines[0]["step"] == recipe.map_steps else {"rows": []}
    keys = ("steps", *_QUANTITIES)
    before = [{key: row.get(key) for key in keys} for row in of_map["rows"] if row["sampler"] == "student"]
    return {
        "loss": matching.loss.name,
        "paper": matching.loss.paper,
        "map_steps": recipe.map_steps,
        "warmup_steps": matching.critic.warmup_steps,
        "steps": max(0, trained - recipe.map_steps - matching.critic.warmup_steps),
        "fraction": matching.fraction,
        "rollout": list(matching.rollout.steps),
        "end": describe_end(recipe, verdict) if chosen and verdict is not None else None,
        "before": before,
        "precision_recall": of_map.get("protocol", {}).get("precision_recall"),
    }


def check_facts(where: str, found: Mapping[str, Any], todo: str) -> None:
    """Refuse facts of another form than ``facts_of`` returns.

    Args:
        where: the file and the position in it, for the message.

    Raises:
        BrokenFileError: with the name of the key.
    """
    check_keys(where, found, _TYPES, todo=todo)
    number = float | None
    for index, row in enumerate(found["before"]):
        check_keys(where, {"before": row}, {"before": dict}, todo=todo)
        check_keys(f"{where}: before {index}", row, {"steps": int} | dict.fromkeys(_QUANTITIES, number), todo=todo)


def describe_stage(facts: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    """Return the section of the model card.

    Args:
        evaluation: of the student; None: it was not evaluated.
    """
    parts = [f"### The second stage\n\n{_done(facts) if facts['steps'] else _without_steps(facts)}"]
    if facts["end"] is not None:
        parts.append(
            f"The second stage {facts['end']}. The evaluations that decided have the same noises as the reported "
            "values, which are therefore slightly too good."
        )
    if facts["before"] and facts["steps"]:
        table = _table(facts, evaluation)
        parts.append(
            f"Values of the map at the start of the second stage and, after the arrow, of this student:\n\n{table}"
        )
    return "\n\n".join(parts)


def _done(facts: Mapping[str, Any]) -> str:
    numbers = ", ".join(map(str, facts["rollout"]))
    rest = "" if facts["fraction"] == 1 else "; the losses of the map had the rest"
    first = (
        f"After {facts['map_steps']} steps on the losses of the map" if facts["map_steps"] else "From its first step"
    )
    return (
        f"{first}, distribution matching ({facts['loss']}, {facts['paper']}) moved the distribution of the student's "
        f"samples towards the teacher's for {facts['steps']} steps, after {facts['warmup_steps']} steps of its critic "
        f"alone. The critic is a network that learns the velocity of the student's samples. A fraction of "
        f"{facts['fraction']:g} of each batch was matched{rest}. These samples were those of {numbers} steps.\n\n"
        "The stage trades the coupling for the distribution: a sample may be farther from the endpoint of the "
        "teacher's ODE from the same noise (the endpoint error) than a map's."
    )


def _without_steps(facts: Mapping[str, Any]) -> str:
    return (
        f"The run had a second stage of distribution matching ({facts['loss']}, {facts['paper']}), of which no step is "
        "in this student."
    )


def _table(facts: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    rows = [] if evaluation is None else evaluation["rows"]
    after = {row["steps"]: row for row in rows if row["sampler"] == "student"}
    comparable = evaluation is None or evaluation["protocol"].get("precision_recall") == facts["precision_recall"]
    shown = [
        key
        for key in _QUANTITIES
        if (comparable or key not in _FRACTIONS) and any(row[key] is not None for row in facts["before"])
    ]
    lines = [f"| steps | {' | '.join(_QUANTITIES[key][0] for key in shown)} |", "|---" * (1 + len(shown)) + "|"]
    for row in facts["before"]:
        cells = (_cell(row[key], after.get(row["steps"], {}).get(key), _QUANTITIES[key][1]) for key in shown)
        lines.append(f"| {row['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(before: float | None, after: float | None, form: str) -> str:
    texts = ["not measured" if value is None else format(value, form) for value in (before, after)]
    return texts[0] if after is None else " → ".join(texts)
