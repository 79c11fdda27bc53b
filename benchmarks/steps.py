"""What a training step of every loss costs: as a multiple of flow matching's, and of its floor.

    python -m benchmarks.steps --output steps.json
    python -m benchmarks.steps --network dit --size large --batch 64 --precision bf16 --device cuda

The floor of a step is the sum of the network passes that it can't do without (``benchmarks/step_cases.py``), each timed
alone in the same run: a tangent counts as one forward pass, whichever engine takes it, and the update (clipping, AdamW,
one average) is a part of every step. Flow matching trains the same network by the same trainer. Whole steps, flow
matching's and the passes take turns, every other repeat the other way round; ratios are taken within a repeat, numbers
are their medians with the middle half. Memory is what a step holds at most beside weights, moments and averages.

With ``--fastgen CHECKOUT`` (https://github.com/NVlabs/FastGen) the steps of its mean-flow and sCM losses take turns
with them on the same network, teacher and batch (``benchmarks/step_peers.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from benchmarks.step_cases import BASELINE, CASES, make_teacher, make_trainer
from benchmarks.step_peers import PEERS, PeerStep
from fmm_distill.core.draws import draw
from fmm_distill.core.parametrization import keywords
from fmm_distill.data.starting_points import draw_conditioning
from fmm_distill.student.student import Student
from fmm_distill.training.memory import _Live
from fmm_distill.training.signals import StopRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from benchmarks.step_cases import Case, Passes
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.training.trainer import Trainer


class Alone:
    """The passes that floors are made of, on tensors made before."""

    def __init__(self, trainer: Trainer, batch: int) -> None:
        self.trainer, self.teacher, self.student = trainer, trainer.teacher, trainer.student
        device = trainer.accelerator.device
        draws = draw(1, 0, batch, self.teacher.event_shape).part(0, batch, device)
        self.x = draws.noise
        self.time = torch.linspace(50, 900, batch, device=device)
        self.length = torch.full((batch,), 0.3, device=device)
        self.cond = draw_conditioning(self.teacher, draws)

    def _half(self) -> AbstractContextManager[None]:
        return self.trainer.accelerator.autocast()

    @torch.no_grad()
    def teachers(self) -> None:
        """The teacher's forward pass."""
        with self._half():
            self.teacher.network(self.x, self.time, **keywords(self.cond, None))

    @torch.no_grad()
    def forward(self) -> None:
        """The student's."""
        with self._half():
            self.student.network(self.x, self.time, **keywords(self.cond, self.length))

    def both(self) -> None:
        """The student's forward and backward pass."""
        with self._half():
            output = self.student.network(self.x, self.time, **keywords(self.cond, self.length)).sample
        output.float().square().mean().backward()
        self.trainer.optimizer.zero_grad()

    def with_gradients(self) -> None:
        """Before the update: every weight has a gradient."""
        for weight in self.trainer.objective.parameters():
            weight.grad = torch.zeros_like(weight)

    def update(self) -> None:
        """What follows the backward pass."""
        trainer = self.trainer
        trainer.accelerator.clip_grad_norm_(trainer.objective.parameters(), trainer.recipe.training.max_grad_norm)
        trainer.optimizer.step()
        for average in trainer.averages.values():
            average.update_parameters(trainer.student)
        trainer.optimizer.zero_grad()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call, to the end of what it started on a GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else time.time
    wait()
    started = time.perf_counter()
    call()
    wait()
    return 1000 * (time.perf_counter() - started)


def measured(values: Sequence[float]) -> dict[str, float]:
    """Median and middle half."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call holds at most beside what was there."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    live = _Live()
    with live:
        call()
    return int(max(moment.live for moment in live.moments))


def floor(passes: Passes | None, now: dict[str, float]) -> float | None:
    """Milliseconds of these passes; None where they are not counted."""
    if passes is None:
        return None
    backward = now["both"] - now["forward"]
    return (
        now["update"] + passes.teacher * now["teachers"] + passes.student * now["forward"] + passes.backward * backward
    )


def compare(
    case: Case, trainer: Trainer, baseline: Trainer, peers: dict[str, PeerStep], repeats: int, batch: int
) -> dict[str, Any]:
    """A loss's step against flow matching's, its floor, and the peers' steps."""
    device = trainer.accelerator.device
    alone = Alone(trainer, batch)
    steps: dict[str, Callable[[int], object]] = {
        "baseline": lambda step: baseline._step(step, StopRequest()),
        "teachers": lambda _: alone.teachers(),
        "forward": lambda _: alone.forward(),
        "both": lambda _: alone.both(),
        "update": lambda _: alone.update(),
        **peers,
        "step": lambda step: trainer.train_step(step, StopRequest()),
    }
    rounds = []
    for step in range(repeats + 1):
        now = {}
        for name in list(steps) if step % 2 else list(reversed(steps)):
            if name == "update":
                alone.with_gradients()
            now[name] = timed(partial(steps[name], step), device)
        rounds.append(now)
    # The first one warms up.
    del rounds[0]
    memory = {name: peak(partial(steps[name], repeats + 1), device) for name in ("step", "baseline", *peers)}
    floors = [floor(case.floor, now) for now in rounds]
    counted = case.floor is not None
    return {
        "milliseconds": {name: measured([now[name] for now in rounds]) for name in rounds[0]},
        "floor_milliseconds": measured(floors) if counted else None,
        "by_flow_matching": measured([now["step"] / now["baseline"] for now in rounds]),
        "by_floor": measured([now["step"] / least for now, least in zip(rounds, floors, strict=True)])
        if counted
        else None,
        "by_forward_and_backward": measured([now["step"] / now["both"] for now in rounds]),
        "by_peer": {name: measured([now["step"] / now[name] for now in rounds]) for name in peers},
        "bytes": memory,
        "memory_by_flow_matching": memory["step"] / memory["baseline"],
        "memory_by_peer": {name: memory["step"] / memory[name] for name in peers},
    }


def pairs_of(only: Sequence[str]) -> Iterator[tuple[Case, str]]:
    """Losses and engines that are asked for; a name stands for all that begin with it."""
    for case in CASES:
        if not only or any(case.name.startswith(name) for name in only):
            yield from ((case, engine) for engine in case.engines())


def run(given: argparse.Namespace) -> None:
    """All of it, one loss after the other; what is measured is written after each."""
    torch.set_num_threads(given.threads)
    half = "no" if given.precision == "fp32" else given.precision
    accelerator = Accelerator(cpu=given.device == "cpu", mixed_precision=half)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        teacher = make_teacher(given.network, given.size)
        about = about_run(given, sum(p.numel() for p in teacher.network.parameters()))
        baseline = make_trainer(BASELINE, "none", teacher, given.batch, accelerator, Path(folder))
        peers = peers_of(given.fastgen, teacher, given.batch, accelerator)
        print(head(peers), flush=True)
        for case, engine in pairs_of(given.only):
            trainer = make_trainer(case, engine, teacher, given.batch, accelerator, Path(folder))
            found = compare(case, trainer, baseline, peers, given.repeats, given.batch)
            rows.append({"loss": case.name, "derivative": engine} | found)
            print(line(rows[-1]), flush=True)
            given.output.write_text(json.dumps({"about": about, "losses": rows}, indent=2) + "\n", encoding="utf-8")
            # It holds every module that it has prepared.
            del trainer
            accelerator.free_memory()


def peers_of(
    checkout: Path | None, teacher: Teacher, batch: int, accelerator: Accelerator
) -> dict[str, Callable[[int], None]]:
    """The peers' steps, each on a student of its own."""
    if checkout is None:
        return {}
    return {
        name: PeerStep(name, checkout, Student.from_teacher(teacher), teacher, batch, accelerator) for name in PEERS
    }


def about_peers(
    checkout: Path, teacher: Teacher, batch: int, accelerator: Accelerator
) -> tuple[dict[str, Callable[[int], None]], dict[str, str]]:
    """The peers' steps that run on this network in this precision, and why the others don't."""
    peers, failed = {}, {}
    for name in PEERS:
        try:
            peer = PeerStep(name, checkout, Student.from_teacher(teacher), teacher, batch, accelerator)
            peer(0)
        except Exception as error:  # noqa: BLE001 a peer's code in torch's own forward mode fails in many ways
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        else:
            peers[name] = peer
    return peers, failed


def about_run(given: argparse.Namespace, parameters: int) -> dict[str, Any]:
    """What was run, and where."""
    device = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()
    about = {name: getattr(given, name) for name in ("network", "size", "batch", "repeats", "precision", "threads")}
    return about | {"parameters": parameters, "device": device, "cores": os.cpu_count(), "torch": torch.__version__}


COLUMNS = (
    "loss",
    "derivative",
    "ms",
    "by flow matching",
    "by its floor",
    "by forward and backward",
    "memory by flow matching",
)


def head(peers: Iterable[str]) -> str:
    """Of the table."""
    columns = [*COLUMNS, *(f"by {name}" for name in peers)]
    return "| " + " | ".join(columns) + " |\n|---|---|" + "---:|" * (len(columns) - 2)


def line(row: dict[str, Any]) -> str:
    """Of the table, medians with the middle half of the ratios."""

    def shown(ratio: dict[str, float]) -> str:
        return "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio)

    cells = [row["loss"], row["derivative"], f"{row['milliseconds']['step']['median']:.0f}"]
    cells += [shown(row["by_flow_matching"]), shown(row["by_floor"]), f"{row['by_forward_and_backward']['median']:.2f}"]
    cells.append(f"{row['memory_by_flow_matching']:.2f}")
    cells += [f"{shown(ratio)}, memory {row['memory_by_peer'][name]:.2f}" for name, ratio in row["by_peer"].items()]
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("steps.json"))
    parser.add_argument("--network", choices=("unet", "dit"), default="unet")
    parser.add_argument("--size", choices=("small", "large", "tiny"), default="small", help="5M or S/2; 36M or B/2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=(), help="names of losses, or how they begin; all")
    parser.add_argument("--fastgen", type=Path, help="checkout of FastGen, whose steps are timed beside")
    parser.add_argument("--quick", action="store_true", help="the tiny network and two repeats: to see that it runs")
    given = parser.parse_args(arguments)
    if given.quick:
        given.size, given.batch, given.repeats = "tiny", 2, 2
    run(given)


if __name__ == "__main__":
    main()
