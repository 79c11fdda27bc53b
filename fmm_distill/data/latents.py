"""Images as a teacher's latents: encoded once, stored on disk under a digest of all they depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fmm_distill.core.time_axis import expand
from fmm_distill.data.row_store import Layout, Parts
from fmm_distill.data.samples import ImageBatch, mirrored, row_of
from fmm_distill.io.cache import cache_key, cache_path

if TYPE_CHECKING:
    from torch import Tensor

    from fmm_distill.core.draws import Draws
    from fmm_distill.data.samples import Images
    from fmm_distill.teachers.codec import LatentCodec

__all__ = ["Latents", "encode_images", "latent_layout"]

# Images per call of the encoder, whose activations need far more memory than its latents.
_BATCH = 64
# Latents of a part, which is the work that a kill can lose.
_PART = 4096


def latent_layout(images: Images, encoder: LatentCodec, event_shape: tuple[int, ...]) -> Layout:
    """Return the layout of the latents of these images, next to the Hub's cache.

    Its folder is named by a digest of all that the latents depend on.

    Args:
        event_shape: shape of one latent, in float32.
    """
    about = [encoder.digest(), images.fingerprint, len(images), images.flip]
    folder = cache_path(f"latents-{cache_key(about)}")
    numbers = torch.Size(event_shape).numel()
    # float32 latents, and the int64 row of the image.
    return Layout(folder, len(images), 4 * numbers * (2 if images.flip else 1) + 8, _PART)


def encode_images(
    images: Images,
    encoder: LatentCodec,
    layout: Layout,
    device: torch.device | str = "cpu",
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Encode the images whose latents are not on disk yet; a latent is the mean of the posterior, not a draw.

    The latent of a mirrored image is not the mirrored latent: with ``flip`` both are encoded.

    Args:
        shard: the index of this process, and the number of processes that divide the work.
    """

    def make(number: int, start: int, stop: int) -> dict[str, Tensor]:
        made: dict[str, list[Tensor]] = {"latents": [], "mirrored": [], "rows": []}
        for index in torch.arange(start, stop).split(_BATCH):
            some, rows = images.take(index)
            some = some.to(device)
            made["latents"].append(encoder.encode(some).cpu())
            if images.flip:
                made["mirrored"].append(encoder.encode(some.flip(-1)).cpu())
            # The rows that were read: an unreadable image is replaced by another, with that one's condition.
            made["rows"].append(rows)
        return {name: torch.cat(values) for name, values in made.items() if values}

    encoder.to(device)
    layout.fill(make, *shard)
    # Training does not use the encoder, and its weights would occupy the GPU.
    encoder.to("cpu")


class Latents:
    """Encoded images as data to start from.

    Args:
        layout: the layout that ``encode_images`` filled.

    Raises:
        UserError: if a part is missing or damaged.
    """

    def __init__(self, images: Images, layout: Layout) -> None:
        self.parts, self.flip, self.conditions = Parts(layout), images.flip, images.conditions

    def __len__(self) -> int:
        return len(self.parts)

    def pick(self, draws: Draws) -> ImageBatch:
        """Return the latents at the positions ``draws.image``, of mirrored images where ``draws.flip`` is below 1/2."""
        index = row_of(draws.image, len(self))
        latents = self.parts.rows("latents", index)
        if self.flip:
            latents = torch.where(
                expand(mirrored(draws).cpu(), latents).bool(), self.parts.rows("mirrored", index), latents
            )
        rows = self.parts.rows("rows", index)
        return ImageBatch(latents, None if self.conditions is None else self.conditions[rows])
