"""Measure the cost of a training step outside the network, of checkpoints, and of a second process.

    python -m benchmarks.training --output training.json

All measurements alternate on one thread in one process, so that a change of the machine's speed affects all of them.
Numbers are medians with the interquartile range of the repeats. ``--repeats`` and ``--batch`` change the size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from fmm_distill.config.recipe import Recipe
from fmm_distill.config.settings import DataSettings
from fmm_distill.core.draws import draw
from fmm_distill.data.samples import load_images
from fmm_distill.data.starting_points import StartingPoints
from fmm_distill.losses.time_sampling import sample_times
from fmm_distill.run.plan import plan
from fmm_distill.training.checkpoint import complete
from fmm_distill.training.signals import StopRequest
from fmm_distill.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fmm_distill.core.draws import Draws
    from fmm_distill.data.samples import Images

LOSS = {"name": "lagrangian", "stop_gradient": "target", "derivative": "central"}
# Timed steps of one and of two processes, after one warm-up step.
SPLIT_STEPS = 3
SPLIT_ROUNDS = 3


def save_teacher(folder: Path) -> Path:
    """Save a ``UNet2DModel`` with 10.8 million random weights on 32x32 pixels."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(64, 128, 192, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder


def recipe_of(folder: Path, batch: int) -> Recipe:
    training = {"steps": 1000, "batch_size": batch, "checkpoint_every": 1000}
    return Recipe.model_validate({"teacher": str(folder), "loss": LOSS, "training": training})


def trainer_of(recipe: Recipe, folder: Path) -> Trainer:
    job = plan(recipe)
    folder.mkdir(parents=True)
    return Trainer(job.student, job.teacher, recipe, None, folder, Accelerator(cpu=True))


class Bare:
    """The network calls that a step needs, on existing tensors."""

    def __init__(self, trainer: Trainer) -> None:
        self.student, self.teacher, self.trainer = trainer.student, trainer.teacher, trainer

    def set(self, draws: Draws, step: int) -> None:
        """Prepare the tensors of a step: noise, times in the units of the network, and starting points."""
        axis = self.teacher.schedule
        self.t, self.r = sample_times(self.trainer.recipe.time_sampling, axis, draws, step)
        self.moving = self.t < axis.t_max
        self.x = StartingPoints(self.teacher, self.student)(draws, self.t)
        self.time, self.end = (axis.network_time(times).float() for times in (self.t, self.r))
        self.length = (self.student.clock.warp(self.t) - self.student.clock.warp(self.r)).float()
        self.noise = draws.noise

    @torch.no_grad()
    def starts(self) -> None:
        """Run the student's jumps to the starting points."""
        at = self.moving
        if at.any():
            self.student.network(self.noise[at], self.time[at], h=self.length[at])

    @torch.no_grad()
    def derivative(self) -> None:
        """Run one more call of the student; the call of the regression is the other side of the difference."""
        self.student.network(self.x, self.time, h=self.length - 2e-3)

    @torch.no_grad()
    def velocity(self) -> None:
        """Run one call of the teacher."""
        self.teacher.network(self.x, self.end)

    def regression(self) -> None:
        """Run one call of the student forward and backward."""
        self.student.network(self.x, self.time, h=self.length).sample.square().mean().backward()
        self.trainer.optimizer.zero_grad()


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measured(values: list[float]) -> dict[str, float]:
    """Return median and interquartile range."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def images_of(folder: Path, shape: tuple[int, ...]) -> tuple[Images, Images]:
    """Return 256 PNGs of noise, which decode as slowly as any, in memory and on the disk."""
    if not folder.is_dir():
        folder.mkdir()
        generator = torch.Generator().manual_seed(0)
        for i in range(256):
            pixels = torch.randint(0, 256, (*shape[1:], shape[0]), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    settings = DataSettings(source=str(folder))
    return load_images(settings, shape), load_images(settings, shape, in_memory=0)


def parts_of(trainer: Trainer, folder: Path) -> dict[str, Callable[[int], object]]:
    """Return the parts of a step outside the networks; gradients are from an earlier step."""
    training, teacher = trainer.recipe.training, trainer.teacher
    log = folder / "parts.jsonl"
    record = dict.fromkeys(("step", "loss", "weighted", "gradient_norm", "rate", "speed", "memory"), 0.123456789)

    def line(_: int) -> None:
        with log.open("ab", buffering=0) as file:
            file.write(json.dumps(record).encode() + b"\n")

    def times(step: int) -> None:
        draws = draw(training.seed, step, training.batch_size, (1,))
        t, r = sample_times(trainer.recipe.time_sampling, teacher.schedule, draws, step)
        for now in (t, r):
            teacher.schedule.alpha_sigma(now)
            teacher.schedule.network_time(now)

    def average(_: int) -> None:
        for average in trainer.averages.values():
            average.update_parameters(trainer.student)

    parameters = list(trainer.objective.parameters())
    in_memory, decoded = images_of(folder / "images", teacher.event_shape)

    def pick(images: Images, step: int) -> None:
        images.pick(draw(training.seed, step, training.batch_size, (1,)))

    return {
        "images in memory": lambda step: pick(in_memory, step),
        "images decoded when they are used": lambda step: pick(decoded, step),
        "draws": lambda step: draw(training.seed, step, training.batch_size, teacher.event_shape),
        "times and noise levels": times,
        "clip": lambda _: torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm),
        "optimizer": lambda _: trainer.optimizer.step(),
        "averages": average,
        "log": line,
    }


def fractions(trainer: Trainer, folder: Path, repeats: int) -> dict[str, Any]:
    """Return the seconds of complete steps, of the networks alone and of other parts, and the fraction outside."""
    bare, others, training = Bare(trainer), parts_of(trainer, folder), trainer.recipe.training
    calls = {name: getattr(bare, name) for name in ("starts", "derivative", "velocity", "regression")}
    seconds: dict[str, list[float]] = {name: [] for name in ("step", *calls, *others)}
    trainer.train_step(0, StopRequest())
    for step in range(1, repeats + 1):
        # Every second repeat in reverse order, so that a drift of the machine's speed cancels.
        now = {"step": timed(lambda step=step: trainer.train_step(step, StopRequest()))} if step % 2 else {}
        bare.set(draw(training.seed, step, training.batch_size, trainer.teacher.event_shape), step)
        now |= {name: timed(call) for name, call in calls.items()}
        for parameter in trainer.student.parameters():
            parameter.grad = torch.full_like(parameter, 1e-8)
        now |= {name: timed(lambda call=call, step=step: call(step)) for name, call in others.items()}
        trainer.optimizer.zero_grad()
        if not step % 2:
            now["step"] = timed(lambda step=step: trainer.train_step(step, StopRequest()))
        for name, value in now.items():
            seconds[name].append(value)
    network = [sum(values) for values in zip(*(seconds[name] for name in calls), strict=True)]
    outside = [1 - alone / complete for alone, complete in zip(network, seconds["step"], strict=True)]
    fixed = {
        name: measured([part / step for part, step in zip(seconds[name], seconds["step"], strict=True)])
        for name in others
    }
    return {
        "seconds": {name: measured(values) for name, values in seconds.items()},
        "fraction_outside_network": measured(outside),
        "fractions_of_a_step": fixed,
    }


def checkpoints(trainer: Trainer, step_seconds: float) -> dict[str, Any]:
    """Measure writing and reading a checkpoint in steps, and its size in the student's weights."""
    saves, resumes = [], []
    for step in range(1, 6):
        saves.append(timed(lambda step=step: trainer.save_checkpoint(step)) / step_seconds)
        resumes.append(timed(trainer.resume) / step_seconds)
    newest = complete(trainer.folder / "checkpoints")[-1]
    size = sum(path.stat().st_size for path in newest.iterdir())
    weights = sum(p.numel() * p.element_size() for p in trainer.student.parameters())
    return {
        "save_steps": measured(saves),
        "resume_steps": measured(resumes),
        "bytes": size,
        "bytes_by_weights": size / weights,
    }


def start(recipe_file: Path, processes: int) -> subprocess.Popen[str]:
    """Start a run on so many processes, one thread each, that prints its images per second."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "benchmarks.training", "--worker", str(recipe_file)]
    changes = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=os.environ | changes, stdout=pipe, stderr=pipe, text=True)


def images_per_second_of(*runs: subprocess.Popen[str]) -> float:
    """Return the total images per second of runs at the same time."""
    total = 0.0
    for process in runs:
        out, err = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a process of the benchmark failed:\n{err}")
        total += float(out.split()[-1])
    return total


def work(recipe_file: Path) -> None:
    """Run one process of ``start``."""
    torch.set_num_threads(1)
    recipe = Recipe.model_validate_json(recipe_file.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(recipe, Path(folder) / "run")
        trainer.train_step(0, StopRequest())
        trainer.accelerator.wait_for_everyone()
        steps = range(1, 1 + SPLIT_STEPS)
        seconds = timed(lambda: [trainer.train_step(step, StopRequest()) for step in steps])
        if trainer.accelerator.is_main_process:
            print(SPLIT_STEPS * recipe.training.batch_size / seconds)
        trainer.accelerator.end_training()


def processes(recipe_file: Path) -> dict[str, Any]:
    """Measure images per second of one process, of two in one run, and of two runs at the same time, alternately.

    The last is the speed of two processes that don't wait for one another.
    """
    rounds = [
        {
            "one": images_per_second_of(start(recipe_file, 1)),
            "two": images_per_second_of(start(recipe_file, 2)),
            "two_runs": images_per_second_of(start(recipe_file, 1), start(recipe_file, 1)),
        }
        for _ in range(SPLIT_ROUNDS)
    ]
    found: dict[str, Any] = {name: measured([now[name] for now in rounds]) for name in rounds[0]}
    for name, other in (("two", "one"), ("two", "two_runs")):
        found[f"{name}_by_{other}"] = measured([now[name] / now[other] for now in rounds])
    return found | {"cores": os.cpu_count()}


def run(repeats: int, batch: int) -> Mapping[str, Any]:
    """Run all measurements."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = recipe_of(save_teacher(folder / "teacher"), batch)
        trainer = trainer_of(recipe, folder / "run")
        costs = fractions(trainer, folder, repeats)
        checkpoint = checkpoints(trainer, costs["seconds"]["step"]["median"])
        file = folder / "recipe.json"
        file.write_text(recipe.model_dump_json(), encoding="utf-8")
        together = processes(file)
        parameters = sum(p.numel() for p in trainer.teacher.network.parameters())
    about = {"parameters": parameters, "batch": batch, "repeats": repeats, "loss": LOSS, "torch": torch.__version__}
    about |= {"machine": platform.machine(), "threads": 1}
    return {"about": about, "step": costs, "checkpoint": checkpoint, "processes": together}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("training.json"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        work(given.worker)
        return
    text = json.dumps(run(given.repeats, given.batch), indent=2) + "\n"
    given.output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
