"""Measure sampling through an exported any-step pipeline relative to the calls of its network alone.

    python -m benchmarks.sampling --output sampling.json

Calls of the pipeline, to latents, and as many calls of its network alternate, in reverse order in every second repeat;
ratios are taken within a repeat. Random weights: a ``UNet2DModel`` of 5M parameters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline

from benchmarks.step_cases import make_teacher
from benchmarks.steps import measured, timed
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def exported(folder: Path, size: str) -> DiffusionPipeline:
    """Return the any-step pipeline of an untrained student."""
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    DDPMPipeline(unet=make_teacher("unet", size).network, scheduler=scheduler).save_pretrained(folder / "teacher")
    teacher = load_teacher(str(folder / "teacher"))
    export_pipeline(Student.from_teacher(teacher), teacher, folder / "student", steps=())
    pipeline = DiffusionPipeline.from_pretrained(folder / "student", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def bare_calls(pipeline: DiffusionPipeline, steps: int, batch: int) -> Callable[[], None]:
    """Return the network calls of the pipeline alone, on existing tensors."""
    side, device = pipeline.unet.config.sample_size, pipeline.device
    x = torch.randn(batch, pipeline.unet.config.in_channels, side, side, device=device)
    time, length = torch.full((batch,), 500.0, device=device), torch.full((batch,), 0.3, device=device)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(steps):
            pipeline.unet(x, time, h=length)

    return bare


def compare(
    pipeline: DiffusionPipeline,
    steps: int,
    batch: int,
    repeats: int,
    others: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Any]:
    """Return the ratios of sampling to the network calls alone.

    Args:
        others: further ways to make the same calls, by name.
    """
    bare, device = bare_calls(pipeline, steps, batch), pipeline.device

    def complete() -> None:
        pipeline(batch_size=batch, num_inference_steps=steps, output_type="latent")

    rounds = []
    for repeat in range(repeats + 1):
        calls = {"bare": bare, "complete": complete, **(others or {})}
        names = list(calls) if repeat % 2 else list(reversed(calls))
        rounds.append({name: timed(calls[name], device) for name in names})
    return {
        "steps": steps,
        "milliseconds": {name: measured([now[name] for now in rounds[1:]]) for name in rounds[0]},
        "ratio": measured([now["complete"] / now["bare"] for now in rounds[1:]]),
    } | {f"{name}_by_bare": measured([now[name] / now["bare"] for now in rounds[1:]]) for name in others or {}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("sampling.json"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=("small", "large", "tiny"), default="small")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = exported(Path(folder), given.size).to(given.device)
        found = [compare(pipeline, steps, given.batch, given.repeats) for steps in (1, 8)]
    text = json.dumps({"batch": given.batch, "repeats": given.repeats, "sampling": found}, indent=2) + "\n"
    given.output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
