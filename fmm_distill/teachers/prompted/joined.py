"""The part that a pipeline joins to the sample before the call of its network: latents of an image, a mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError
from fmm_distill.teachers.prompted.rows import is_close
from fmm_distill.teachers.recording import tensor_of

if TYPE_CHECKING:
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.recording import Recording

__all__ = ["JoinedPart", "check_joined", "find_joined"]

# The name of the joined part among the conditions; no argument of Python has it.
_NAME = "joined to the sample"


@dataclass(frozen=True)
class JoinedPart:
    """The part of the network's first argument that stays the same in all steps, before and after the sample.

    Attributes:
        axis: along which it is joined, the axis of the batch included.
        start, size: the position of the sample along that axis.
        total: the size of the argument along that axis.
        per_sample: every sample has its own; else all samples share one.
        inner: what is joined along a further axis, such as channels after a first frame; None: nothing.
    """

    axis: int
    start: int
    size: int
    total: int
    per_sample: bool
    inner: JoinedPart | None = None

    def sample_in(self, given: Tensor) -> Tensor:
        """Return the samples in the network's argument."""
        own = self.narrowed(given)
        return own if self.inner is None else self.inner.sample_in(own)

    def sample_of_output(self, output: Tensor) -> Tensor:
        """Return the samples in an output, which may lack what is joined along some of the axes."""
        own = self.narrowed(output) if output.shape[self.axis] == self.total else output
        return own if self.inner is None else self.inner.sample_of_output(own)

    def narrowed(self, given: Tensor) -> Tensor:
        """Return the network's argument without the part along this axis."""
        return given.narrow(self.axis, self.start, self.size)

    def joined_in(self, given: Tensor) -> Tensor:
        """Return the joined part of the network's argument."""
        before, _, after = given.split((self.start, self.size, self.total - self.start - self.size), self.axis)
        return torch.cat((before, after), self.axis)

    def add_to(self, cond: Conditioning, given: Tensor) -> Conditioning:
        """Return the conditions with the joined part of the network's argument."""
        if self.inner is not None:
            cond = self.inner.add_to(cond, self.narrowed(given))
        if self.per_sample:
            return replace(cond, inputs={**cond.inputs, self._name: self.joined_in(given)})
        return replace(cond, shared={**cond.shared, self._name: self.joined_in(given)[:1]})

    def join(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return x with the joined part, which is removed from the arguments of the call."""
        part: Tensor = arguments.pop(self._name)
        x = x if self.inner is None else self.inner.join(x, arguments)
        part = part.to(x.dtype).expand(len(x), *part.shape[1:])
        before, after = part.split((self.start, self.total - self.size - self.start), self.axis)
        return torch.cat((before, x, after), self.axis)

    @property
    def _name(self) -> str:
        return _NAME if self.inner is None else f"{_NAME} along axis {self.axis}"


def find_joined(recording: Recording, sample: str, source: str) -> JoinedPart | None:
    """Find the part of the network's argument that stays the same in all steps; None: all of it changes.

    Args:
        sample: the name of the network's argument.

    Raises:
        UserError: if the argument has more than the scheduler's sample, and that changes from step to step.
    """
    each = [tensor_of(call.arguments[sample]) for call in recording.calls]
    if any(one.shape != each[0].shape for one in each):
        raise UserError(
            f"{source}: expected a network that gets one size in all steps, got several in {sample}: its pipeline may "
            "store what it knows of an image in the first step; write an adapter for it (docs/add-a-teacher.md)"
        )
    given = torch.stack(each)
    changes = (given != given[0]).any(0)
    if changes.any() and (found := _find_part(given[0], changes)) is not None:
        return found
    own = recording.steps[0].sample
    if given[0].ndim == own.ndim and len(given[0]) == len(own) and given[0].numel() > own.numel():
        raise UserError(
            f"{source}: expected the sample alone, or with a part that stays the same in all steps, in the network's "
            f"{sample}, got a part that changes; write an adapter for it (docs/add-a-teacher.md)"
        )
    return None


def _find_part(given: Tensor, changes: Tensor) -> JoinedPart | None:
    """Find the part of one call's argument along the first axis that has any, and along the later ones."""
    for axis in range(1, changes.ndim):
        positions = changes.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist()
        start, size, total = positions[0], positions[-1] - positions[0] + 1, changes.shape[axis]
        if size < total:
            part = JoinedPart(axis, start, size, total, per_sample=False)
            joined = part.joined_in(given)
            own = not torch.equal(joined, joined[:1].expand_as(joined))
            return replace(part, per_sample=own, inner=_find_part(part.narrowed(given), part.narrowed(changes)))
    return None


def check_joined(part: JoinedPart, two: Tensor, swapped: Tensor, three: Tensor, source: str) -> None:
    """Check that the joined part of a sample does not depend on the other samples of a call, as fresh noise does.

    Args:
        two, swapped, three: the network's arguments for the prompts (A, B), (B, A) and (A, B, C).

    Raises:
        UserError: if it does.
    """
    if part.inner is not None:
        check_joined(part.inner, part.narrowed(two), part.narrowed(swapped), part.narrowed(three), source)
    if any(given.shape[part.axis] != part.total for given in (two, swapped, three)):
        raise UserError(
            f"{source}: expected a part joined to the sample of one size, got one that grows with the number of "
            "samples, such as the images of all of them; write an adapter for it (docs/add-a-teacher.md)"
        )
    own, other, more = (part.joined_in(given) for given in (two, swapped, three))
    if not (is_close(own, other.flip(0)) and is_close(own, more[:2])):
        raise UserError(
            f"{source}: expected a part joined to the sample that is a function of the prompt and its images, got one "
            "that depends on the other samples of a call, such as noise that is added to an image; write an adapter "
            "for it (docs/add-a-teacher.md)"
        )
