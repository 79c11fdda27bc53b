"""The layout in which pipelines pass samples to their scheduler, which is that of the network for most of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["from_stepped", "to_stepped"]


def from_stepped(x: Tensor, event_shape: tuple[int, ...]) -> Float[Tensor, "batch *event"]:
    """Return a scheduler's samples as the teacher's.

    One axis fewer: the pipeline steps each frame of a video, shape ``[batch * frames, channels, height, width]``.
    """
    if x.ndim == len(event_shape):
        return x.reshape(-1, event_shape[1], event_shape[0], *event_shape[2:]).transpose(1, 2)
    return x.reshape(-1, *event_shape)


def to_stepped(x: Float[Tensor, "batch *event"], shape: tuple[int, ...]) -> Tensor:
    """Return samples of the teacher in the shape of the scheduler's, the inverse of ``from_stepped``."""
    frames = x.ndim == len(shape) + 1
    return (x.transpose(1, 2) if frames else x).reshape(shape)
