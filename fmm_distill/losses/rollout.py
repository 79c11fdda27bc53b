"""Rollouts: jumps of the student from noise to clean samples, with the gradient that distribution matching needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from fmm_distill.losses.settings import Settings

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap

__all__ = ["Rollout"]


class Rollout(Settings):
    """How the student makes the samples that are matched: always clean ones, at the end of jumps from noise to data."""

    steps: Annotated[tuple[int, ...], Field(min_length=1, max_length=64)] = (1, 2, 4, 8)
    """Numbers of steps, one of which is drawn for each training step."""
    gradient: Literal["last", "all"] = "last"
    """Jumps with gradient: the last, from a point of the grid to data, or all three, of which the second is a step."""

    def draw(self, generator: torch.Generator) -> tuple[int, int]:
        """Return a number of steps N from the list and a point k of its grid, from 0 (noise) to N - 1."""
        steps = self.steps[int(torch.randint(len(self.steps), (), generator=generator))]
        return steps, int(torch.randint(steps, (), generator=generator))

    def __call__(
        self,
        flow_map: FlowMap,
        x: Float[Tensor, "batch *event"],
        grid: Float[Tensor, " points"],
        k: int,
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """Return clean samples from noise x at ``grid[0]``, with the gradient of the jumps that ``gradient`` names."""
        t = [time.expand(len(x)) for time in grid]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient == "all"):
            if k > 0:
                x = flow_map(x, t[0], t[k], cond)
        if self.gradient == "all" and k < len(t) - 2:
            x = flow_map(x, t[k], t[k + 1], cond)
            k += 1
        return flow_map(x, t[k], t[-1], cond)
