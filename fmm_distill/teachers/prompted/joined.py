"""The part that a pipeline joins to the sample before the call of its network, such as the latents of a first frame."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError
from fmm_distill.teachers.recording import tensor_of

if TYPE_CHECKING:
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.recording import Recording

__all__ = ["JoinedPart", "find_joined"]

# The name of the joined part among the conditions; no argument of Python has it.
_NAME = "joined to the sample"


@dataclass(frozen=True)
class JoinedPart:
    """The part of the network's first argument that follows the sample and stays the same in all steps.

    Attributes:
        axis: along which it follows the sample, the axis of the batch included.
        size: of the sample along that axis.
        per_sample: every sample has its own; else all samples share one.
    """

    axis: int
    size: int
    per_sample: bool

    def head(self, given: Tensor) -> Tensor:
        """Return the samples in the network's argument."""
        return given.narrow(self.axis, 0, self.size)

    def tail(self, given: Tensor) -> Tensor:
        """Return the joined part of the network's argument."""
        return given.narrow(self.axis, self.size, given.shape[self.axis] - self.size)

    def add_to(self, cond: Conditioning, given: Tensor) -> Conditioning:
        """Return the conditions with the joined part of the network's argument."""
        if self.per_sample:
            return replace(cond, inputs={**cond.inputs, _NAME: self.tail(given)})
        return replace(cond, shared={**cond.shared, _NAME: self.tail(given)[:1]})

    def join(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return x with the joined part, which is removed from the arguments of the call."""
        part: Tensor = arguments.pop(_NAME)
        return torch.cat((x, part.to(x.dtype).expand(len(x), *part.shape[1:])), self.axis)


def find_joined(recording: Recording, sample: str, source: str) -> JoinedPart | None:
    """Compare the network's argument with the scheduler's sample; None: they have the same size.

    Args:
        sample: the name of the network's argument.

    Raises:
        UserError: if the argument changes from step to step beyond the sample.
    """
    given = [tensor_of(call.arguments[sample]) for call in recording.calls]
    own = recording.steps[0].sample
    if given[0].ndim != own.ndim or len(given[0]) != len(own):
        return None
    axes = [axis for axis in range(1, own.ndim) if given[0].shape[axis] != own.shape[axis]]
    if len(axes) != 1 or given[0].shape[axes[0]] < own.shape[axes[0]]:
        return None
    part = JoinedPart(axes[0], own.shape[axes[0]], per_sample=False)
    first = part.tail(given[0])
    if not all(torch.equal(part.tail(each), first) for each in given):
        raise UserError(
            f"{source}: expected the sample alone, or with a part that stays the same in all steps, in the network's "
            f"{sample}, got a part that changes; write an adapter for it (docs/add-a-teacher.md)"
        )
    return replace(part, per_sample=not torch.equal(first, first[:1].expand_as(first)))
