"""The images that samples are conditioned on, as rows of a picture of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor

__all__ = ["rows_of_images"]

# Of longer lists, such as the frames of a video, one row shows the one in the middle.
_MOST_ROWS = 3


def rows_of_images(
    images: Mapping[str, tuple[Any, ...]], numbers: Sequence[int], size: tuple[int, int]
) -> dict[str, Float[Tensor, "batch 3 height width"]]:
    """Return one row per image of a condition, in [-1, 1], by the keyword of the pipeline's call.

    Args:
        images: by keyword, the image or the list of images of each condition.
        numbers: of the conditions, one per column.
        size: height and width of a column's samples; images of another aspect ratio get white bars.
    """
    rows = {}
    for keyword, given in images.items():
        chosen = [given[number] for number in numbers]
        listed = [image if isinstance(image, list | tuple) else [image] for image in chosen]
        for name, position in _rows_of(keyword, len(listed[0])).items():
            rows[name] = torch.stack([_scaled(one[position], size) for one in listed])
    return rows


def _rows_of(keyword: str, count: int) -> dict[str, int]:
    """Return the position in a list of images that each row shows, by the name of the row."""
    if count > _MOST_ROWS:
        return {f"{keyword}, middle": count // 2}
    return {keyword if count == 1 else f"{keyword} {i + 1}": i for i in range(count)}


def _scaled(image: Image.Image, size: tuple[int, int]) -> Float[Tensor, "3 height width"]:
    padded = ImageOps.pad(image.convert("RGB"), size[::-1], Image.Resampling.BICUBIC, color="white")
    return torch.from_numpy(np.array(padded)).movedim(-1, 0).float() / 127.5 - 1
