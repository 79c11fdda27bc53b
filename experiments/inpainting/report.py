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
    # Decoding included.
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
    for found in list(evaluations.values())[:1]:
        for sampler, title in SOLVERS.items():
            yield from _row(title, found["rows"], sampler, calls)
    for name, found in evaluations.items():
        yield from _row(f"**student, {name}**", found["rows"], "student", calls)
        trained = [row | {"seconds_per_image": None} for row in found["rows_of_training"]]
        yield from _row(f"student, {name}, at conditions of its training", trained, "student", calls)


def _row(title: str, rows: Sequence[dict[str, Any]], sampler: str, calls: Sequence[int]) -> Iterator[str]:
    """Yield the line of a sampler, if it was measured."""
    known = {row["calls"]: row for row in rows if row["sampler"] == sampler}
    if known:
        # A solver with two calls per step has the largest number that is no larger.
        nearest = [known[max(made for made in known if made <= n)] for n in calls]
        cells = [f"{row['endpoint_error']:.4f}" for row in nearest]
        seconds = nearest[-1]["seconds_per_image"]
        cells.append("" if seconds is None else f"{seconds:.4f}")
        yield f"| {title} | {' | '.join(cells)} |"
