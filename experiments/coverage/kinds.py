"""The kinds of pipelines: what a pipeline generates, and from what.

A kind orders the report. It decides nothing about how a pipeline is opened.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["FROM_NOISE", "KINDS", "kind_of"]

# Kinds that start from noise and from prompts or classes alone.
FROM_NOISE = ("text-to-image", "text-to-video", "audio", "class", "unconditional")
KINDS = (
    *FROM_NOISE,
    "image-to-image",
    "inpaint",
    "edit",
    "controlnet",
    "image-to-video",
    "video-to-video",
    "upscaler",
    "prior",
    "other",
)

# Parts of class names, in the order in which they decide: an inpainting ControlNet is a ControlNet.
_BY_NAME = (
    ("other", r"Marigold|ShapE|LLaDA|DiffusionGemma|Proteina|DiffusionDecode"),
    ("upscaler", r"Upsampl|Upscale|SuperRes|SRPipeline|TemporalRefine"),
    ("prior", r"Prior|Redux"),
    ("controlnet", r"Control|Adapter|Transfer|Sparse"),
    ("inpaint", r"Inpaint|Fill"),
    ("edit", r"Edit|HDR|Kontext|Pix2Pix|InContext|VisualCloze|VACE|Layered"),
    (
        "image-to-video",
        r"ImageToVideo|I2V|Image2Video|Video2World|VideoToWorld|StableVideoDiffusion|ConsisID|WanAnimate|Framepack",
    ),
    ("video-to-video", r"VideoToVideo|Video2Video"),
    ("image-to-image", r"Img2Img|I2I|Depth2Img|ImageVariation|Refiner"),
)
# Keywords of calls.
_AUDIO = re.compile(r"audio_(length|duration|end)")
_FRAMES = ("num_frames", "video_length", "frames")


def kind_of(pipeline: str, parameters: Collection[str]) -> str:
    """Return the kind of a pipeline class.

    Args:
        parameters: the names of the parameters of its call.
    """
    for kind, names in _BY_NAME:
        if re.search(names, pipeline):
            return kind
    if "Audio" in pipeline or any(_AUDIO.match(name) for name in parameters):
        return "audio"
    # A decoder takes the image embeddings that its prior made of a prompt.
    if "prompt" not in parameters and "image_embeds" not in parameters:
        return "class" if "class_labels" in parameters and "batch_size" not in parameters else "unconditional"
    return "text-to-video" if any(name in parameters for name in _FRAMES) else "text-to-image"
