"""Train and measure a student of the CIFAR-10 experiment by one of FastGen's losses.

Teacher, images, batch, steps, learning rate, clipping, optimizer and average are those of this package's students.
Multi-step sampling of consistency models (sCM, ECT) adds noise between calls, as published; that of mean flow jumps.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from benchmarks.step_peers import ECT, PeerStep
from experiments.cifar10.budget import BUDGETS
from experiments.cifar10.measure import open_judge, save_atomically
from fmm_distill.io.files import append_line, write_text
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training.ema import averaged
from fmm_distill.training.optimizer import learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from experiments.cifar10.budget import Budget
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.core.draws import Draws

__all__ = ["PEERS"]

PEERS = ("fastgen mean_flow", "fastgen sCM", ECT)


def picker(pixels: Tensor, device: torch.device) -> Callable[[Draws], Tensor]:
    """Return a function from draws to images in [-1, 1], half of them mirrored."""
    pixels = pixels.to(device)

    def pick(draws: Draws) -> Tensor:
        rows = (draws.image * len(pixels)).long().to(device)
        mirrored = (draws.flip < 0.5).to(device)[:, None, None, None]
        images = pixels[rows].float() / 127.5 - 1
        return torch.where(mirrored, images.flip(-1), images)

    return pick


def consistency(student: Student, steps: int) -> Callable[[Tensor], Tensor]:
    """Return the sampler of a consistency model: to data, and back to the next time with new noise."""

    def sample(noise: Tensor) -> Tensor:
        generator = torch.Generator(noise.device).manual_seed(0)
        times = student.schedule.grid(steps).to(noise.device)
        x = student.parametrization.prior(noise)
        for t, r in pairwise(times):
            at = t.expand(len(x))
            x = x - t.to(x.dtype) * student.mean_velocity(x, at, at)
            if r > 0:
                new = torch.randn(x.shape, generator=generator, device=x.device)
                x = torch.lerp(x, new.to(x.dtype), r.to(x.dtype))
        return x

    return sample


def train(peer: PeerStep, recipe: Recipe, log: Path) -> list[float]:
    """Train all steps, and return the losses of some."""
    losses, training = [], recipe.training
    for step in range(training.steps):
        for group in peer.optimizer.param_groups:
            group["lr"] = learning_rate(recipe.optimizer.lr, training, step, training.steps)
        loss = peer(step)
        if step % max(training.steps // 100, 1) == 0:
            losses.append(loss.item())
            append_line(log, json.dumps({"step": step, "loss": losses[-1]}))
    return losses


def run(name: str, work: Path, fastgen: Path, budget: Budget, steps: int) -> None:
    """Train and measure the student, and write its row."""
    from experiments.cifar10.methods import recipe_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = "bf16" if budget.student_precision == "bf16" else "no"
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=half)
    teacher = load_teacher(str(work / "teacher")).to(device)
    # The settings of this package's students; the loss is not used.
    recipe = recipe_of("lagrangian", work / "teacher", work, budget, steps, 0)
    student = Student.from_teacher(teacher, seed=recipe.training.seed)
    peer = PeerStep(name, fastgen, student, teacher, budget.batch, accelerator)
    peer.steps, peer.average = steps, averaged(peer.student, recipe.training.ema[0])
    peer.images = picker(load_file(work / "images.safetensors")["train"], accelerator.device)
    title = f"{name.replace(' ', '-')}"
    started = time.monotonic()
    losses = train(peer, recipe, work / "logs" / f"{title}.jsonl")
    seconds = time.monotonic() - started
    student = peer.average.module
    judge = open_judge(teacher, work, budget, device, work)
    if name == "fastgen mean_flow":
        rows, pictures = judge.student(student, budget.calls)
    else:
        student = student.to(device).eval()
        found = {str(n): judge.row(consistency(student, n)) for n in budget.calls}
        rows, pictures = ({n: pair[i] for n, pair in found.items()} for i in (0, 1))
    pixels = {n: ((x + 1) * 127.5).round().clamp(0, 255).byte().contiguous() for n, x in pictures.items()}
    save_atomically(pixels, work / "rows" / f"{title}-0.safetensors")
    result = {"method": title, "steps": steps, "images_seen": steps * budget.batch, "rows": rows, "loss": losses}
    write_text(work / "rows" / f"{title}-0.json", json.dumps(result | {"training_seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--fastgen", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--budget", choices=list(BUDGETS), default="gpu")
    given = parser.parse_args()
    run(given.name, given.work, given.fastgen, BUDGETS[given.budget], given.steps)


if __name__ == "__main__":
    main()
