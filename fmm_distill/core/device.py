"""Copies of tensors from the CPU to the device of the networks that do not block the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["to_device"]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on ``device``; a tensor that is already there is returned unchanged."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        # A copy from pageable memory waits until the GPU has finished all queued work; one from pinned memory does not.
        # torch waits with the reuse of the pinned memory until the copy is done, so it can be released at once.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
