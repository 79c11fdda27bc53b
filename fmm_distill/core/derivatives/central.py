"""Derivatives of the mean velocity by central differences, for networks without forward mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fmm_distill.core.derivatives.precision import full_precision, without_tensor_float
from fmm_distill.core.time_axis import expand

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.derivatives.map_call import MapCall
    from fmm_distill.core.flow_map import FlowMap

__all__ = ["JUMP_STEP", "POSITION_STEP", "TIME_STEP", "Central"]

# In units of the clock. The embedding of h has frequencies of at most 10, so that this step is far above the rounding
# of float32 and far below a period.
JUMP_STEP = 2e-3
# In units of the clock: 0.05 of 1000 timesteps. The teacher's own embedding turns by one radian per timestep: a longer
# step aliases, a shorter one drowns in the float32 in which diffusers computes the embedding. On trained networks both
# twice and half of this step are further from the exact derivative.
TIME_STEP = 5e-5
# A step along the velocity in x alone, in units of t. No embedding turns with x: of the steps tried in float32, this is
# the nearest to the exact derivative.
POSITION_STEP = 1e-3


class Central:
    """The engine of central differences: two calls for a value and its derivative.

    With a graph, the two calls are one call with twice the samples. The value is the mean of both, which is as near to
    u as the difference is to the derivative.

    A detached derivative has a graph in its second call only. The gradient of the value is then that of the second
    call: of a jump longer by ``JUMP_STEP``, or of a start later by ``TIME_STEP``.
    """

    def needs_value_call(self, flow_map: FlowMap, like: Tensor) -> bool:
        """Return whether a value needs a call of its own next to a detached derivative: under autocast it does."""
        return torch.is_autocast_enabled(like.device.type)

    def by_length(self, call: MapCall, *, detached: bool = False) -> tuple[Tensor, Tensor]:
        """Return u and ``du/dh``, within 1e-3 of the exact derivative in float32."""
        h = call.length
        pair = _Pair(
            call.flow_map.mean_velocity_of_jump, lambda side: (call.x, call.t, h + side * JUMP_STEP), call.cond
        )
        u, difference = pair.mean_and_difference(call.x, detached=detached)
        return u, difference / JUMP_STEP

    def along_flow(self, call: MapCall, v: Tensor, *, detached: bool = False) -> tuple[Tensor, Tensor]:
        """Return u and ``d_t u + grad u . v``, within 1 % of the exact derivative in float32."""
        pair, step = _starts_around(call, v)
        u, difference = pair.mean_and_difference(call.x, detached=detached)
        return u, difference / step

    def parts_along_flow(self, call: MapCall, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return u, ``d_t u``, and ``grad u . v`` without a graph.

        The last part takes a third call, moved in x by ``POSITION_STEP`` to one side. On two trained networks it is
        within 1e-3 of the exact part.
        """
        still = torch.zeros_like(call.x)
        pair, step = _starts_around(call, still)
        position_step = POSITION_STEP / TIME_STEP * step
        # Before the calls with a graph: the memory of this call is free again by then.
        with torch.no_grad(), full_precision(call.x), without_tensor_float():
            moved = _starts_around(call._replace(x=call.x + position_step * v), still)[0].at_side(1)
        u, difference = pair.mean_and_difference(call.x)
        # u + difference is the value of side 1, where ``moved`` starts.
        return u, difference / step, (moved - (u + difference).detach()) / position_step


class _Pair(NamedTuple):
    """Two calls of a map, on sides -1 and 1 of a point.

    Attributes:
        function: the map, of three tensors with one row per sample, and a condition.
        arguments: the three tensors of a side.
    """

    function: Callable[..., Tensor]
    arguments: Callable[[int], tuple[Tensor, Tensor, Tensor]]
    cond: Conditioning | None

    def at_side(self, side: int) -> Tensor:
        """Return the value of one side."""
        return self.function(*self.arguments(side), self.cond)

    def at_both_sides(self) -> tuple[Tensor, Tensor]:
        """Return the values of both sides from one call.

        Its backward pass computes one gradient per weight, where two calls compute two and add them.
        """
        # The order of ``torch.cat`` below: all samples of one side, then all of the other.
        cond = None if self.cond is None else self.cond.twice()
        arguments = map(torch.cat, zip(self.arguments(-1), self.arguments(1), strict=True))
        before, after = self.function(*arguments, cond).chunk(2)
        return before, after

    def mean_and_difference(self, like: Tensor, *, detached: bool = False) -> tuple[Tensor, Tensor]:
        """Return half of the sum and half of the difference of both sides, in float32 at least.

        Args:
            like: a tensor on the device of the map.
            detached: the difference has no gradient, and the mean has the gradient of side 1.
        """
        with full_precision(like), without_tensor_float():
            if torch.is_grad_enabled() and not detached:
                before, after = self.at_both_sides()
            else:
                # The side without a graph first: its activations are free again before the graph grows.
                with torch.no_grad():
                    before = self.at_side(-1)
                after = self.at_side(1)
        difference = (after - before) / 2
        if detached:
            difference = difference.detach()
        # (before + after) / 2, written so that a detached difference leaves the graph of ``after`` alone.
        return after - difference, difference


def _starts_around(call: MapCall, v: Tensor) -> tuple[_Pair, Tensor]:
    """Return the calls of a step before and after the start, along v; and the step, shaped as a divisor of u."""
    # The same step in timesteps at every t: the teacher's embedding oscillates in timesteps, not in t.
    step = TIME_STEP / call.flow_map.clock.dwarp_dt(call.t)
    # A schedule ends at t_max: there the difference is that of the point one step earlier.
    shift = torch.minimum(call.flow_map.t_max - step - call.t, torch.zeros_like(call.t))

    def arguments(side: int) -> tuple[Tensor, Tensor, Tensor]:
        change = shift + side * step
        return call.x + expand(change, call.x) * v, call.t + change, call.r

    return _Pair(call.flow_map.mean_velocity, arguments, call.cond), expand(step, call.x)
