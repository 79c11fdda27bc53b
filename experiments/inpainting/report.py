"""The table of the inpainting experiment, from its results alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["markdown"]

SOLVERS = {
    "teacher-ddim": "teacher, DDIM",
    "teacher-dpmsolver++": "teacher, DPM-Solver++",
    "teacher-unipc": "teacher, UniPC",
    "teacher-heun": "teacher, Heun",
}


def markdown(results: dict[str, Any]) -> str:
    """Return the endpoint errors of all samplers at no more than so many network calls, and what was trained."""
    calls = results["budget"]["calls"]
    lines = [f"| sampler | {' | '.join(map(str, calls))} | seconds per image, {calls[-1]} calls |"]
    lines += ["|---|" + "---:|" * (len(calls) + 1), *_rows(results, calls), ""]
    for part, found in results.get("teacher", {}).items():
        numbers = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in found.items())
        lines.append(f"Teacher, {part}: {numbers}.")
    for name, found in results["students"].items():
        lines.append(f"Student, {name}: {found['cpu_seconds']:.0f} CPU seconds.")
    return "\n".join([*lines, ""])


def _rows(results: dict[str, Any], calls: Sequence[int]) -> Iterator[str]:
    """Yield the teacher's solvers, which each evaluation has, and the students."""
    evaluations = results["students"]
    samplers = {}
    for found in list(evaluations.values())[:1]:
        samplers |= {title: _by_calls(found["rows"], name) for name, title in SOLVERS.items()}
    for name, found in evaluations.items():
        samplers[f"**student, {name}**"] = _by_calls(found["rows"], "student")
        samplers[f"student, {name}, at conditions of its training"] = _by_calls(found["rows_of_training"], "student")
    for title, rows in samplers.items():
        if rows:
            # A solver with two calls per step has the largest number that is no larger.
            nearest = [rows[max(made for made in rows if made <= n)] for n in calls]
            cells = [f"{row['endpoint_error']:.4f}" for row in nearest]
            cells.append(f"{nearest[-1]['seconds_per_image']:.4f}")
            yield f"| {title} | {' | '.join(cells)} |"


def _by_calls(rows: Sequence[dict[str, Any]], sampler: str) -> dict[int, dict[str, Any]]:
    return {row["calls"]: row for row in rows if row["sampler"] == sampler}
