"""The time axis: t = 1 is noise, t = 0 is data, ``x_t = (1 - t) x_0 + t eps``, ``v = E[eps - x_0 | x_t]``.

Every variance-preserving teacher is brought here exactly: with its own ``x = alpha x_0 + sigma eps``,
``t = sigma / (alpha + sigma)`` and ``x_t = x / (alpha + sigma)``. Nothing after this file knows another axis.
The papers on flow map matching run the other way; ``docs/time-axis.md`` has the translation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["Clock", "LinearClock", "Prediction", "Schedule", "TimeAxis", "expand", "velocity_from_prediction"]

Prediction = Literal["epsilon", "sample", "v_prediction"]
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
    arXiv 2202.00512, appendix D). ``epsilon`` is amplified by 1/alpha, ``sample`` by 1/sigma.
    """
    a, s = expand(alpha, x), expand(sigma, x)
    if prediction == "epsilon":
        return ((a + s) * output - x) / a
    if prediction == "sample":
        return (x - a * output) / s - output
    return (a + s) * output - (a - s) * x


class Clock(Protocol):
    """How a flow map measures the length of a jump: ``h = position(t) - position(r)``."""

    def position(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """A smooth increasing function of t, of order one over the whole axis."""
        ...

    def rate(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The derivative of ``position``."""
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

    def position(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time itself."""
        return t

    def rate(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """One."""
        return torch.ones_like(t)


class Schedule:
    """A discrete variance-preserving schedule on the time axis, continuous in t.

    Timesteps 0 .. N - 1 stand at ``t_k = sigma_k / (alpha_k + sigma_k)``, data at timestep -1 and t = 0, where
    the stock DDIM sampler's last step ends. Between them the timestep is the monotone cubic interpolant of
    Fritsch and Butland (SIAM J. Sci. Stat. Comput. 5, 1984) in t: once differentiable, finite down to data,
    where an interpolant in log-SNR is not. alpha and sigma need no interpolation: they are functions of t.

    Args:
        alphas_cumprod: ``alpha_k^2``, shape ``[N]``, strictly decreasing, in (0, 1); the last may be 0 (zero terminal
            SNR, Lin et al. 2023, arXiv 2305.08891).

    Raises:
        UserError: on a schedule that does not decrease, or leaves (0, 1) before its end.
    """

    def __init__(self, alphas_cumprod: Float[Tensor, " timesteps"]) -> None:
        products = alphas_cumprod.detach().double().cpu()
        decreasing = bool((products[1:] < products[:-1]).all())
        if not (decreasing and len(products) >= 2 and products[0] < 1 and products[-1] >= 0):
            raise UserError(
                f"the scheduler's alphas_cumprod run from {products[0]:.3g} to {products[-1]:.3g}; wanted at least two "
                "numbers between 1 and 0 that decrease: check the scheduler's betas"
            )
        alpha, sigma = products.sqrt(), (1 - products).sqrt()
        self.num_timesteps = len(products)
        self._times = torch.cat([torch.zeros(1, dtype=torch.float64), sigma / (alpha + sigma)])
        self._slopes = _monotone_slopes(self._times)
        self.t_min = float(self._times[1])
        self.t_max = float(self._times[-1])

    def time(self, timestep: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """t of whole timesteps from -1 (data) to N - 1, in float64."""
        return self._times.to(timestep.device)[timestep + 1]

    def time_at(self, share: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time at a share of the way from the first timestep to the last, linear between timesteps."""
        place = share * (self.num_timesteps - 1)
        below: Int[Tensor, " batch"] = place.long().clamp_max(self.num_timesteps - 2)
        return torch.lerp(self.time(below), self.time(below + 1), place - below)

    def timestep(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The timestep at t in [0, t_max], from -1 to N - 1; exact at the schedule's own times."""
        t = t.double()
        times, slopes = self._times.to(t.device), self._slopes.to(t.device)
        # The interval is a piecewise constant of t: it carries no derivative, in forward mode either.
        index = torch.searchsorted(times, t.detach().contiguous(), right=True).clamp(1, self.num_timesteps) - 1
        width = times[index + 1] - times[index]
        s = (t - times[index]) / width
        cubic = (slopes[index] + slopes[index + 1]) * width - 2
        square = 3 - (2 * slopes[index] + slopes[index + 1]) * width
        return index - 1 + s * (slopes[index] * width + s * (square + s * cubic))

    def position(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The timestep as a share of their number: jumps are measured in it."""
        return self.timestep(t) / self.num_timesteps

    def rate(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The derivative of ``position`` in t."""
        return torch.func.jvp(self.position, (t.double(),), (torch.ones_like(t.double()),))[1]

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """The teacher's alpha and sigma at t in [0, t_max], with alpha^2 + sigma^2 = 1."""
        t = t.double()
        norm = ((1 - t).square() + t.square()).sqrt()
        return (1 - t) / norm, t / norm

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """``alpha + sigma``: the teacher's coordinates are those of the axis times this."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha + sigma


def _monotone_slopes(times: Float[Tensor, " knots"]) -> Float[Tensor, " knots"]:
    """Slopes at the knots that keep the cubic Hermite interpolant of 0, 1, 2, ... over ``times`` monotone.

    Weighted harmonic means inside (Fritsch and Butland 1984), the secant at both ends.
    """
    widths = times.diff()
    secants = 1 / widths
    left, right = 2 * widths[1:] + widths[:-1], widths[1:] + 2 * widths[:-1]
    inner = (left + right) / (left / secants[:-1] + right / secants[1:])
    return torch.cat([secants[:1], inner, secants[-1:]])
