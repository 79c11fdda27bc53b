"""Rectangular holes in images, and masked images as the stock pipeline makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["masked", "on_latents", "random_holes"]

# Sides of a hole, as fractions of the image's side: the largest leaves a border.
SMALLEST, LARGEST = 0.375, 0.8


def random_holes(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return masks of shape ``[count, 1, size, size]``: 1 in a rectangle of random sides at a random position."""
    low, high = round(SMALLEST * size), round(LARGEST * size)
    position = torch.arange(size)
    inside = []
    for _ in range(2):
        side = torch.randint(low, high + 1, (count, 1), generator=generator)
        first = (torch.rand(count, 1, generator=generator) * (size - side + 1)).long()
        inside.append((position >= first) & (position < first + side))
    return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).float()


def masked(images: Tensor, masks: Tensor) -> Tensor:
    """Return images in [-1, 1] with 0, a medium gray, in the hole."""
    return images * (masks < 0.5)


def on_latents(masks: Tensor, factor: int) -> Tensor:
    """Return masks at the size of the latents, by their nearest pixel."""
    return F.interpolate(masks, scale_factor=1 / factor)
