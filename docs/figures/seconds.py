"""Measure the seconds of the README's table: CPU time per image of each sampler, in the network of that table.

    python docs/figures/seconds.py --output docs/results/cifar10-seconds.json

The weights are random, which does not change the time. One thread; the samplers take turns, and the median over the
repeats is written. CPU time, not wall-clock time: other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

from fmm_distill import Student, load_teacher, sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CHANNELS = (32, 64, 128, 256)
BATCH, REPEATS = 4, 5


def pipeline() -> DDPMPipeline:
    """Return a pipeline with the network of the table (10.7 million parameters) and random weights."""
    network = UNet2DModel(
        sample_size=32,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
        norm_num_groups=16,
        attention_head_dim=32,
    )
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    return DDPMPipeline(unet=network.eval(), scheduler=scheduler)


def stock(teacher: DDPMPipeline, scheduler: DDIMScheduler | DPMSolverMultistepScheduler, steps: int) -> Callable:
    """Return a function that denoises a batch with the teacher's network and a stock scheduler."""

    def run(x: Tensor) -> Tensor:
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            x = scheduler.step(teacher.unet(x, timestep).sample, timestep, x).prev_sample
        return x

    return run


def samplers() -> dict[str, Callable]:
    """Return the rows of the table as functions of a batch of noise, by name."""
    teacher = pipeline()
    with tempfile.TemporaryDirectory() as folder:
        teacher.save_pretrained(folder)
        student = Student.from_teacher(load_teacher(folder)).eval()
    ddim = DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="trailing")
    solver = DPMSolverMultistepScheduler.from_config(teacher.scheduler.config, timestep_spacing="trailing")
    found: dict[str, Callable] = {"ddim-50": stock(teacher, ddim, 50), "dpmsolver++-8": stock(teacher, solver, 8)}
    return found | {f"student-{steps}": lambda x, steps=steps: sample(student, x, steps) for steps in (1, 2, 4)}


@torch.no_grad()
def measure() -> dict[str, float]:
    """Return the median CPU seconds per image of each sampler."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = samplers()
    noise = torch.randn(BATCH, 3, 32, 32)
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(REPEATS + 1):
        for name, run in rows.items():
            started = time.process_time()
            run(noise)
            # The first round fills caches and is not counted.
            if repeat:
                taken[name].append((time.process_time() - started) / BATCH)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": 1}
    protocol = {"batch": BATCH, "repeats": REPEATS, "unit": "CPU seconds per image, median", **machine}
    output.write_text(json.dumps({"protocol": protocol, "seconds": measure()}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
