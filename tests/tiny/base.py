"""What every tiny pipeline of the tests is: how to build it and how to call it cheaply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline of real classes with random weights.

    Attributes:
        build: makes the pipeline anew, the same one every time, in evaluation mode.
        call: the keyword arguments of the smallest cheap call besides the prompt or class labels,
            ``num_inference_steps``, ``guidance_scale``, ``output_type`` and ``generator``.
    """

    build: Callable[[], DiffusionPipeline]
    call: dict[str, object]


def seeded(make: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """A builder of the same pipeline every time, in evaluation mode, whatever the global random state."""

    def build() -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline = make()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        return pipeline

    return build
