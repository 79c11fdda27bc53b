"""Derivatives of the mean velocity by forward mode, accurate to rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fmm_distill.core.derivatives.forward_mode import jvp

if TYPE_CHECKING:
    from torch import Tensor

    from fmm_distill.core.derivatives.map_call import MapCall
    from fmm_distill.core.flow_map import FlowMap

__all__ = ["Exact"]


class Exact:
    """The forward-mode engine: one pass for a value and its derivative."""

    def needs_value_call(self, flow_map: FlowMap, like: Tensor) -> bool:
        """Return whether a value with a graph needs a call of its own next to a detached derivative.

        It does under autocast, since derivatives stay in float32, and where a call with a graph installs hooks that
        have no forward-mode rule.
        """
        return torch.is_autocast_enabled(like.device.type) or flow_map.needs_functional_jvp

    def by_length(self, call: MapCall, *, detached: bool = False) -> tuple[Tensor, Tensor]:
        """Return u and ``du/dh``."""
        h = call.length
        functional = call.flow_map.needs_functional_jvp
        return jvp(call.by_length, (h,), (torch.ones_like(h),), detached=detached, functional=functional)

    def along_flow(self, call: MapCall, v: Tensor, *, detached: bool = False) -> tuple[Tensor, Tensor]:
        """Return u and ``d_t u + grad u . v``."""
        # One pass for both variables: the tangents (v, 1) are the direction of the flow.
        primals, tangents = (call.x, call.t), (v, torch.ones_like(call.t))
        return jvp(call.by_start, primals, tangents, detached=detached, functional=call.flow_map.needs_functional_jvp)

    def parts_along_flow(self, call: MapCall, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return u, ``d_t u``, and ``grad u . v`` without a graph."""
        # Before the pass with a graph: the memory of this one is free again by then.
        with torch.no_grad():
            transport = jvp(lambda x: call.by_start(x, call.t), (call.x,), (v,))[1]
        tangents, functional = (torch.ones_like(call.t),), call.flow_map.needs_functional_jvp
        u, du_dt = jvp(lambda t: call.by_start(call.x, t), (call.t,), tangents, functional=functional)
        return u, du_dt, transport
