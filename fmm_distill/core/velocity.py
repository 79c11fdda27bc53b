"""The interface of a velocity field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning

__all__ = ["VelocityField"]


class VelocityField(Protocol):
    """``v(x, t) = E[eps - x_0 | x_t = x]`` on the time axis of ``core.time_axis``, for t in ``[t_min, t_max]``."""

    def __call__(
        self, x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """Return the velocity at x and t, shape ``[batch, *event]``."""
        ...
