"""The moving average of a student's weights that is evaluated and exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    Tensors = tuple[Tensor, ...] | list[Tensor]

__all__ = ["averaged"]


def averaged(network: nn.Module, rate: float) -> AveragedModel:
    """Torch's averaged model with rate ``min(rate, (1 + n) / (10 + n))`` after n updates, buffers included.

    The short start keeps the untrained weights out of the average of a short run.
    """
    return AveragedModel(network, multi_avg_fn=_update(rate), use_buffers=True)


def _update(rate: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    @torch.no_grad()
    def update(average: Tensors, current: Tensors, updates: Tensor | int) -> None:
        n = int(updates)
        torch._foreach_lerp_(average, current, 1 - min(rate, (1 + n) / (10 + n)))

    return update


def share_frozen(model: nn.Module, average: nn.Module) -> None:
    """Let an average hold the model's own tensors where these are not trained: one copy of them in memory."""
    ours = dict(model.named_parameters())
    for name, parameter in average.named_parameters():
        if not ours[name].requires_grad:
            parameter.data = ours[name].data
