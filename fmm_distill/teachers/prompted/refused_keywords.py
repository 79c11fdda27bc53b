"""Keywords of a pipeline's call that a recipe can't set under ``pipeline``, and the settings to use instead."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["refused_keyword"]

_PROMPTS = "the prompts are prompts.file or prompts.dataset"
_GUIDANCE = "the teacher's guidance is guidance.scale"
_IMAGE_GUIDANCE = "the scale of the guidance by the image is guidance.image_scale"
_GRID = "numbers of steps are evaluation.steps and export.steps"
_SAMPLES = "samples are counted by training.batch_size and evaluation.samples"
_SEED = "noise is drawn from training.seed"
_NOISE = "a student starts from noise alone"
_LOOP = "the program runs the steps itself; it is a keyword of the exported pipeline's own call"
# The first pattern that matches is used: special patterns come before general ones.
_INSTEAD = {
    "*negative_prompt*": "guidance uses the empty prompt",
    "ip_adapter*": "its adapter is ip_adapter.source, and its images are prompts.images.ip_adapter_image",
    "*embeds*": _PROMPTS,
    "*prompt_attention_mask*": _PROMPTS,
    "num_*_per_prompt": _SAMPLES,
    "prompt": _PROMPTS,
    "prompt_[0-9]": _PROMPTS,
    "*num_inference_steps": _GRID,
    "timesteps": _GRID,
    "sigmas": _GRID,
    "mu": "the shift is that of the pipeline for its size",
    "denoising_*": "a student goes from noise to data",
    "image_guidance_scale": _IMAGE_GUIDANCE,
    "*guidance_scale*": _GUIDANCE,
    "guidance_rescale": _GUIDANCE,
    "true_cfg_scale": _GUIDANCE,
    "pag_*": _GUIDANCE,
    "sag_*": _GUIDANCE,
    "generator": _SEED,
    "latents": _SEED,
    "eta": "the teacher's ODE is solved without noise in its steps",
    "image": _NOISE,
    "video": _NOISE,
    "strength": _NOISE,
    "class_labels": "every class is drawn with the same probability",
    "batch_size": _SAMPLES,
    "output_type": "samples are latents until they are evaluated",
    "return_dict": _LOOP,
    "callback*": _LOOP,
}


def refused_keyword(names: Iterable[str]) -> str | None:
    """Return the error message for the first name that the program sets itself; None: there is no such name."""
    for name in names:
        for pattern, instead in _INSTEAD.items():
            if fnmatchcase(name, pattern):
                return f"pipeline.{name} is set by the program: {instead}; expected keywords such as height and width"
    return None
