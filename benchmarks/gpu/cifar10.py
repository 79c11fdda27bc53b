"""Stage ``cifar10``: the CIFAR-10 experiment within the minutes, with students of FastGen's losses."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpu.budget import OutOfTimeError, alarm
from benchmarks.gpu.cifar10_peer import PEERS
from benchmarks.gpu.stored import pack, unpack
from experiments.cifar10 import experiment
from experiments.cifar10.budget import BUDGETS
from experiments.cifar10.methods import METHODS

if TYPE_CHECKING:
    from benchmarks.gpu.stage import Job

# Stored for the next call, so that all calls have one teacher and one classifier.
STORED = ("teacher", "classifier/classifier.pt", "classifier/classifier.json")
PICTURES = ("steps", "minutes", "samples")


class Experiment(experiment.Experiment):
    """The experiment with FastGen's students, whose teacher is stored for later calls."""

    def __init__(self, job: Job, minutes: float) -> None:
        options, work = job.options, job.options.work / "cifar10"
        work.mkdir(parents=True, exist_ok=True)
        if options.stored is not None and not (work / "teacher").is_dir():
            print(
                f"teacher of an earlier call: {'found' if unpack(options.stored, work) else 'incomplete'}",
                flush=True,
            )
        budget = BUDGETS["toy" if options.tiny else "gpu"]
        # A step of FastGen in torch's own forward mode takes about as long as two of this package.
        peers = [] if options.fastgen is None else list(PEERS)
        budget = replace(budget, peers=2 * len(peers), seeded=0)
        names = list(options.only) or list(METHODS)[: 2 if options.tiny else None]
        if unknown := set(names) - METHODS.keys():
            sys.exit(f"--only: expected names of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
        super().__init__(options.data, work, work / "gpu-cifar10.json", budget, minutes, names)
        self.job, self.peers = job, peers

    def _teacher_and_classifier(self) -> None:
        super()._teacher_and_classifier()
        if (self.work / "teacher" / "model_index.json").is_file():
            halve(self.work / "teacher")
            if all((self.work / name).exists() for name in STORED):
                files = pack(self.work, STORED, self.job.options.output)
                print(f"stored for later calls: {', '.join(file.name for file in files)}", flush=True)

    def _students(self, names: list[str], steps: int, seed: int) -> None:
        for name in self.peers:
            if seed == 0 and not (self.work / "rows" / f"{row_name(name)}.json").is_file():
                self._start_peer(name, steps)
        # The experiment waits only for its own processes.
        others = {title: self.processes.running.pop(title) for title in list(self.processes.running)}
        try:
            super()._students(names, steps, seed)
        finally:
            self.processes.running |= others

    def _start_peer(self, name: str, steps: int) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.cifar10_peer", name, "--work", str(self.work)]
        command += ["--fastgen", str(self.job.options.fastgen), "--steps", str(steps)]
        self.processes.start(row_name(name), [*command, "--budget", "toy" if self.job.options.tiny else "gpu"])

    def finish_peers(self, seconds: float) -> None:
        """Wait for running students, and stop them when the time is over."""
        until = time.monotonic() + seconds
        for title in list(self.processes.running):
            self.processes.code(title, max(until - time.monotonic(), 0))
            self.write_json()

    def write_json(self) -> dict[str, Any]:
        """Write the results, with a row per student, also into the JSON of the stage."""
        found = super().write_json()
        rows = dict.fromkeys(found["students"], "measured")
        rows |= {f"{name}-0": "skipped" for name in found["missing"]}
        rows |= {row_name(name): "skipped" for name in PEERS if row_name(name) not in rows}
        record = self.job.record
        record.found["cifar10"] = found
        record.found["rows"] = {
            title: {"status": status} | ({} if status == "measured" else {"reason": self._why(title)})
            for title, status in rows.items()
        }
        record.write()
        return found

    def _why(self, title: str) -> str:
        if title.startswith("fastgen") and not self.peers:
            return "no --fastgen"
        log = self.work / "logs" / f"{title}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        errors = [line for line in lines if "Error" in line]
        return errors[-1][:300] if errors else "no time"


def row_name(peer: str) -> str:
    """Return the title of a peer's student."""
    return f"{peer.replace(' ', '-')}-0"


def halve(teacher: Path) -> None:
    """Round the teacher's weights to half precision before any measurement.

    The stored teacher then takes half of the space, and every call has the same teacher. It is opened in float32.
    """
    file = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    if all(value.dtype == torch.float16 for value in weights.values()):
        return
    partial_file = file.with_suffix(".partial")
    save_file({name: value.half() for name, value in weights.items()}, partial_file, metadata={"format": "pt"})
    partial_file.replace(file)


def run(job: Job) -> None:
    """Run both parts, and write all results at the end of the minutes."""
    (_, students), (_, peers) = list(job.parts())
    benchmark = Experiment(job, students.remaining() / 60)
    try:
        with alarm(job.deadline.remaining() - 4):
            benchmark.run()
            benchmark.finish_peers(min(peers.remaining(), job.deadline.remaining() - 15))
            benchmark.write()
    except OutOfTimeError:
        print("the time is over; all results are written", flush=True)
    finally:
        benchmark.processes.stop()
        benchmark.write_json()
        for name in PICTURES:
            picture = benchmark.output.with_name(f"gpu-cifar10-{name}.png")
            if picture.is_file():
                shutil.copy(picture, job.options.output / picture.name)
