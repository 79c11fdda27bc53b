"""Tables of conditions, as a user of the package would write them: images and masks as PNG files, and their names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from PIL import Image

from experiments.inpainting.holes import random_holes
from fmm_distill.io.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["write_conditions"]


def write_conditions(pixels: Tensor, count: int, folder: Path, seed: int) -> Path:
    """Write images and holes, both chosen by a seed, and return the path of their table.

    Args:
        pixels: uint8 images, of which ``count`` different ones are taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pixels), generator=generator)[:count]
    masks = (255 * random_holes(count, pixels.shape[-1], generator)).byte()
    lines = []
    for i, (number, mask) in enumerate(zip(chosen.tolist(), masks, strict=True)):
        row = {"image": f"{i:05d}.png", "mask": f"{i:05d}-mask.png"}
        Image.fromarray(pixels[number].movedim(0, -1).contiguous().numpy()).save(folder / row["image"])
        Image.fromarray(mask[0].numpy()).save(folder / row["mask"])
        lines.append(json.dumps(row))
    # Written last: its presence means that all images are there.
    table = folder / "conditions.jsonl"
    write_text(table, "\n".join([*lines, ""]))
    return table
