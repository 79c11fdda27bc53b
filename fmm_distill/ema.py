"""Moving averages of a student's weights: one of them is evaluated and exported."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fmm_distill.sharding import local, placed_like

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Tensors = tuple[Tensor, ...] | list[Tensor]

__all__ = ["averaged", "frozen_copy", "load_trained", "trained_state"]

Network = TypeVar("Network", bound=nn.Module)


def frozen_copy(network: Network, *, share: bool = True) -> Network:
    """A copy in evaluation mode that is not trained.

    Args:
        share: parameters that ``network`` does not train are its own, so that a student with adapters and all its
            copies hold the large weights once.
    """
    shared = {id(parameter): parameter for parameter in network.parameters() if share and not parameter.requires_grad}
    return copy.deepcopy(network, shared).requires_grad_(False).eval()


def averaged(network: nn.Module, rate: float, *, share: bool = True) -> AveragedModel:
    """Torch's averaged model with rate ``min(rate, (1 + n) / (10 + n))`` after n updates, buffers included.

    The short start keeps the untrained weights out of the average of a short run.

    Args:
        share: tensors that are not trained are the network's own: one copy of them in memory.
    """
    # It would copy the whole network, untrained weights too.
    average = AveragedModel(nn.Identity(), multi_avg_fn=_update(rate), use_buffers=True)
    average.module = frozen_copy(network, share=share)
    return average.requires_grad_(False).eval()


def _update(rate: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    @torch.no_grad()
    def update(average: Tensors, current: Tensors, updates: Tensor | int) -> None:
        n = int(updates)
        # Of tensors that are split over processes each averages its part.
        ours, theirs = [local(tensor) for tensor in average], [local(tensor) for tensor in current]
        torch._foreach_lerp_(ours, theirs, 1 - min(rate, (1 + n) / (10 + n)))

    return update


def trained_state(student: nn.Module, like: nn.Module | None = None) -> dict[str, Tensor]:
    """What training changes of a module's state: all but the frozen parameters.

    Args:
        like: a copy of ``student`` whose state is meant; none: the student's own.
    """
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    state = (student if like is None else like).state_dict()
    return {name: value for name, value in state.items() if name not in frozen}


def load_trained(module: nn.Module, student: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what ``trained_state`` gave.

    Raises:
        KeyError: if it is the state of another network.
    """
    wanted = trained_state(student).keys()
    if state.keys() != wanted:
        raise KeyError(", ".join(sorted(state.keys() ^ wanted)[:4]))
    module.load_state_dict(placed_like(state, module.state_dict()), strict=False)
