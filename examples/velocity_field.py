"""Distill a velocity field that is no diffusion model: eight Gaussians on a ring, in closed form.

    python examples/velocity_field.py --output runs/ring

The teacher is any object with ``velocity`` and ``event_shape``; the student is a flow map
of your own. A minute on a CPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fmm_distill import LearnedFlowMap, Recipe, distill, load_student


class Ring:
    """Eight Gaussians on the unit circle as a velocity field."""

    event_shape = (2,)
    std = 0.1

    def __init__(self) -> None:
        angles = torch.arange(8) * math.pi / 4
        self.centers = torch.stack([angles.cos(), angles.sin()], 1)

    def velocity(self, x: Tensor, t: Tensor, cond: None = None) -> Tensor:
        """Return ``(x - E[x_0 | x_t = x]) / t`` at points of shape [batch, 2] and times of shape [batch]."""
        t = t.to(x)[:, None]
        variance = (1 - t).square() * self.std**2 + t.square()
        offsets = x[:, None] - (1 - t)[:, None] * self.centers.to(x)
        weights = (-offsets.square().sum(-1) / (2 * variance)).softmax(1)
        means = self.centers.to(x) + ((1 - t) * self.std**2 / variance)[:, None] * offsets
        return (x - (weights[..., None] * means).sum(1)) / t


class RingMap(LearnedFlowMap):
    """``u(x, t, h)``, the mean velocity of a jump of length h from t, by three hidden layers."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = [(6, width), (width, width), (width, width)]
        layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.GELU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def mean_velocity_of_jump(self, x: Tensor, t: Tensor, h: Tensor, cond: None = None) -> Tensor:
        """Return u, shape [batch, 2]."""
        times = torch.stack([t, h, (math.pi * t).cos(), (math.pi * h).cos()], 1)
        return self.layers(torch.cat([x, times.to(x)], 1))


def main(arguments: Sequence[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/ring"))
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args(arguments)
    recipe = Recipe.model_validate(
        {
            "training": {"steps": options.steps, "batch_size": 256, "ema": [0.99]},
            "optimizer": {"lr": 2e-3},
            "evaluation": {"steps": [1, 2, 4], "endpoint_samples": 64, "endpoint_solver_steps": 32},
        }
    )
    torch.manual_seed(0)
    distill(recipe, options.output, teacher=Ring(), student=RingMap())

    # There is no pipeline for points on the plane: the export has the weights alone.
    student = load_student(options.output / "student", teacher=Ring(), network=RingMap())
    points = student.generate(torch.randn(1000, 2), steps=2)
    print(f"mean radius of 1000 points after 2 jumps: {points.norm(dim=1).mean():.3f} (the ring's: 1.005)")
    return points


if __name__ == "__main__":
    main()
