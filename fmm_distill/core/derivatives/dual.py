"""A tensor with its tangent in forward mode, taken apart and put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dual", "moves", "split", "together", "without_tangents"]


class Dual(NamedTuple):
    """A value and its tangent, None where it does not move."""

    value: Any
    tangent: Tensor | None


def split(value: Tensor | float | None) -> Dual:
    """Whatever it is: a number does not move."""
    return Dual(*forward_ad.unpack_dual(value)) if isinstance(value, torch.Tensor) else Dual(value, None)


def moves(*tensors: Tensor | None) -> bool:
    """Whether one of them has a tangent, which no weight of a module has."""
    return any(not isinstance(tensor, nn.Parameter) and split(tensor).tangent is not None for tensor in tensors)


def together(value: Tensor, tangent: Tensor) -> Tensor:
    """Both as one. Only the value is broadcast and promoted by the layer that it went through."""
    if tangent.shape != value.shape or tangent.dtype != value.dtype:
        tangent = tangent.to(value.dtype).expand(value.shape)
    if not tangent.requires_grad and tangent._is_view():
        # A view made without a graph may not be changed in place by the network afterwards.
        tangent = tangent.data
    return forward_ad.make_dual(value, tangent)


def without_tangents() -> torch.autograd.graph.saved_tensors_hooks:
    """A context where what a rule's layer saves of a value does not keep the value's tangent.

    A value taken out of a dual that torch made is a view of it. Operations without a rule save the dual itself, so that
    the tangents of what they save stay until forward mode ends. What is saved here is not watched for changes in place.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.data, lambda data: data)
