"""How well images fit their prompts: CLIP score, by torchmetrics."""

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

__all__ = ["clip_scores"]


class _Tensors(nn.Module):
    """A CLIP model that gives tensors, as torchmetrics takes them, where transformers 5 gives outputs."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 a transformers class
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch d"]:
        """Embeddings of images."""
        return _plain(self.model.get_image_features(pixels))

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Float[Tensor, "batch d"]:
        """Embeddings of texts."""
        return _plain(self.model.get_text_features(tokens, mask))


def _plain(output: Any) -> Tensor:  # noqa: ANN401 of either version
    found: Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return found


def clip_scores(model: str, teacher: Teacher, seed: int, device: torch.device) -> Callable[[Tensor, range], Tensor]:
    """What scores images in [0, 1] against the prompts that the samples of these numbers were told.

    A score is 100 times the cosine between the embeddings of image and prompt (Hessel et al., arXiv 2104.08718), not
    below 0; one a sample.

    Args:
        model: a Hub id or a folder.

    Raises:
        UserError: if the teacher has no prompts, or the model can't be opened.
    """
    known = teacher.conditions
    if not isinstance(known, Embeddings):
        raise UserError(f"evaluation.clip {model}: {teacher.source} has no prompts to score; wanted null")
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore
        from transformers import CLIPModel, CLIPProcessor

        opened = _Tensors(CLIPModel.from_pretrained(model)).eval(), CLIPProcessor.from_pretrained(model)
        # By its name torchmetrics takes four models only.
        metric = CLIPScore(model_name_or_path=lambda: opened, sync_on_compute=False).to(device)
    except Exception as error:
        raise UserError(
            f"evaluation.clip {model}: can't be opened ({named(error)}); wanted a CLIP model with its "
            "processor, by its Hub id or folder (pip install fmm-distill[text]); null: not measured"
        ) from error

    @torch.no_grad()
    def score(images: Tensor, numbers: range) -> Tensor:
        pixels = as_bytes(images).to(device)
        found = []
        for image, prompt in zip(pixels, prompts_of(known, numbers, seed), strict=True):
            metric.reset()
            metric.update(image, prompt)
            found.append(metric.compute().cpu())
        return torch.stack(found)

    return score
