"""Dual tensors of torch's forward mode: a value and its tangent, taken apart and joined again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dual", "has_tangent", "make_dual", "split", "without_tangents"]


class Dual(NamedTuple):
    """A value and its tangent; None: the value is constant."""

    value: Any
    tangent: Tensor | None


def split(value: Tensor | float | None) -> Dual:
    """Return value and tangent of a tensor; a number has no tangent."""
    return Dual(*forward_ad.unpack_dual(value)) if isinstance(value, torch.Tensor) else Dual(value, None)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Return whether one of the tensors has a tangent."""
    # Parameters have none, since the engines differentiate in inputs alone. The test by type is faster than unpacking.
    return any(not isinstance(tensor, nn.Parameter) and split(tensor).tangent is not None for tensor in tensors)


def make_dual(value: Tensor, tangent: Tensor) -> Tensor:
    """Return value and tangent as one tensor, the tangent with shape and dtype of the value."""
    # Layers broadcast and promote the value alone.
    if tangent.shape != value.shape or tangent.dtype != value.dtype:
        tangent = tangent.to(value.dtype).expand(value.shape)
    if not tangent.requires_grad and tangent._is_view():
        # torch forbids the network to change a view in place that was made without a graph.
        tangent = tangent.data
    return forward_ad.make_dual(value, tangent)


def without_tangents() -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context in which the graph of a value does not hold the value's tangents.

    The value of a dual that torch has made is a view of the dual, and operations without a rule save the dual itself:
    the tangents would stay in memory until forward mode ends. Changes in place of saved tensors are not detected.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.data, lambda data: data)
