"""Measure how much the teacher's samples depend on the image, and how much of the image around the hole they have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fmm_distill.core.solvers import endpoint
from fmm_distill.teachers.load import load_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fmm_distill.teachers.prompts import Prompts

__all__ = ["use_of_images"]

COUNT = 64


@torch.no_grad()
def use_of_images(folder: Path, conditions: Prompts, solver_steps: int) -> dict[str, float]:
    """Return root mean squares of the teacher's ODE: its change with the image, and its error around the hole.

    Returns:
        ``other_image``: the distance between endpoints from the same noise, with one image and mask and with the next
        ones; what an endpoint error would be of a student that ignores them. ``around``: the distance of the decoded
        pixels outside of the hole, range -1 to 1, to those of the image.
    """
    conditions = conditions.some(range(min(COUNT, len(conditions))))
    count = len(conditions)
    teacher = load_teacher(str(folder), prompts=conditions)
    noise = torch.randn(count, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    own, other = (
        endpoint(
            teacher.velocity,
            teacher.schedule,
            teacher.prior(noise),
            solver_steps,
            # The middle of each condition's interval in [0, 1).
            teacher.conditioned_on(((torch.arange(count, dtype=torch.float64) + shift) % count + 0.5) / count),
        )
        for shift in (0, 1)
    )
    images = torch.stack([_pixels(image.convert("RGB")) for image in conditions.images["image"]]) / 127.5 - 1
    visible = torch.stack([_pixels(mask.convert("RGB")) for mask in conditions.images["mask_image"]]) < 128
    around = (teacher.codec.decode(own) - images)[visible]
    return {"other_image": _rms(own - other), "around": _rms(around), "samples": count}


def _pixels(image: object) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float()


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
