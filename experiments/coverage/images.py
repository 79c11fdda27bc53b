"""Images for pipelines that the suite calls with images: described at build time, drawn again for each sample."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from fmm_distill.teachers.prompts import Prompts

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

__all__ = ["Form", "describe_images", "draw_prompts", "replace_images"]

# Tensors of these names may have three channels, and are no images.
_NO_IMAGES = ("*latents*", "*embeds*", "*noise*")
_MODES = {1: "L", 3: "RGB"}

# The seed of the images that replace others.
_OTHER = 1000

# The form of an image: its size and mode; of a list, the forms of its entries.
Form = dict[str, Any] | list[Any]


def describe_images(given: Mapping[str, Any], parameters: Collection[str], scale: int = 8) -> dict[str, Form]:
    """Return the forms of the images among the dummy inputs of a test: one image, or a list, per sample.

    Args:
        given: the dummy inputs.
        parameters: the names of the parameters of the pipeline's call.
        scale: pixels of an image per latent. A test may give latents in the place of an image.
    """
    forms = {
        name: _form(name, value) or _form_of_latents(name, value, scale)
        for name, value in given.items()
        if name in parameters and not any(fnmatch.fnmatchcase(name, pattern) for pattern in _NO_IMAGES)
    }
    return {name: form for name, form in forms.items() if form}


def draw_prompts(texts: Sequence[str], forms: Mapping[str, Form]) -> Prompts:
    """Return prompts with images of these forms, each with pixels of its own."""
    images = {name: _draw_all(forms[name], len(texts), place) for place, name in enumerate(sorted(forms))}
    return Prompts(tuple(texts), images)


def replace_images(prompts: Prompts, name: str, form: Form) -> Prompts:
    """Return the same prompts with other images under one keyword."""
    return Prompts(prompts.texts, {**prompts.images, name: _draw_all(form, len(prompts), _OTHER)})


def _form(name: str, value: Any) -> Form | None:
    """Return the form of a value; None: it is no image."""
    if isinstance(value, Image.Image):
        return _one(name, value.size, len(value.getbands()))
    if isinstance(value, np.ndarray):
        # Arrays have the channels last; masks have none.
        value = torch.from_numpy(value)
        value = value.movedim(-1, -3) if value.ndim > 2 and value.shape[-1] in _MODES else value
    if isinstance(value, torch.Tensor):
        return _form_of_tensor(name, value)
    if isinstance(value, list | tuple):
        entries = [_form(name, entry) for entry in value]
        return entries if entries and all(entries) else None
    return None


def _form_of_latents(name: str, value: Any, scale: int) -> Form | None:
    if name != "image" or not isinstance(value, torch.Tensor) or value.ndim != 4:
        return None
    return {"size": [scale * value.shape[-1], scale * value.shape[-2]], "mode": "RGB"}


def _form_of_tensor(name: str, value: torch.Tensor) -> Form | None:
    if value.ndim == 2 and "mask" in name:
        return _one(name, (value.shape[1], value.shape[0]), 1)
    if value.ndim == 5:
        # A video, with the channels before or after the frames.
        channels_first = value.shape[1] in _MODES
        frames, channels = value.shape[2 if channels_first else 1], value.shape[1 if channels_first else 2]
        one = _one(name, (value.shape[-1], value.shape[-2]), channels)
        return None if one is None else [one] * frames
    return _one(name, (value.shape[-1], value.shape[-2]), value.shape[-3]) if value.ndim in (3, 4) else None


def _one(name: str, size: tuple[int, int], channels: int) -> Form | None:
    if channels not in _MODES:
        return None
    return {"size": list(size), "mode": "L" if "mask" in name else _MODES[channels]}


def _draw_all(form: Form, count: int, place: int) -> tuple[Any, ...]:
    return tuple(_draw(form, [place, number]) for number in range(count))


def _draw(form: Form, seed: list[int]) -> Any:
    if isinstance(form, list):
        return [_draw(entry, [*seed, number]) for number, entry in enumerate(form)]
    (width, height), channels = form["size"], {"L": 1, "RGB": 3}[form["mode"]]
    generator = np.random.default_rng(seed)
    if channels == 1:
        # Black and white, with an edge of its own for each sample.
        edge = 1 + generator.integers(max(1, width - 1))
        pixels = np.repeat(255 * (np.arange(width) >= edge)[None], height, 0)
        return Image.fromarray(pixels.astype(np.uint8))
    return Image.fromarray(generator.integers(0, 256, (height, width, channels), dtype=np.uint8))
