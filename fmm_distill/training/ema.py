"""Exponential moving averages of a student's weights, which are evaluated and exported."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fmm_distill.training.fsdp import local, placed_like

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = ["averaged", "build_averages", "frozen_copy", "load_trained", "trained_state"]

Network = TypeVar("Network", bound=nn.Module)


def frozen_copy(network: Network) -> Network:
    """Return a copy in evaluation mode that is not trained and shares the frozen parameters of ``network``.

    A student with adapters and all its copies so store the large weights once.
    """
    shared = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    return copy.deepcopy(network, shared).requires_grad_(False).eval()


class _Average(AveragedModel):
    """An averaged model with its count on the CPU: torch's own update reads it from the device, and waits for it."""

    def __init__(self, module: nn.Module, rate: float) -> None:
        # AveragedModel copies its module; an average shares the frozen weights.
        super().__init__(nn.Identity())
        self.module, self.rate = module, rate

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Add the model's parameters and buffers to the average, which starts as a copy of them."""
        n = int(self.n_averaged)
        # Under FSDP each process averages its shards.
        ours, theirs = (
            [local(tensor.detach()) for tensor in itertools.chain(part.parameters(), part.buffers())]
            for part in (self.module, model)
        )
        if n:
            # One call for all tensors: a GPU then launches few kernels.
            torch._foreach_lerp_(ours, theirs, 1 - min(self.rate, (1 + n) / (10 + n)))
        else:
            torch._foreach_copy_(ours, theirs)
        self.n_averaged += 1


def averaged(network: nn.Module, rate: float) -> AveragedModel:
    """Return an average with decay ``min(rate, (1 + n) / (10 + n))`` after n updates, buffers included.

    The small decay at the start keeps the untrained weights out of the average of a short run. Frozen parameters are
    shared with the network.
    """
    return _Average(frozen_copy(network), rate).requires_grad_(False).eval()


def build_averages(network: nn.Module, rates: Iterable[float]) -> dict[float, AveragedModel]:
    """Return a moving average of a network for each rate."""
    return {rate: averaged(network, rate) for rate in rates}


def trained_state(student: nn.Module, like: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the state of a module without the student's frozen parameters.

    Args:
        like: a copy of ``student`` whose state is returned; None: the student's own.
    """
    # By the student's parameters: those of a copy are all frozen.
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    state = (student if like is None else like).state_dict()
    return {name: value for name, value in state.items() if name not in frozen}


def load_trained(module: nn.Module, student: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what ``trained_state`` returned.

    Raises:
        KeyError: if it is the state of another network.
    """
    expected = trained_state(student).keys()
    if state.keys() != expected:
        # A few names identify the difference; a network has hundreds.
        raise KeyError(", ".join(sorted(state.keys() ^ expected)[:4]))
    # Not strict, because frozen parameters are missing; the names were compared above.
    module.load_state_dict(placed_like(state, module.state_dict()), strict=False)
