"""Measure a training step of every loss, relative to one of flow matching and to its floor.

    python -m benchmarks.steps --output steps.json
    python -m benchmarks.steps --network dit --size large --batch 64 --precision bf16 --device cuda

The floor of a step is the sum of the network passes that it needs (``benchmarks/step_cases.py``), each timed alone in
the same run. A tangent counts as one forward pass, with either engine, and the update (clipping, AdamW, one average) is
a part of every step. Flow matching trains the same network with the same trainer. Complete steps, those of flow
matching and the passes alternate, in reverse order in every second repeat; ratios are taken within a repeat, numbers
are their medians with the interquartile range. Memory is the peak of a step, in addition to weights, moments and
averages.

With ``--fastgen CHECKOUT`` (https://github.com/NVlabs/FastGen) the steps of its mean-flow and sCM losses alternate with
these on the same network, teacher and batch (``benchmarks/step_peers.py``).
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
    """The passes of the floors, on existing tensors."""

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
        """Run the forward pass of the teacher."""
        with self._half():
            self.teacher.network(self.x, self.time, **keywords(self.cond, None))

    @torch.no_grad()
    def forward(self) -> None:
        """Run the forward pass of the student."""
        with self._half():
            self.student.network(self.x, self.time, **keywords(self.cond, self.length))

    def both(self) -> None:
        """Run the forward and backward pass of the student."""
        with self._half():
            output = self.student.network(self.x, self.time, **keywords(self.cond, self.length)).sample
        output.float().square().mean().backward()
        self.trainer.optimizer.zero_grad()

    def with_gradients(self) -> None:
        """Give every weight a gradient, for the update."""
        for weight in self.trainer.objective.parameters():
            weight.grad = torch.zeros_like(weight)

    def update(self) -> None:
        """Run the update, which follows the backward pass."""
        trainer = self.trainer
        trainer.accelerator.clip_grad_norm_(trainer.objective.parameters(), trainer.recipe.training.max_grad_norm)
        trainer.optimizer.step()
        for average in trainer.averages.values():
            average.update_parameters(trainer.student)
        trainer.optimizer.zero_grad()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of a call, including its work on a GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else time.time
    wait()
    started = time.perf_counter()
    call()
    wait()
    return 1000 * (time.perf_counter() - started)


def measured(values: Sequence[float]) -> dict[str, float]:
    """Return median and interquartile range."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the additional bytes of a call."""
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
    """Return the milliseconds of these passes; None without a count."""
    if passes is None:
        return None
    backward = now["both"] - now["forward"]
    return (
        now["update"] + passes.teacher * now["teachers"] + passes.student * now["forward"] + passes.backward * backward
    )


def compare(
    case: Case, trainer: Trainer, baseline: Trainer, peers: dict[str, PeerStep], repeats: int, batch: int
) -> dict[str, Any]:
    """Compare the step of a loss with flow matching, its floor, and the steps of the peers."""
    device = trainer.accelerator.device
    alone = Alone(trainer, batch)
    steps: dict[str, Callable[[int], object]] = {
        "baseline": lambda step: baseline.train_step(step, StopRequest()),
        "teachers": lambda _: alone.teachers(),
        "forward": lambda _: alone.forward(),
        "both": lambda _: alone.both(),
        "update": lambda _: alone.update(),
        **peers,
        "step": lambda step: trainer.train_step(case.first_step + step, StopRequest()),
    }
    rounds = []
    for step in range(repeats + 1):
        now = {}
        for name in list(steps) if step % 2 else list(reversed(steps)):
            if name == "update":
                alone.with_gradients()
            now[name] = timed(partial(steps[name], step), device)
        rounds.append(now)
    # The first one is a warm-up.
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
    """Return the selected losses and engines; a name selects all that begin with it."""
    for case in CASES:
        if not only or any(case.name.startswith(name) for name in only):
            yield from ((case, engine) for engine in case.engines())


def run(given: argparse.Namespace) -> None:
    """Measure one loss after the other, and write the results after each."""
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
            # It has references to all modules that it has prepared.
            del trainer
            accelerator.free_memory()


def peers_of(
    checkout: Path | None, teacher: Teacher, batch: int, accelerator: Accelerator
) -> dict[str, Callable[[int], None]]:
    """Return the steps of the peers, each with its own student."""
    if checkout is None:
        return {}
    return {
        name: PeerStep(name, checkout, Student.from_teacher(teacher), teacher, batch, accelerator) for name in PEERS
    }


def about_peers(
    checkout: Path, teacher: Teacher, batch: int, accelerator: Accelerator
) -> tuple[dict[str, Callable[[int], None]], dict[str, str]]:
    """Return the steps of peers that support this network and precision, and the reasons why others don't."""
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
    """Return the settings and the machine."""
    device = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()
    about = {name: getattr(given, name) for name in ("network", "size", "batch", "repeats", "precision", "threads")}
    return about | {"parameters": parameters, "device": device, "cores": os.cpu_count(), "torch": torch.__version__}


COLUMNS = (
    "loss",
    "derivative",
    "ms",
    "relative to flow matching",
    "relative to its floor",
    "relative to forward and backward",
    "memory relative to flow matching",
)


def head(peers: Iterable[str]) -> str:
    """Return the head of the table."""
    columns = [*COLUMNS, *(f"relative to {name}" for name in peers)]
    return "| " + " | ".join(columns) + " |\n|---|---|" + "---:|" * (len(columns) - 2)


def line(row: dict[str, Any]) -> str:
    """Return a line of the table: medians, with the interquartile range of ratios."""

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
    parser.add_argument("--only", nargs="*", default=(), help="names of losses or their beginnings [all]")
    parser.add_argument("--fastgen", type=Path, help="checkout of FastGen, for a comparison of its steps")
    parser.add_argument("--quick", action="store_true", help="the tiny network and two repeats, for a trial")
    given = parser.parse_args(arguments)
    if given.quick:
        given.size, given.batch, given.repeats = "tiny", 2, 2
    run(given)


if __name__ == "__main__":
    main()
