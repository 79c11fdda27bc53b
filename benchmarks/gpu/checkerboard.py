"""Stage ``checkerboard``: one Lagrangian student of the exact checkerboard, with as many samples as fit.

The protocol of arXiv 2505.18825: four hidden layers of 512 GELU units, batches of 100,000, 50 bins. Teacher: the closed
form. The speed of the first steps determines the number of steps, so that the learning rate is zero at the end of the
time.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from benchmarks.gpu.budget import OutOfTimeError, alarm
from experiments.checkerboard.experiment import METHODS, NOISE_SEED, STEPS, recipe_for
from experiments.plane import Board, Perceptron, closed_form, divergence, endpoint_error, sample, solved
from fmm_distill.training.signals import StopRequest
from fmm_distill.training.trainer import Trainer

if TYPE_CHECKING:
    from benchmarks.gpu.stage import Job
    from fmm_distill.config.recipe import Recipe

BATCH = 100_000
POINTS = 64_000
# Long averages include weights of a higher learning rate, short ones are noisy. All are reported, the best first.
RATES = (0.99, 0.999)
MEASURED = 10


class OnDevice(Board):
    """The dataset, with points on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the points of the board on the device."""
        return super().at(positions.to(self.device))


def recipe_of(batch: int, steps: int) -> Recipe:
    """Return the experiment's recipe with the published batch size."""
    recipe = recipe_for(METHODS["lagrangian"], steps, 0, 1)
    changes = {"batch_size": batch, "steps": steps, "ema": RATES, "warmup_steps": min(200, steps // 10)}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})


class Run:
    """Teacher, student and metrics on one device."""

    def __init__(self, job: Job) -> None:
        self.job, tiny = job, job.options.tiny
        self.accelerator = Accelerator(cpu=job.options.device == "cpu")
        self.device = self.accelerator.device
        self.batch, points = (500, 500) if tiny else (BATCH, POINTS)
        self.width = 16 if tiny else 512
        noise = torch.randn(points, 2, generator=torch.Generator().manual_seed(NOISE_SEED))
        self.noise = noise.to(self.device)
        self.ends = solved(closed_form(), self.noise, 10 if tiny else 200)

    def trainer(self, steps: int) -> Trainer:
        """Return a trainer of random weights, which writes no checkpoint."""
        student = Perceptron(0, width=self.width)
        folder = self.job.options.work / "checkerboard"
        folder.mkdir(parents=True, exist_ok=True)
        data = OnDevice(self.device)
        return Trainer(student, closed_form(), recipe_of(self.batch, steps), data, folder, self.accelerator)

    def seconds_per_step(self, seconds: float) -> float:
        """Return the seconds per step, measured on a student that is then discarded."""
        trainer, request = self.trainer(10**6), StopRequest()
        for step in range(3):
            trainer.train_step(step, request)
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            trainer.train_step(steps, request)
            steps += 1
        self.accelerator.free_memory()
        return (time.perf_counter() - started) / steps

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        """Return KL and endpoint error at every number of steps of each average, those of the best average first."""
        found = {}
        for rate in RATES:
            student = trainer.averaged_student(rate)
            points = {str(n): sample(student, self.noise, n).cpu() for n in STEPS}
            found[f"{rate:g}"] = {
                "kl_50": {n: divergence(x, 50) for n, x in points.items()},
                "kl_48": {n: divergence(x, 48) for n, x in points.items()},
                "endpoint": {n: endpoint_error(x, self.ends.cpu()) for n, x in points.items()},
            }
        best = min(found, key=lambda rate: sum(found[rate]["kl_50"].values()))
        return found[best] | {"average": best, "averages": found}


def run(job: Job) -> None:
    """Measure the speed, then train, with measurements during training."""
    ((_, deadline),) = list(job.parts())
    record, tiny = job.record, job.options.tiny
    if job.options.device == "cpu":
        torch.set_num_threads(1)
    # All points of a curve are of one run.
    record.restart()
    bench = Run(job)
    exact = {f"kl_{bins}": divergence(bench.ends.cpu(), bins) for bins in (50, 48)}
    pace = bench.seconds_per_step(1 if tiny else 10)
    # A measurement takes about as long as 62 calls of the network on all points and both averages.
    reserve = 3 if tiny else 5 + MEASURED * 2
    steps = max(int((deadline.remaining() - reserve) / pace), 2)
    if tiny:
        steps = min(steps, 20)
    record.set(checkerboard={"exact": exact, "seconds_a_step": pace, "steps": steps, "batch": bench.batch})
    print(f"{1000 * pace:.1f} ms per step of {bench.batch}: {steps} steps, {steps * bench.batch / 1e6:.1f}M samples")
    try:
        with alarm(job.deadline.remaining() - 2):
            train(bench, steps)
    except OutOfTimeError:
        record.add("end of the run", "cut", what="end", reason="no time: steps were slower than measured before")


def train(bench: Run, steps: int) -> None:
    """Train all steps, with a row of the curve after each tenth of them."""
    trainer, request, spent = bench.trainer(steps), StopRequest(), 0.0
    marks = {math.ceil(steps * part / MEASURED) for part in range(1, MEASURED + 1)}
    started = time.perf_counter()
    for step in range(steps):
        trainer.train_step(step, request)
        if step + 1 in marks:
            trained = time.perf_counter() - started - spent
            found = bench.measure(trainer)
            spent = time.perf_counter() - started - trained
            samples = (step + 1) * bench.batch
            about = {"what": "curve", "samples": samples, "trained_seconds": trained, "steps": step + 1}
            bench.job.record.add(f"{samples:,} samples", "measured", **about | found)
            shown = ", ".join(f"{value:.3f}" for value in found["kl_50"].values())
            print(f"{samples / 1e6:.1f}M samples in {trained:.0f} s: KL {shown}", flush=True)
