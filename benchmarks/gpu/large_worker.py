"""One process of stage ``large``: its memory is freed at its end, and a crash does not affect other rows.

python -m benchmarks.gpu.large_worker build sd15 FOLDER OUT --device cuda
python -m benchmarks.gpu.large_worker step RECIPE RUN OUT --steps 5
python -m benchmarks.gpu.large_worker estimate RECIPE OUT
python -m benchmarks.gpu.large_worker reload STUDENT OUT --device cuda
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.record import write_atomically
from fmm_distill.config.recipe import load_recipe
from fmm_distill.data.prepare import prepare_samples
from fmm_distill.run.plan import open_teacher, plan
from fmm_distill.training.compile import checkpoint_blocks
from fmm_distill.training.memory import forecast_memory, peak_memory
from fmm_distill.training.process import make_accelerator
from fmm_distill.training.signals import StopRequest
from fmm_distill.training.trainer import Trainer

if TYPE_CHECKING:
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.run.plan import Plan

# Pixels per latent of every model, in each direction.
SHRINK = 8


def build(given: argparse.Namespace) -> None:
    """Save a pipeline."""
    from benchmarks.gpu.large_models import build as build_pipeline

    started = time.monotonic()
    counts = build_pipeline(given.name, given.folder, given.device, tiny=given.tiny)
    write_atomically(given.out, json.dumps({"parts": counts, "seconds": time.monotonic() - started}))


def planned(recipe: Recipe, side: int | None) -> Plan:
    """Return the plan of a recipe, opened at small images and set to samples of another size.

    Opening a pipeline runs it, some sixty samples of the network on the CPU: at 512 pixels this takes a minute or more
    in each process. Weights and conditions are the same at every size.
    """
    job = plan(recipe)
    if side is not None:
        latent = side // SHRINK
        job.teacher.event_shape = (job.teacher.event_shape[0], latent, latent)
    return job


def open_at(given: argparse.Namespace) -> None:
    """Measure the time to open the pipeline at the size of its images."""
    recipe = load_recipe(str(given.recipe))
    if given.side is not None:
        recipe = recipe.model_copy(update={"pipeline": {"height": given.side, "width": given.side}})
    started = time.monotonic()
    teacher = open_teacher(recipe)
    seconds = time.monotonic() - started
    shape = " x ".join(map(str, teacher.event_shape))
    write_atomically(given.out, json.dumps({"says": f"samples of {shape}", "open_seconds": seconds}))


def step(given: argparse.Namespace) -> None:
    """Measure training steps without checkpoints, evaluation and export; write the result after each."""
    recipe = load_recipe(str(given.recipe))
    started = time.monotonic()
    accelerator = make_accelerator(recipe, given.run)
    job = planned(recipe, given.side)
    given.run.mkdir(parents=True, exist_ok=True)
    samples = prepare_samples(recipe, job.teacher, job.images, given.run, accelerator)
    trainer = Trainer(job.student, job.teacher, recipe, samples, given.run, accelerator)
    found: dict[str, Any] = {"load_seconds": time.monotonic() - started, "seconds_of_steps": []}
    found["parameters"] = sum(p.numel() for p in job.student.parameters())
    found["trained"] = sum(p.numel() for p in job.student.parameters() if p.requires_grad)
    for number in range(given.steps):
        began = time.perf_counter()
        # A step waits for the device, to log its numbers.
        trainer.train_step(number, StopRequest())
        found["seconds_of_steps"].append(time.perf_counter() - began)
        found["bytes"] = peak_memory(accelerator.device)
        write_atomically(given.out, json.dumps(found))


def estimate(given: argparse.Namespace) -> None:
    """Compute the memory estimate of ``fmm-distill --dry-run``, in bytes."""
    recipe = load_recipe(str(given.recipe))
    started = time.monotonic()
    job = planned(recipe, given.side)
    if recipe.training.gradient_checkpointing:
        checkpoint_blocks(job.student)
    memory = forecast_memory(job.student, job.teacher, recipe)
    found = {"bytes": memory.peak, "parts": asdict(memory), "seconds": time.monotonic() - started}
    write_atomically(given.out, json.dumps(found))


def reload(given: argparse.Namespace) -> None:
    """Open an exported student with diffusers and sample in one step."""
    from diffusers import DiffusionPipeline

    started = time.monotonic()
    pipeline = DiffusionPipeline.from_pretrained(given.student, trust_remote_code=True).to(given.device)
    opened = time.monotonic() - started
    image = pipeline("a boat", num_inference_steps=1, output_type="pt").images
    finite = bool(torch.isfinite(image).all())
    found = {"says": f"{type(pipeline).__name__}, image {list(image.shape)}, finite: {finite}", "open_seconds": opened}
    write_atomically(given.out, json.dumps(found))


def main() -> None:
    logging.basicConfig(level="INFO", format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    acts = parser.add_subparsers(required=True)
    places = {build: "folder out", step: "recipe run out", estimate: "recipe out", open_at: "recipe out"}
    for act, words in (places | {reload: "student out"}).items():
        made = acts.add_parser(act.__name__.removesuffix("_at"))
        made.set_defaults(act=act)
        if act is build:
            made.add_argument("name")
        for place in words.split():
            made.add_argument(place, type=Path)
        made.add_argument("--device", default="cuda")
        made.add_argument("--tiny", action="store_true")
        made.add_argument("--steps", type=int, default=5)
        made.add_argument("--side", type=int, help="of the images [the recipe's]")
    given = parser.parse_args()
    given.act(given)


if __name__ == "__main__":
    main()
