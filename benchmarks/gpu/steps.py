"""Stage ``steps``: training steps of every loss in every setting, as in ``benchmarks/steps.py``."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.rows import Row, take
from benchmarks.step_cases import BASELINE, CASES, Case, make_teacher, make_trainer
from benchmarks.steps import about_peers, compare
from fmm_distill.losses import registered_losses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu.budget import Deadline
    from benchmarks.gpu.stage import Job

BATCH = {"unet": 64, "dit": 64}
REPEATS = 7


@dataclass(frozen=True)
class Setting:
    """A network and its arithmetic; rows of one setting share teacher, flow matching and FastGen's steps."""

    network: str
    precision: str
    compiled: bool = False
    fused: bool = True

    def __str__(self) -> str:
        words = [{"unet": "UNet", "dit": "DiT"}[self.network], self.precision]
        words += ["compiled"] * self.compiled + ["attention without a fused kernel"] * (not self.fused)
        return ", ".join(words)


EAGER = [Setting(network, precision) for precision in ("bf16", "fp32") for network in ("unet", "dit")]


def cases() -> tuple[list[Case], list[Case]]:
    """Return the first case of every registered loss, and all other cases.

    A loss without a case is timed with its default settings, without a floor.
    """
    first = []
    for name in registered_losses():
        known = [case for case in CASES if case.loss["name"] == name]
        first.append(known[0] if known else Case(f"{name}, as it comes", {"name": name}, None))
    return first, [case for case in CASES if case not in first]


class Bench:
    """Objects that the rows of a setting share, replaced when the setting changes."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.options, self.folder = job.options, folder
        self.setting: Setting | None = None
        self.peers_failed: dict[str, str] = {}

    def close(self) -> None:
        """Free all objects. accelerate has one precision per process until its state is reset."""
        self.setting = self.teacher = self.baseline = self.accelerator = None
        self.peers: dict[str, Any] = {}
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=True)
        torch._dynamo.reset()
        if self.options.device == "cuda":
            torch.cuda.empty_cache()

    def open(self, setting: Setting) -> None:
        """Open teacher, flow matching and peers of a setting."""
        if self.setting == setting:
            return
        self.close()
        half = "no" if setting.precision == "fp32" else setting.precision
        self.accelerator = Accelerator(cpu=self.options.device == "cpu", mixed_precision=half)
        self.teacher = make_teacher(setting.network, "tiny" if self.options.tiny else "large")
        self.batch = 2 if self.options.tiny else BATCH[setting.network]
        self.training = {"compile": "inductor"} if setting.compiled else {}
        self.baseline = self._trainer(BASELINE, "none")
        self.peers, self.peers_failed = {}, {"all": "no --fastgen"}
        if self.options.fastgen is not None and not setting.compiled:
            self.peers, self.peers_failed = about_peers(
                self.options.fastgen, self.teacher, self.batch, self.accelerator
            )
        self.setting = setting

    def _trainer(self, case: Case, engine: str) -> Any:
        return make_trainer(
            case, engine, self.teacher, self.batch, self.accelerator, self.folder, training=self.training
        )

    def row(self, setting: Setting, case: Case, engine: str, deadline: Deadline) -> dict[str, Any]:
        """Measure one loss in one setting."""
        self.open(setting)
        assert self.teacher is not None
        # FastGen's targets are detached: only those losses do the same work.
        same = case.loss.get("stop_gradient") == "target" and case.matching is None
        peers = self.peers if same else {}
        kernels = contextlib.nullcontext() if setting.fused else sdpa_kernel(SDPBackend.MATH)
        trainer = None
        try:
            with kernels:
                trainer = self._trainer(case, engine)
                repeats = 2 if self.options.tiny else REPEATS
                found = compare(case, trainer, self.baseline, peers, repeats, self.batch)
        finally:
            # The accelerator has references to all modules that it has prepared.
            del trainer
            self.accelerator.free_memory()
        return found | {
            "batch": self.batch,
            "peers_failed": self.peers_failed if case.loss.get("stop_gradient") else {},
        }


def rows(bench: Bench, settings: list[Setting], some: list[Case], kind: str, guess: float) -> Iterator[Row]:
    """Return the rows of these cases in each setting, by every engine that it supports."""
    for setting in settings:
        for case in some:
            for engine in case.engines():
                # Forward mode does not support compiled networks, and has its own attention.
                if engine == "exact" and (setting.compiled or not setting.fused):
                    continue
                name = f"{setting}: {case.name}, {engine}"
                about = {"setting": str(setting), "loss": case.name, "derivative": engine}
                measure = partial(bench.row, setting, case, engine)
                yield Row(name, measure, f"{kind} {setting.precision}", guess, about)


def plans(bench: Bench, tiny: bool) -> list[list[Row]]:
    """Return the rows of each part of the stage."""
    first, further = cases()
    derivative = [case for case in first if case.engines() != ["none"]]
    unfused = [Setting("dit", precision, fused=False) for precision in ("bf16", "fp32")]
    compiled = [Setting(s.network, s.precision, compiled=True) for s in EAGER]
    compilable = first[:2] if tiny else first
    others = [case for case in first if case not in derivative]
    return [
        # The goals are about losses with a derivative: these come first in all settings.
        [row for some in (derivative, others) for row in rows(bench, EAGER, some, "eager", 1 if tiny else 12)],
        list(rows(bench, unfused, derivative[:2], "attention", 1 if tiny else 12)),
        list(rows(bench, compiled, compilable, "compiled", 5 if tiny else 45)),
        list(rows(bench, EAGER, further, "eager", 1 if tiny else 12)),
    ]


def run(job: Job) -> None:
    """Measure all parts, then rows that were skipped because a part's time was over."""
    if job.options.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(job, Path(folder))
        planned = plans(bench, job.options.tiny)
        job.record.set(about=job.record.found["about"] | {"batch": BATCH, "repeats": REPEATS})
        for (_, deadline), part in zip(job.parts(), planned, strict=True):
            take(part, deadline, job.record, bench.close)
        take([row for part in planned for row in part], job.deadline.within(job.deadline.remaining() - 3), job.record)
        bench.close()
