"""Tensors from the CPU to where networks are, without the host waiting for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["sent"]


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on ``device``; of one that is there, itself.

    A copy of pageable memory to a GPU waits for all that the GPU has been given to do.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
