"""The layout in which pipelines pass samples to their scheduler, which is that of the network for most of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["find_positions", "from_stepped", "to_stepped"]


def find_positions(x: Float[Tensor, "batch *event"], stepped: Tensor) -> Int[Tensor, " numbers"] | None:
    """Return where the numbers of a sample are among those of the scheduler's sample; None: the layout is a plain one.

    Pipelines that are given a first frame keep it out of the scheduler's samples, or out of the network's, and some
    pack the rest for the network. Noise has no two equal numbers, so that the values show the positions.
    """
    event_shape = tuple(x.shape[1:])
    if stepped.shape == x.shape or len(stepped) != len(x):
        return None
    own, theirs = x[0].flatten(), stepped[0].flatten()
    order = theirs.argsort()
    places = torch.searchsorted(theirs[order], own).clamp_max(len(theirs) - 1)
    positions = order[places]
    if not torch.equal(theirs[positions], own) or positions.unique().numel() != own.numel():
        return None
    plain = own.numel() == theirs.numel() and torch.equal(from_stepped(stepped, event_shape), x)
    return None if plain else positions


def from_stepped(
    x: Tensor, event_shape: tuple[int, ...], positions: Int[Tensor, " numbers"] | None = None
) -> Float[Tensor, "batch *event"]:
    """Return a scheduler's samples as the teacher's.

    One axis fewer: the pipeline steps each frame of a video, shape ``[batch * frames, channels, height, width]``.

    Args:
        positions: of a sample's numbers among those of the scheduler's; None: all of them in their order.
    """
    if positions is not None:
        return x.flatten(1)[:, positions].reshape(-1, *event_shape)
    if x.ndim == len(event_shape):
        return x.reshape(-1, event_shape[1], event_shape[0], *event_shape[2:]).transpose(1, 2)
    return x.reshape(-1, *event_shape)


def to_stepped(
    x: Float[Tensor, "batch *event"], shape: tuple[int, ...], positions: Int[Tensor, " numbers"] | None = None
) -> Tensor:
    """Return samples of the teacher in the shape of the scheduler's, the inverse of ``from_stepped``.

    Numbers of the scheduler's samples that are not the teacher's are 0: pipelines put the given image there.
    """
    if positions is not None:
        stepped = x.new_zeros(shape)
        stepped.flatten(1)[:, positions] = x.flatten(1)
        return stepped
    frames = x.ndim == len(shape) + 1
    return (x.transpose(1, 2) if frames else x).reshape(shape)
