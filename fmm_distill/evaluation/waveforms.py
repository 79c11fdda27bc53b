"""Images of samples that are sounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["waveform_images"]

# Pixels of the image of one channel: odd, so that silence is in the middle.
_HEIGHT, _WIDTH = 65, 128


def waveform_images(
    sounds: Float[Tensor, "batch channels length"], like: Float[Tensor, "batch channels length"]
) -> Float[Tensor, "batch 1 height width"]:
    """Return one image per sound: its waveforms, bright on black, one channel below the other.

    Each column of pixels goes from the lowest to the highest value in its part of the sound.

    Args:
        like: the sounds whose loudest value is at the edge of the image; louder ones are cut there.
    """
    # A sound that is not finite has an empty image.
    finite = sounds.isfinite().flatten(1).all(1)
    # Silence has a scale too.
    scale = torch.cat((like[like.isfinite()].abs(), like.new_full((1,), 1e-6))).max()
    values = torch.where(finite[:, None, None], sounds / scale, 0.0).clamp(-1, 1)
    # A short sound has several columns per value, a long one several values per column.
    high = torch.nn.functional.adaptive_max_pool1d(values, _WIDTH)
    low = -torch.nn.functional.adaptive_max_pool1d(-values, _WIDTH)
    # Row 0 is at the top, where the value is 1.
    top, bottom = (((1 - value) / 2 * (_HEIGHT - 1)).round().unsqueeze(2) for value in (high, low))
    rows = torch.arange(_HEIGHT)[:, None]
    drawn = (rows >= top) & (rows <= bottom) & finite[:, None, None, None]
    return drawn.flatten(1, 2).unsqueeze(1).float() * 2 - 1
