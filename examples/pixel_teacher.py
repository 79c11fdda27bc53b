"""Distill a teacher made in Python: a class-conditional DiT in pixels, trained here on 8x8 digits.

    python examples/pixel_teacher.py --output runs/pixels

No stock pipeline of diffusers runs a DiT without an autoencoder, so the student is saved as weights. Five minutes on a
CPU; the teacher is a plain diffusers network and could as well come from ``DiTTransformer2DModel.from_pretrained``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

import fmm_distill
from fmm_distill import Recipe, Teacher, distill, load_student
from fmm_distill.core.parametrization import Parametrization
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.scheduler import read_scheduler

BUILTIN = Path(fmm_distill.__file__).parent / "teachers" / "builtin" / "digits"


def new_dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        patch_size=2,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=16,
        norm_num_groups=1,
        num_embeds_ada_norm=10,
    )


def train_teacher(network: DiTTransformer2DModel, scheduler: DDPMScheduler, steps: int) -> None:
    """Train the network on the built-in digits by the usual loss of its prediction."""
    data = load_file(BUILTIN / "images.safetensors")
    images, labels = data["images"].float() / 8 - 1, data["labels"].long()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(len(images), (128,))
        noise, timestep = torch.randn_like(images[batch]), torch.randint(1000, (128,))
        noisy = scheduler.add_noise(images[batch], noise, timestep)
        predicted = network(noisy, timestep, class_labels=labels[batch]).sample
        loss = F.mse_loss(predicted, scheduler.get_velocity(images[batch], noise, timestep))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_teacher(network: DiTTransformer2DModel, scheduler: DDPMScheduler) -> Teacher:
    """Return the network as a velocity field on the time axis."""
    spec = read_scheduler(scheduler, "digits DiT")
    return Teacher(
        network=network.eval(),
        parametrization=Parametrization(spec.schedule, spec.prediction),
        event_shape=(1, 8, 8),
        source="digits DiT",
        adapter="DiTTransformer2DModel, pixels, class-conditional",
        scheduler_config=spec.config,
        conditions=Classes(tuple("0123456789"), null_label=10),
    )


def main(arguments: Sequence[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/pixels"))
    parser.add_argument("--teacher-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args(arguments)
    network, scheduler = new_dit(), DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    train_teacher(network, scheduler, options.teacher_steps)
    teacher = make_teacher(network, scheduler)
    recipe = Recipe.model_validate(
        {
            "training": {"steps": options.steps, "batch_size": 64, "ema": [0.99]},
            "evaluation": {"steps": [1, 2, 4], "ddim_steps": [4], "dpmsolver_steps": [], "endpoint_samples": 32},
        }
    )
    distill(recipe, options.output, teacher=teacher)

    student = load_student(options.output / "student", teacher=teacher)
    images = student.generate(torch.randn(10, 1, 8, 8), steps=2, conditions=range(10))
    print(f"ten digits in 2 steps: {tuple(images.shape)}, from {images.min():.2f} to {images.max():.2f}")
    return images


if __name__ == "__main__":
    main()
