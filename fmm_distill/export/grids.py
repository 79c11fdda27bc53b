"""The time grids that a stock pipeline sets on the scheduler of a flow model, from as few runs of it as possible."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fmm_distill.teachers.recording import Recording

__all__ = ["StockGrids"]

# The attributes of a flow scheduler that set_timesteps reads; a pipeline may change them before it calls it.
_READ = ("sigma_min", "sigma_max", "_shift")
# Of the arguments that pipelines derive from the number of steps; an unknown form costs one run per number of steps.
_FORMS: Mapping[str, Callable[[int], Any]] = MappingProxyType(
    {
        "number of steps": lambda steps: steps,
        "down to the last step": lambda steps: np.linspace(1.0, 1 / steps, steps),
        "down to zero": lambda steps: np.linspace(1.0, 0.0, steps + 1)[:-1],
    }
)


@dataclass(frozen=True)
class _Grid:
    """The way in which a pipeline sets the grid of a number of steps: attributes of the scheduler, then calls."""

    steps: int
    attributes: dict[str, Any]
    calls: list[dict[str, Any]]

    def sigmas(self, scheduler: Any) -> torch.Tensor:  # noqa: ANN401 a diffusers class
        """Return the levels that a copy of the scheduler has after these calls."""
        # A shallow copy: ``set_timesteps`` assigns new tensors and changes none in place.
        replayed = copy.copy(scheduler)
        vars(replayed).update(self.attributes)
        for call in self.calls:
            replayed.set_timesteps(**call)
        levels: torch.Tensor = replayed.sigmas.double().cpu()
        return levels

    def at(self, other: _Grid, steps: int) -> _Grid | None:
        """Return the grid of another number of steps; None where this one and ``other`` don't determine it."""
        shapes = [[call.keys() for call in grid.calls] for grid in (self, other)]
        if shapes[0] != shapes[1] or repr(self.attributes) != repr(other.attributes):
            return None
        calls = []
        for one, two in zip(self.calls, other.calls, strict=True):
            values = {key: _at((one[key], self.steps), (two[key], other.steps), steps) for key in one}
            if any(len(found) != 1 for found in values.values()):
                return None
            calls.append({key: found[0] for key, found in values.items()})
        return _Grid(steps, self.attributes, calls)


def _at(one: tuple[Any, int], two: tuple[Any, int], steps: int) -> list[Any]:
    """The different values of an argument at ``steps`` that its values at two other numbers of steps allow."""
    found = [form(steps) for form in _FORMS.values() if all(_same(value, form(n)) for value, n in (one, two))]
    found += [one[0]] if _same(one[0], two[0]) else []
    return [value for i, value in enumerate(found) if not any(_same(value, earlier) for earlier in found[:i])]


def _same(one: Any, other: Any) -> bool:  # noqa: ANN401 an argument of set_timesteps
    if one is None or other is None or isinstance(one, str | torch.device) or isinstance(other, str | torch.device):
        return type(one) is type(other) and str(one) == str(other)
    # Numbers, lists and arrays of equal values are one form of an argument.
    return np.array_equal(np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64))


class StockGrids:
    """The grids of one stock pipeline.

    A run of the pipeline embeds its prompts, which takes minutes with large text encoders. What the pipeline passes to
    ``set_timesteps`` is recorded and repeated on other schedulers. Two runs determine it for every number of steps,
    unless the pipeline derives it in a way that is not known here: then there is one run per number of steps.

    Args:
        run: runs the pipeline with a scheduler and a number of steps, up to the network's first call.
    """

    def __init__(self, run: Callable[[Any, int], Recording]) -> None:
        self.run = run
        self._runs: dict[int, _Grid] = {}
        # Pipelines that change the levels after set_timesteps are run with each scheduler.
        self._repeatable = True

    def sigmas(self, scheduler: Any, steps: int) -> torch.Tensor:  # noqa: ANN401 a diffusers class
        """Return the levels that the pipeline sets on ``scheduler``, data at the end; the scheduler is not changed.

        All schedulers that are passed have to be of one class, and equal in the settings that pipelines read.
        """
        if self._repeatable and (grid := self._known(steps)) is not None:
            return grid.sigmas(scheduler)
        used = copy.copy(scheduler)
        before = {name: getattr(used, name) for name in _READ}
        seen = self.run(used, steps)
        levels: torch.Tensor = used.sigmas.double().cpu()
        after = {name: getattr(used, name) for name in _READ}
        changed = {name: value for name, value in after.items() if value is not before[name]}
        grid = _Grid(steps, changed, seen.grids)
        # To the last bit: the replay runs the same code on the same arguments.
        if torch.equal(grid.sigmas(scheduler), levels):
            self._runs[steps] = grid
        else:
            self._repeatable = False
        return levels

    def _known(self, steps: int) -> _Grid | None:
        if steps in self._runs or len(self._runs) < 2:
            return self._runs.get(steps)
        # Two runs tell an argument that depends on the number of steps from a constant.
        one, two = list(self._runs.values())[:2]
        return one.at(two, steps)
