"""Rollouts: jumps of the student from noise to clean samples, with the gradient that distribution matching needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import AfterValidator, Field

from fmm_distill.losses.settings import Settings

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap

__all__ = ["Rollout"]


def _sorted(steps: tuple[int, ...]) -> tuple[int, ...]:
    """Return numbers of steps in order; each must be given once, as twice would be a weight that is not visible."""
    twice = sorted({number for number in steps if steps.count(number) > 1})
    if twice:
        raise ValueError(f"expected each number of steps once, not {', '.join(map(str, twice))} twice")
    return tuple(sorted(steps))


class Rollout(Settings):
    """Jumps of the student from noise to the samples that are matched.

    For each training step a number of steps N is drawn from ``steps``, then a point k of the grid of N steps. The
    samples are reached in one jump from noise to point k and one from there to the end of the grid (``gradient:
    last``), or with a single step of the grid, from point k to point k + 1, in between (``gradient: all``, AnyFlow,
    arXiv 2605.13724): at most two or three network calls whatever N is. The map is trained to make the same of one jump
    as of the steps that it replaces, so the samples have the distribution of those of N steps.

    The samples are always at the end of the grid, never at the point that a random step reaches: that one is still
    noisy, and a matching loss would take its noise for a part of the data.
    """

    steps: Annotated[
        tuple[Annotated[int, Field(ge=1, le=100_000)], ...], Field(min_length=1, max_length=64), AfterValidator(_sorted)
    ] = (1, 2, 4, 8)
    """Numbers of steps, one of which is drawn for each training step; each once."""
    gradient: Literal["last", "all"] = "last"
    """Jumps with gradient: the last alone, from a point of the grid to its end, or all of them, one more of which is a
    step of the grid."""

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
        """Return clean samples, at ``grid[-1]``, with the gradient of the jumps that ``gradient`` names.

        Args:
            flow_map: the student. A scaled student whose jumps of one batch have equal lengths can form its weights
                once per jump: the caller announces that.
            x: noise at ``grid[0]``.
            grid: falling times of the N + 1 points, float64, from t_max to the end of sampling.
            k: point of the grid from 0 to N - 1, as ``draw`` returns it.
            cond: what the student is conditioned on.
        """
        if not 0 <= k < len(grid) - 1:
            raise ValueError(f"expected a point of the grid from 0 to {len(grid) - 2}, got {k}")
        t = [time.expand(len(x)) for time in grid]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient == "all"):
            if k > 0:
                x = flow_map(x, t[0], t[k], cond)
        # From the last point on, a step of the grid is the jump to its end.
        if self.gradient == "all" and k < len(t) - 2:
            x = flow_map(x, t[k], t[k + 1], cond)
            k += 1
        return flow_map(x, t[k], t[-1], cond)
