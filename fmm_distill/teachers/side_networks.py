"""Networks that a pipeline calls before the main one in every step, such as a ControlNet.

They get the same sample and time, and their outputs are arguments of the main network: together they are one function
of the sample and the time. They stay as they are; the student is a student of the main network.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = ["TIME_NAMES", "SideCall", "SideNetwork", "recorder_of_side", "side_networks", "take_results"]

# Names of a network's time argument in diffusers.
TIME_NAMES = ("timestep", "timesteps", "t")


@dataclass(frozen=True)
class SideCall:
    """A recorded call.

    Attributes:
        arguments: by their names, without sample and time.
        names: of the arguments for sample and time.
        sample, time: what they were.
        output: what the network returned.
        results: the arguments of the main network that are parts of the output, and the index of the part; None: the
            output itself.
    """

    arguments: dict[str, Any]
    names: tuple[str, str]
    sample: Tensor
    time: Any
    output: Any
    results: dict[str, int | None] = field(default_factory=dict)


def side_networks(pipeline: Any, component: str) -> dict[str, nn.Module]:  # noqa: ANN401 a diffusers class
    """Return the components of a pipeline that take a time, other than its main network ``component``."""
    return {
        name: part
        for name, part in pipeline.components.items()
        if name != component and isinstance(part, nn.Module) and _time_name(part) is not None
    }


def _time_name(network: nn.Module) -> str | None:
    parameters = inspect.signature(network.forward).parameters
    return next((name for name in parameters if name in TIME_NAMES), None)


def recorder_of_side(
    network: nn.Module, copied: Callable[[Any], Any], seen: Callable[[SideCall], None]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what makes a recording ``forward`` of the original one.

    Args:
        copied: copies arguments.
        seen: called with each call.
    """
    signature, time = inspect.signature(network.forward), _time_name(network)

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 those of the network
            given = copied(dict(signature.bind(*args, **kwargs).arguments))
            output = original(*args, **kwargs)
            sample = next(iter(given))
            names = (sample, str(time))
            own = {name: value for name, value in given.items() if name not in (*names, "return_dict")}
            seen(SideCall(own, names, given[sample], given[str(time)], output))
            return output

        return forward

    return make


def _is_same(one: Any, other: Any) -> bool:  # noqa: ANN401 any argument
    """Return whether two values are one object, or lists or tuples of the same objects."""
    if one is other:
        return True
    if not (isinstance(one, list | tuple) and isinstance(other, list | tuple)):
        return False
    return 0 < len(one) == len(other) and all(_is_same(a, b) for a, b in zip(one, other, strict=True))


def take_results(call: SideCall, arguments: dict[str, Any], given: Mapping[str, Any]) -> SideCall:
    """Remove the parts of the call's output from the arguments of the main network, and return the call with them.

    Args:
        arguments: copies of the arguments, from which they are removed.
        given: the arguments themselves.
    """
    parts: dict[int | None, Any] = {None: call.output}
    if isinstance(call.output, tuple):
        parts |= dict(enumerate(call.output))
    results = {
        name: index
        for name, value in given.items()
        for index, part in parts.items()
        if part is not None and _is_same(value, part)
    }
    for name in results:
        del arguments[name]
    return SideCall(call.arguments, call.names, call.sample, call.time, None, results)


@dataclass(frozen=True)
class SideNetwork:
    """A network that runs before the main one.

    Attributes:
        name: of the component, and of the dictionary of its arguments among the conditions.
        names: of the arguments for sample and time.
        results: see ``SideCall``.
        joined: the sample is passed with what is joined to it for the main network.
        frames: the frames of a video are passed as samples of their own.
    """

    name: str
    network: nn.Module
    names: tuple[str, str]
    results: Mapping[str, int | None]
    joined: bool
    frames: bool = False

    @classmethod
    def of(cls, name: str, network: nn.Module, call: SideCall, given: Tensor, x: Tensor) -> SideNetwork:
        """Read a recorded call.

        Args:
            given: the main network's argument for the sample.
            x: the sample in it.

        Raises:
            UserError: if it gets another sample, or if nothing of its output reaches the main network unchanged.
        """
        is_given = call.sample.shape == given.shape and torch.equal(call.sample, given)
        is_sample = call.sample.shape == x.shape and torch.equal(call.sample, x)
        frames = x.ndim == call.sample.ndim + 1 and torch.equal(call.sample, _frames_of(x))
        if not call.results or not (is_given or is_sample or frames):
            what = "of the main network's sample" if call.results else "whose output the main network gets"
            raise UserError(
                f"expected a {type(network).__name__} ({name}) {what}, got another from the pipeline; write an adapter "
                "for it (docs/add-a-teacher.md)"
            )
        return cls(name, network.eval().requires_grad_(False), call.names, call.results, is_given, frames)

    def __deepcopy__(self, memo: dict[int, Any]) -> SideNetwork:
        """Return the network itself: copies of a student share it."""
        return self

    def __call__(self, arguments: dict[str, Any], x: Tensor, given: Tensor, time: Tensor) -> dict[str, Any]:
        """Return the main network's arguments with the outputs of this network in place of its own arguments."""
        sample, when = self.names
        own = arguments.pop(self.name)
        if next(self.network.parameters(), x).device != x.device:
            # Moving the main network leaves it behind.
            self.network.to(x.device)
        x = given if self.joined else x
        if self.frames:
            x, time = _frames_of(x), time.repeat_interleave(x.shape[2])
        output = self.network(**own, **{sample: x, when: time}, return_dict=False)
        return arguments | {name: output if i is None else output[i] for name, i in self.results.items()}


def _frames_of(x: Tensor) -> Tensor:
    """Return the frames of videos ``[batch, channels, frames, height, width]`` one after the other."""
    return x.transpose(1, 2).flatten(0, 1)
