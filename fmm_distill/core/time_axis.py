"""The time axis: t = 1 is noise, t = 0 is data, ``x_t = (1 - t) x_0 + t eps``, ``v = E[eps - x_0 | x_t]``.

Every Gaussian path ``x = alpha x_0 + sigma eps`` is this path up to a change of variables,
``t = sigma / (alpha + sigma)`` and ``x_t = x / (alpha + sigma)``. The rest of the package uses this axis alone. In the
papers on flow map matching time has the opposite direction; ``docs/time-axis.md`` has the translation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["PREDICTIONS", "Clock", "LinearClock", "Prediction", "TimeAxis", "expand", "velocity_from_prediction"]

Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "score"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def expand(times: Float[Tensor, " batch"], like: Float[Tensor, "batch *event"]) -> Tensor:
    """Return the times with shape ``[batch, 1, ..., 1]`` and the dtype of ``like``, to multiply it sample by sample."""
    # The cast comes last: callers subtract times in float64, where float32 would lose digits near t_max.
    return times.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def velocity_from_prediction(
    prediction: Prediction,
    output: Float[Tensor, "batch *event"],
    x: Float[Tensor, "batch *event"],
    alpha: Float[Tensor, " batch"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *event"]:
    """Return ``v = eps_hat - x0_hat`` from a network's output at x, shape ``[batch, *event]``.

    - ``epsilon``: the noise; its errors are amplified by 1 / alpha.
    - ``sample``: the data; its errors are amplified by 1 / sigma.
    - ``v_prediction``: ``alpha eps - sigma x_0`` with ``alpha^2 + sigma^2 = 1`` (Salimans and Ho 2022,
      arXiv 2202.00512, appendix D).
    - ``flow_prediction``: the velocity itself, for ``alpha + sigma = 1``.
    - ``score``: the gradient of the log density, ``-eps_hat / sigma``.

    Args:
        x: ``alpha x_0 + sigma eps``, in the teacher's coordinates.
    """
    if prediction == "flow_prediction":
        return output
    a, s = expand(alpha, x), expand(sigma, x)
    if prediction == "score":
        # x = a x_0 + s eps: one of the two is predicted, the other is solved for, and both are inserted in eps - x_0.
        return (-(a + s) * s * output - x) / a
    if prediction == "epsilon":
        return ((a + s) * output - x) / a
    if prediction == "sample":
        return (x - a * output) / s - output
    # eps_hat = s x + a v and x0_hat = a x - s v, because a^2 + s^2 = 1: no division, so errors are not amplified.
    return (a + s) * output - (a - s) * x


class Clock(Protocol):
    """The variable in which a flow map measures the length of a jump, ``h = warp(t) - warp(r)``."""

    def warp(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return a smooth increasing function of t that changes by about 1 from t_min to t_max."""
        ...

    def dwarp_dt(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the derivative of ``warp`` in t."""
        ...


class TimeAxis(Clock, Protocol):
    """A clock with ends: the interval of times on which a teacher is trained."""

    t_min: float
    t_max: float

    def time_at(self, progress: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the time at a progress from 0 (t_min) to 1 (t_max), in equal steps of the teacher's own count."""
        ...


class LinearClock:
    """The time axis of closed-form maps and of flow models without shift: ``warp(t) = t`` on [t_min, t_max]."""

    def __init__(self, t_min: float = 0.0, t_max: float = 1.0) -> None:
        self.t_min, self.t_max = t_min, t_max

    def time_at(self, progress: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return ``t_min + (t_max - t_min) progress``."""
        return self.t_min + (self.t_max - self.t_min) * progress

    def warp(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return t."""
        return t

    def dwarp_dt(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return ones."""
        return torch.ones_like(t)
