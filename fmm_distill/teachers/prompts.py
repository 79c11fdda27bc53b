"""Prompts with images: the arguments of a pipeline's call for each sample."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Prompts", "as_prompts", "pictures_like"]


@dataclass(frozen=True)
class Prompts:
    """Prompts, and the images that a pipeline takes with them.

    Attributes:
        texts: one per sample; empty texts where the pipeline takes no prompt.
        images: by keyword of the pipeline's call, one per sample: a PIL image, or a list of them (the frames of a
            video, several references).
    """

    texts: tuple[str, ...]
    images: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for keyword, images in self.images.items():
            if len(images) != len(self.texts):
                raise UserError(
                    f"prompts: expected one image per prompt in {keyword}, got {len(images)} for {len(self.texts)} "
                    "prompts"
                )

    def __len__(self) -> int:
        return len(self.texts)

    def some(self, numbers: Sequence[int]) -> Prompts:
        """Return the samples with these numbers."""
        images = {keyword: tuple(values[i] for i in numbers) for keyword, values in self.images.items()}
        return Prompts(tuple(self.texts[i] for i in numbers), images)

    def with_texts(self, text: str) -> Prompts:
        """Return the same images with one text for all."""
        return Prompts((text,) * len(self), self.images)

    def keywords(self, *, one: bool = False, prompt: bool = True) -> dict[str, Any]:
        """Return the keywords of a pipeline's call.

        Args:
            one: for the first sample alone, of a pipeline that takes no lists.
            prompt: the pipeline takes a prompt.
        """
        given: dict[str, Any] = {keyword: values[0] if one else list(values) for keyword, values in self.images.items()}
        if prompt:
            given["prompt"] = self.texts[0] if one else list(self.texts)
        return given

    def digests(self) -> list[str]:
        """Return a digest of each sample's images, equal for equal pixels; empty texts without images."""
        if not self.images:
            return [""] * len(self)
        return [
            hashlib.sha256(b"".join(_content(self.images[key][i]) for key in sorted(self.images))).hexdigest()
            for i in range(len(self))
        ]


def as_prompts(prompts: Sequence[str] | Prompts) -> Prompts:
    """Return prompts, those of texts alone without images."""
    return prompts if isinstance(prompts, Prompts) else Prompts(tuple(prompts))


def _content(image: Any) -> bytes:  # noqa: ANN401 a PIL image, a list of them
    if isinstance(image, list | tuple):
        return b"".join(_content(each) for each in image)
    return f"{image.mode} {image.size}".encode() + image.tobytes()


def pictures_like(image: Any, count: int, first: int = 0) -> list[Any]:  # noqa: ANN401 a PIL image, or a list of them
    """Return ``count`` smooth pictures with size and mode of an image, all of them different.

    A pipeline that is called with them shows how it treats images, whatever the images of a recipe are: equal ones
    would not show which numbers depend on them.

    Args:
        first: the number of the first picture, of which each has its own content.
    """
    if isinstance(image, list | tuple):
        each = [pictures_like(one, count, first + i * count) for i, one in enumerate(image)]
        return [[pictures[i] for pictures in each] for i in range(count)]
    from PIL import Image

    width, height = image.size
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    made = []
    for i in range(first, first + count):
        channels = [
            127.5 + 127.5 * torch.sin(6 * ((i + 1) * rows - (channel + 1) * columns) + i + channel)
            for channel in range(len(image.getbands()))
        ]
        pixels = torch.stack(channels, -1).round().to(torch.uint8).numpy()
        made.append(Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert(image.mode))
    return made
