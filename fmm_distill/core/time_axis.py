"""The time axis: t = 1 is noise, t = 0 is data, ``x_t = (1 - t) x_0 + t eps``, ``v = E[eps - x_0 | x_t]``.

Every Gaussian path is brought here exactly: with a teacher's own ``x = alpha x_0 + sigma eps``,
``t = sigma / (alpha + sigma)`` and ``x_t = x / (alpha + sigma)``. Nothing after this file knows another axis.
The papers on flow map matching run the other way; ``docs/time-axis.md`` has the translation.
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
    """``times`` with trailing ones and the dtype of ``like``, to multiply it sample by sample."""
    return times.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def velocity_from_prediction(
    prediction: Prediction,
    output: Float[Tensor, "batch *event"],
    x: Float[Tensor, "batch *event"],
    alpha: Float[Tensor, " batch"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *event"]:
    """``v = eps_hat - x0_hat`` from a network's output at ``x = alpha x_0 + sigma eps`` (teacher's coordinates).

    ``v_prediction`` is ``alpha eps - sigma x_0`` with ``alpha^2 + sigma^2 = 1`` (Salimans and Ho 2022,
    arXiv 2202.00512, appendix D), ``flow_prediction`` the velocity where alpha + sigma = 1, ``score`` the gradient
    of the log density, ``-eps_hat / sigma``. ``epsilon`` is amplified by 1/alpha, ``sample`` by 1/sigma.
    """
    if prediction == "flow_prediction":
        return output
    a, s = expand(alpha, x), expand(sigma, x)
    if prediction == "score":
        return (-(a + s) * s * output - x) / a
    if prediction == "epsilon":
        return ((a + s) * output - x) / a
    if prediction == "sample":
        return (x - a * output) / s - output
    return (a + s) * output - (a - s) * x


class Clock(Protocol):
    """How a flow map measures the length of a jump: ``h = position(t) - position(r)``."""

    def warp(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """A smooth increasing function of t, of order one over the whole axis."""
        ...

    def dwarp_dt(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The derivative of ``warp``."""
        ...


class TimeAxis(Clock, Protocol):
    """A clock with ends: the stretch of time that a teacher is trained on."""

    t_min: float
    t_max: float

    def time_at(self, share: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time at a share of the way from t_min to t_max, equal steps of the teacher's own count."""
        ...


class LinearClock:
    """``position(t) = t``: closed-form maps and flow models without shift, on the stretch [t_min, t_max]."""

    def __init__(self, t_min: float = 0.0, t_max: float = 1.0) -> None:
        self.t_min, self.t_max = t_min, t_max

    def time_at(self, share: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time at a share of the way from t_min to t_max."""
        return self.t_min + (self.t_max - self.t_min) * share

    def warp(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time itself."""
        return t

    def dwarp_dt(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """One."""
        return torch.ones_like(t)
