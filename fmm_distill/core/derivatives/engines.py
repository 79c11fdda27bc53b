"""Derivatives of the mean velocity ``u(x, t, r)``, by one of two engines: ``exact`` or ``central``.

Pass ``detached=True``, or call under ``torch.no_grad``, for a derivative without a gradient. Detaching it afterwards
holds the graph of the tangent in memory until the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import torch

from fmm_distill.core.derivatives.central import Central
from fmm_distill.core.derivatives.exact import Exact
from fmm_distill.core.derivatives.map_call import MapCall
from fmm_distill.core.time_axis import expand
from fmm_distill.errors import first_line

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap

__all__ = [
    "ENGINES",
    "DerivativeEngine",
    "EngineName",
    "choose_engine",
    "derivative_along_flow",
    "derivative_in_r",
    "value_and_derivative_along_flow",
    "value_and_derivative_in_r",
    "value_and_parts_along_flow",
]

EngineName = Literal["exact", "central"]


class DerivativeEngine(Protocol):
    """A way to differentiate a flow map. Every method returns the value u first."""

    def needs_value_call(self, flow_map: FlowMap, like: Tensor) -> bool:
        """Return whether a value with a graph needs a call of its own next to a detached derivative."""
        ...

    def by_length(self, call: MapCall, *, detached: bool = False) -> tuple[Tensor, Tensor]:
        """Return u and its derivative in the length of the jump."""
        ...

    def along_flow(self, call: MapCall, v: Tensor, *, detached: bool = False) -> tuple[Tensor, Tensor]:
        """Return u and its derivative along the flow with velocity v, r fixed."""
        ...

    def parts_along_flow(self, call: MapCall, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return u, ``d_t u``, and ``grad u . v`` without a graph."""
        ...


ENGINES: dict[EngineName, DerivativeEngine] = {"exact": Exact(), "central": Central()}


def derivative_in_r(
    flow_map: FlowMap,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    engine: EngineName = "exact",
) -> Float[Tensor, "batch *event"]:
    """Return the derivative of ``u(x, t, r)`` in the target time r; see ``value_and_derivative_in_r``."""
    return value_and_derivative_in_r(flow_map, x, t, r, cond=cond, engine=engine)[1]


def value_and_derivative_in_r(
    flow_map: FlowMap,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    engine: EngineName = "exact",
    detached: bool = False,
) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch *event"]]:
    """Return ``u(x, t, r)`` and its derivative in the target time r, both of shape ``[batch, *event]``.

    The network is differentiated in the length h of the jump, and the result multiplied by dh/dr. Only the slow
    embedding of h depends on r, where differences are accurate enough; the schedule itself is steep near its ends.

    Args:
        detached: the derivative has no gradient. See ``Central`` for the gradient of the value that its engine returns.
            Where the engine needs it (``needs_value_call``), the value has a call of its own.
    """
    method, call = ENGINES[engine], MapCall(flow_map, x, t, r, cond)
    # dh/dr, since h = warp(t) - warp(r).
    slope = -expand(flow_map.clock.dwarp_dt(r), x)
    if detached and method.needs_value_call(flow_map, x):
        with torch.no_grad():
            du_dh = method.by_length(call)[1]
        return call.value(), slope * du_dh
    u, du_dh = method.by_length(call, detached=detached)
    return u, slope * du_dh


def derivative_along_flow(
    flow_map: FlowMap,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    v: Float[Tensor, "batch *event"],
    *,
    cond: Conditioning | None = None,
    engine: EngineName = "exact",
) -> Float[Tensor, "batch *event"]:
    """Return the derivative of ``u(x, t, r)`` along the flow; see ``value_and_derivative_along_flow``."""
    return value_and_derivative_along_flow(flow_map, x, t, r, v, cond=cond, engine=engine)[1]


def value_and_derivative_along_flow(  # noqa: PLR0913 a jump, its velocity and the engine
    flow_map: FlowMap,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    v: Float[Tensor, "batch *event"],
    *,
    cond: Conditioning | None = None,
    engine: EngineName = "exact",
    detached: bool = False,
) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch *event"]]:
    """Return ``u(x, t, r)`` and its derivative ``d_t u + grad u . v`` along the flow with velocity v, r fixed.

    Args:
        detached: the derivative has no gradient, as in ``value_and_derivative_in_r``.
    """
    method, call = ENGINES[engine], MapCall(flow_map, x, t, r, cond)
    if detached and method.needs_value_call(flow_map, x):
        with torch.no_grad():
            du = method.along_flow(call, v)[1]
        return call.value(), du
    return method.along_flow(call, v, detached=detached)


def value_and_parts_along_flow(
    flow_map: FlowMap,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    v: Float[Tensor, "batch *event"],
    *,
    cond: Conditioning | None = None,
    engine: EngineName = "exact",
) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch *event"], Float[Tensor, "batch *event"]]:
    """Return ``u(x, t, r)``, ``d_t u``, and ``grad u . v``; the last has no graph."""
    return ENGINES[engine].parts_along_flow(MapCall(flow_map, x, t, r, cond), v)


def choose_engine(
    flow_map: FlowMap,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    cond: Conditioning | None = None,
    *,
    with_gradient: bool = True,
) -> tuple[EngineName, str]:
    """Return ``exact`` if forward mode runs through this map, else ``central``; and the reason.

    The parameters of the map have gradients afterwards.

    Args:
        with_gradient: the derivative has to have a gradient; else the value alone.
    """
    detached = not with_gradient
    try:
        # Any direction along the flow will do: x has the right shape.
        found = [
            *value_and_derivative_in_r(flow_map, x, t, r, cond=cond, detached=detached),
            *value_and_derivative_along_flow(flow_map, x, t, r, x, cond=cond, detached=detached),
        ]
        # Some of torch's tangents fail only in their backward pass.
        loss = torch.stack([part.square().sum() for part in found]).sum()
        if loss.requires_grad:
            loss.backward()
    except torch.OutOfMemoryError:
        # Too little memory is no reason against forward mode.
        raise
    # torch and the networks raise any of these for an operation without a forward-mode rule.
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return "central", f"forward mode does not run through this network ({first_line(error)})"
    return "exact", "forward mode runs through this network"
