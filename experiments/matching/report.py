"""Tables of the comparison, from its results alone."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from experiments.matching.cases import CASES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["markdown"]

QUANTITIES = {"frechet": "Fréchet distance", "endpoint": "Endpoint error", "recall": "Recall", "precision": "Precision"}
SOLVERS = {"ddim": "teacher, DDIM", "dpmsolver++": "teacher, DPM-Solver++"}


def markdown(results: dict[str, Any]) -> str:
    """Return a table of each quantity, and one of the costs; of several seeds the mean and its standard error."""
    calls = [str(n) for n in results["budget"]["calls"]]
    lines: list[str] = []
    for quantity, title in QUANTITIES.items():
        lines += [f"{title}:", "", f"| sampler | {' | '.join(calls)} |", "|---|" + "---:|" * len(calls)]
        lines += [*_rows(results, quantity, calls), ""]
    titles = ("case", "CPU seconds", "student steps", "critic updates", "passes per student step and image", "seeds")
    lines.append(f"| {' | '.join(titles)} |")
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for name, runs in _students(results):
        cells = [f"{statistics.mean(run['cpu_seconds'] for run in runs):.0f}"]
        cells += [
            f"{statistics.mean(run[key] for run in runs):.0f}" if key in runs[0] else ""
            for key in ("steps", "critic_updates")
        ]
        cells += [f"{statistics.mean(run['passes'] for run in runs):.1f}", str(len(runs))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _students(results: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the runs of all seeds of each case, in the order of the cases."""
    students = results["students"]
    for name in [*(name for name in CASES if name in students), *(name for name in students if name not in CASES)]:
        yield name, list(students[name]["seeds"].values())


def _rows(results: dict[str, Any], quantity: str, calls: Sequence[str]) -> Iterator[str]:
    samplers = [(SOLVERS[kind], [rows]) for kind, rows in results["teacher"].items()]
    samplers += [(name, [run["rows"] for run in runs]) for name, runs in _students(results)]
    for name, runs in samplers:
        cells = []
        for n in calls:
            values = [rows[n][quantity] for rows in runs]
            digits = ".2f" if quantity == "frechet" else ".3f"
            error = f" ± {statistics.stdev(values) / len(values) ** 0.5:{digits}}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{digits}}{error}")
        yield f"| {name} | {' | '.join(cells)} |"
