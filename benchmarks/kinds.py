"""The cost of a training step of scaled students, next to that of an embedded one.

    python -m benchmarks.kinds --teacher FOLDER --batch 64 [--rank 16] [--groups 4 8] [--repeats 7]

The steps of all students alternate in one process, and the medians are divided by that of the embedded student. With
``--rank``, low-rank students are measured too, next to an embedded student with adapters of the same rank.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.config.recipe import parse
from fmm_distill.core.draws import draw
from fmm_distill.run.plan import plan
from fmm_distill.training.objective import Objective, resolve_engine

if TYPE_CHECKING:
    from collections.abc import Callable

LAGRANGIAN = {"name": "lagrangian", "stop_gradient": "target", "derivative": "central"}


def step_of(teacher: str, student: dict[str, Any], groups: int, batch: int) -> Callable[[int], float]:
    """Return a function that takes a training step and returns its seconds."""
    settings: dict[str, Any] = {"teacher": teacher, "loss": LAGRANGIAN, "student": student}
    settings |= {"training": {"steps": 10, "batch_size": batch}, "time_sampling": {"groups": groups}}
    job = plan(parse(settings, "benchmark"))
    loss, _ = resolve_engine(job.student, job.teacher, job.recipe.loss, job.recipe.training)
    objective = Objective(job.student, job.teacher, job.recipe, [loss], {}).eval()
    # A rate at which the weights stay finite however many steps are taken.
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 1e-6)

    def step(number: int) -> float:
        draws = draw(0, number, batch, job.teacher.event_shape, groups=groups)
        started = time.perf_counter()
        objective(draws, None, number)[1].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def cases(rank: int, groups: list[int]) -> dict[str, tuple[dict[str, Any], int]]:
    """Return the students that are measured: their settings and numbers of groups."""
    scaled = {"kind": "scaled"}
    found: dict[str, tuple[dict[str, Any], int]] = {"embedded": ({"kind": "embedded"}, 0), "scaled": (scaled, 0)}
    found |= {f"scaled, {number} groups": (scaled, number) for number in groups}
    for kind in ("embedded", "scaled") if rank else ():
        found[f"{kind}, rank {rank}"] = {"kind": kind, "lora": {"rank": rank}}, 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="builtin:digits")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--groups", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    chosen = cases(given.rank, given.groups)
    steps = {name: step_of(given.teacher, *case, given.batch) for name, case in chosen.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(given.repeats + 1):
        for name, step in steps.items():
            seconds[name].append(step(number))
    # The first step allocates memory.
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print("| student | milliseconds | of embedded |\n|---|---:|---:|")
    for name, value in medians.items():
        print(f"| {name} | {1000 * value:.0f} | {value / medians['embedded']:.2f} |")


if __name__ == "__main__":
    main()
