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
    """Both as one, where operands may be of fewer dimensions or digits."""
    if tangent.shape != value.shape or tangent.dtype != value.dtype:
        tangent = tangent.to(value.dtype).expand(value.shape)
    return forward_ad.make_dual(value, tangent)


def without_tangents() -> torch.autograd.graph.saved_tensors_hooks:
    """A context where what a rule's layer saves of a value does not keep the value's tangent.

    A value taken out of a dual that torch made is a view of it. Operations without a rule save the dual itself, so that
    the tangents of what they save stay until forward mode ends.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.data if saved._is_view() else saved, _same)


def _same(saved: Tensor) -> Tensor:
    return saved
