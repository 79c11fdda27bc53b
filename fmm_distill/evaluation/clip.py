"""CLIP scores of images and their prompts, by torchmetrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fmm_distill.errors import UserError, named
from fmm_distill.evaluation.draws import prompts_of
from fmm_distill.evaluation.features import as_bytes
from fmm_distill.teachers.conditions import Embeddings

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.teachers.base import Teacher

__all__ = ["make_clip_scorer"]


class _TensorClip(nn.Module):
    """A CLIP model that returns tensors, as torchmetrics expects; models of transformers 5 return output objects."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 a transformers class
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch d"]:
        """Return the embeddings of images."""
        return _plain(self.model.get_image_features(pixels))

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Float[Tensor, "batch d"]:
        """Return the embeddings of texts."""
        return _plain(self.model.get_text_features(tokens, mask))


def _plain(output: Any) -> Tensor:  # noqa: ANN401 of either version
    found: Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return found


def make_clip_scorer(
    model: str, teacher: Teacher, seed: int, device: torch.device
) -> Callable[[Tensor, range], Tensor]:
    """Return a function that scores images in [0, 1], given the numbers of their samples.

    The score of a sample is 100 times the cosine between the embeddings of its image and its prompt (Hessel et al.,
    arXiv 2104.08718), clamped at 0.

    Args:
        model: a Hub id or a folder.

    Raises:
        UserError: if the teacher has no prompts, or the model can't be opened.
    """
    known = teacher.conditions
    if not isinstance(known, Embeddings):
        raise UserError(f"evaluation.clip {model}: expected a teacher with prompts, got {teacher.source}; try null")
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore
        from transformers import CLIPModel, CLIPProcessor

        opened = _TensorClip(CLIPModel.from_pretrained(model)).eval(), CLIPProcessor.from_pretrained(model)
        # By name, torchmetrics accepts only four models.
        metric = CLIPScore(model_name_or_path=lambda: opened, sync_on_compute=False).to(device)
    except Exception as error:
        raise UserError(
            f"evaluation.clip {model}: can't be opened ({named(error)}); expected the Hub id or folder of a CLIP "
            "model with its processor (pip install fmm-distill[text]); null: no CLIP score"
        ) from error

    @torch.no_grad()
    def score(images: Tensor, numbers: range) -> Tensor:
        pixels = as_bytes(images).to(device)
        found = []
        for image, prompt in zip(pixels, prompts_of(known, numbers, seed), strict=True):
            # One image at a time: torchmetrics returns a mean, and the evaluation needs a score per sample.
            metric.reset()
            metric.update(image, prompt)
            found.append(metric.compute().cpu())
        return torch.stack(found)

    return score
