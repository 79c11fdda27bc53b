"""Images of samples that are points with coordinates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["point_images"]

# Pixels of the image of a point: odd, so that zero is in the middle.
_POINT_IMAGE = 33


def point_images(
    samples: Float[Tensor, "batch *event"], like: Float[Tensor, "batch *event"]
) -> Float[Tensor, "batch 1 height width"]:
    """Return one image per sample with a bright square at its first two coordinates, zero in the middle.

    Args:
        like: the samples that the scale is chosen for; others outside of it are drawn at the edge.
    """
    scale = 1.1 * like.abs().max().clamp_min(1e-6)
    first = samples.flatten(1)[:, :2]
    # A point on a line is drawn at the height zero; the vertical axis points up.
    x, y = first[:, 0], -first[:, 1] if first.shape[1] > 1 else torch.zeros(len(first))
    middle, reach = _POINT_IMAGE // 2, _POINT_IMAGE // 2 - 1
    # A sample that is not finite has an empty image.
    finite = first.isfinite().all(1)
    ends = (torch.where(finite, value / scale, 0.0).clamp(-1, 1).mul(reach).round().long() for value in (x, y))
    column, row = (end + middle for end in ends)
    pixels = torch.arange(_POINT_IMAGE)
    near = [(pixels - center[:, None]).abs() <= 1 for center in (row, column)]
    spots = near[0][:, :, None] & near[1][:, None, :] & finite[:, None, None]
    return spots.float().mul(2).sub(1).unsqueeze(1)
