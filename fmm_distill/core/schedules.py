"""Noise schedules on the time axis: variance preserving, angular, variance exploding, flow matching.

Each says where a teacher's own levels stand in t, what its network is told there, and how long a jump is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from fmm_distill.core.time_axis import TimeAxis
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["Angular", "FlowMatching", "Schedule", "VarianceExploding", "VariancePreserving"]


class Schedule(TimeAxis, Protocol):
    """The noise levels of a diffusers teacher, continuous in t.

    Attributes:
        num_timesteps: into how many timesteps its scheduler divides the way: the most steps that a sampler takes.
    """

    num_timesteps: int

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """What the network is told at t; below t_min what it is told there."""
        ...

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """The teacher's own ``x = alpha x_0 + sigma eps``."""
        ...

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """``alpha + sigma``: the teacher's coordinates are those of the axis times this."""
        ...

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """``steps + 1`` decreasing times, from t_max to data: jumps of one length, as nearly as the schedule has them.

        Raises:
            UserError: if there are more steps than timesteps, or none.
        """
        ...

    def is_uniform(self, steps: int) -> bool:
        """Whether all jumps of ``grid(steps)`` have one length, so that it folds into one bias."""
        ...


def _check_steps(steps: int, timesteps: int) -> None:
    if not 1 <= steps <= timesteps:
        raise UserError(f"{steps} sampling steps; wanted 1 to {timesteps}, the teacher's number of timesteps")


class VariancePreserving:
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
        times = torch.cat([torch.zeros(1, dtype=torch.float64), sigma / (alpha + sigma)])
        self._tables = {times.device: (times, _monotone_slopes(times))}
        self.t_min, self.t_max = float(times[1]), float(times[-1])

    def to(self, device: torch.device | str) -> None:
        """Keep tables there too: fetched at every call, they would make the host wait for a GPU each time."""
        times, slopes = (table.to(device) for table in self._on(torch.device("cpu")))
        self._tables[times.device] = times, slopes

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The times of the timesteps from -1 on, and the interpolant's slopes at them."""
        if device in self._tables:
            return self._tables[device]
        times, slopes = self._tables[torch.device("cpu")]
        return times.to(device), slopes.to(device)

    def time(self, timestep: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """t of whole timesteps from -1 (data) to N - 1, in float64."""
        return self._on(timestep.device)[0][timestep + 1]

    def time_at(self, share: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time at a share of the way from the first timestep to the last, linear between timesteps."""
        place = share * (self.num_timesteps - 1)
        below: Int[Tensor, " batch"] = place.long().clamp_max(self.num_timesteps - 2)
        return torch.lerp(self.time(below), self.time(below + 1), place - below)

    def timestep(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The timestep at t in [0, t_max], from -1 to N - 1; exact at the schedule's own times."""
        t = t.double()
        times, slopes = self._on(t.device)
        # The interval is a piecewise constant of t: it carries no derivative, in forward mode either.
        index = torch.searchsorted(times, t.detach().contiguous(), right=True).clamp(1, self.num_timesteps) - 1
        width = times[index + 1] - times[index]
        s = (t - times[index]) / width
        cubic = (slopes[index] + slopes[index + 1]) * width - 2
        square = 3 - (2 * slopes[index] + slopes[index + 1]) * width
        return index - 1 + s * (slopes[index] * width + s * (square + s * cubic))

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The timestep, 0 below t_min."""
        return self.timestep(t).clamp_min(0)

    def position(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The timestep as a share of their number: jumps are measured in it."""
        return self.timestep(t) / self.num_timesteps

    def rate(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The derivative of ``position`` in t."""
        return torch.func.jvp(self.position, (t.double(),), (torch.ones_like(t.double()),))[1]

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """The teacher's alpha and sigma at t in [0, t_max], with alpha^2 + sigma^2 = 1."""
        return _on_the_circle(t)

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """``alpha + sigma``: the teacher's coordinates are those of the axis times this."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha + sigma

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """The stock DDIM grid with trailing spacing, and data at its end; float64.

        Where ``steps`` does not divide the timesteps, halves are rounded to even; stock rounds some the other way.
        """
        n = self.num_timesteps
        _check_steps(steps, n)
        remaining = torch.arange(steps, -1, -1, dtype=torch.float64) * n / steps
        return self.time(remaining.round().long() - 1)

    def is_uniform(self, steps: int) -> bool:
        """Whether ``steps`` divides the number of timesteps."""
        return self.num_timesteps % steps == 0


class Angular:
    """``alpha = cos(phi)``, ``sigma = sin(phi)`` and a network that is told ``2 phi / pi``, continuous in phi.

    The angle is that of Salimans and Ho 2022 (arXiv 2202.00512, appendix D). Jumps are measured in the s of diffusers'
    ``IPNDMScheduler``, ``sigma = sin(pi s / 2)^2``, so that a grid of equal jumps has its levels; it starts in pure
    noise.

    Args:
        num_timesteps: N; t_min is where the network is told 1 / N. The slope of s is 8 there for N = 1000; at N's own
            first level, s = 1 / N, it is 200, and the derivative in r would be noise.
    """

    t_max = 1.0

    def __init__(self, num_timesteps: int = 1000) -> None:
        if num_timesteps < 2:
            raise UserError(f"the scheduler's num_train_timesteps is {num_timesteps}; wanted at least 2")
        self.num_timesteps = num_timesteps
        tangent = math.tan(math.pi / 2 / num_timesteps)
        self.t_min = tangent / (1 + tangent)
        self._first = float(self.position(torch.tensor(self.t_min, dtype=torch.float64)))

    def _time(self, s: Tensor) -> Tensor:
        sigma = (s * math.pi / 2).sin().square()
        # 1 - sigma^2 would cancel next to noise.
        alpha = (s * math.pi / 2).cos() * (1 + sigma).sqrt()
        return sigma / (alpha + sigma)

    def time_at(self, share: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time at a share of the way from t_min to 1, equal steps of s."""
        return self._time(self._first + (1 - self._first) * share.double()).clamp(self.t_min, self.t_max)

    def position(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The s of the level; it goes as the root of t next to data."""
        alpha, sigma = self.alpha_sigma(t)
        # Of asin(sqrt(sigma)) the derivative in t would be infinity times zero at t = 1.
        return torch.atan2((sigma * (1 + sigma)).sqrt(), alpha) * 2 / math.pi

    def rate(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The derivative of ``position`` in t; below t_min what it is there."""
        t = t.double().clamp_min(self.t_min)
        _, sigma = self.alpha_sigma(t)
        return ((1 + sigma) / sigma).sqrt() / math.pi * self.scale(t).square()

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """``2 phi / pi``, in (0, 1]."""
        t = t.double().clamp_min(self.t_min)
        return torch.atan2(t, 1 - t) * 2 / math.pi

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """The teacher's alpha and sigma, with alpha^2 + sigma^2 = 1."""
        return _on_the_circle(t)

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """``alpha + sigma``."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha + sigma

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """The levels of ``IPNDMScheduler``, equal steps of s, and data at their end."""
        _check_steps(steps, self.num_timesteps)
        return self._time(torch.arange(steps, -1, -1, dtype=torch.float64) / steps)

    def is_uniform(self, steps: int) -> bool:
        """Always."""
        return True


class VarianceExploding:
    """``x = x_0 + sigma eps`` on the time axis: ``t = sigma / (1 + sigma)``.

    Jumps are measured by the share of the way from sigma_min to sigma_max in ``sigma^(1 / rho)`` (Karras et al. 2022,
    arXiv 2206.00364, eq. 5), or in log sigma where rho is infinite. Below sigma_min nothing is longer.

    Args:
        told: what the network is told: sigma itself (Song et al. 2021, arXiv 2011.13456), ``log(sigma) / 4`` (Karras),
            or ``2 atan(sigma) / pi`` (stable audio, arXiv 2404.10301).
    """

    def __init__(
        self,
        sigma_min: float,
        sigma_max: float,
        *,
        rho: float = 7.0,
        told: Literal["sigma", "log", "atan"] = "log",
        num_timesteps: int = 1000,
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise UserError(f"the scheduler's sigmas run from {sigma_min} to {sigma_max}; wanted 0 < min < max")
        self.sigma_min, self.sigma_max, self.rho, self.told = sigma_min, sigma_max, rho, told
        self.num_timesteps = num_timesteps
        self.t_min, self.t_max = sigma_min / (1 + sigma_min), sigma_max / (1 + sigma_max)
        ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64)
        self._low, self._high = self._warp(ends).tolist()

    def _warp(self, sigma: Tensor) -> Tensor:
        return sigma.log() if math.isinf(self.rho) else sigma ** (1 / self.rho)

    def _sigma(self, t: Tensor) -> Tensor:
        """Sigma at t, not below sigma_min."""
        t = t.double().clamp_min(self.t_min)
        return t / (1 - t)

    def time_at(self, share: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time at a share of the way from sigma_min to sigma_max."""
        warped = self._low + (self._high - self._low) * share.double()
        sigma = warped.exp() if math.isinf(self.rho) else warped**self.rho
        return (sigma / (1 + sigma)).clamp(self.t_min, self.t_max)

    def position(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The share of the way."""
        return (self._warp(self._sigma(t)) - self._low) / (self._high - self._low)

    def rate(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The derivative of ``position`` in t; 0 below t_min."""
        sigma = self._sigma(t)
        slope = 1 / sigma if math.isinf(self.rho) else sigma ** (1 / self.rho - 1) / self.rho
        inside = (t.double() >= self.t_min).double()
        return inside * slope * (1 + sigma).square() / (self._high - self._low)

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """What ``told`` says, of sigma."""
        sigma = self._sigma(t)
        if self.told == "sigma":
            return sigma
        return sigma.log() / 4 if self.told == "log" else sigma.atan() * 2 / math.pi

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """One and sigma."""
        t = t.double()
        return torch.ones_like(t), t / (1 - t)

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """``1 + sigma = 1 / (1 - t)``."""
        return 1 / (1 - t.double())

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Equal shares of the way, and data at its end."""
        _check_steps(steps, self.num_timesteps)
        times = self.time_at(torch.arange(steps, -1, -1, dtype=torch.float64) / steps)
        times[-1] = 0
        return times

    def is_uniform(self, steps: int) -> bool:
        """Always."""
        return True


class FlowMatching:
    """The axis itself, ``x = (1 - t) x_0 + t eps``, with the shift of Esser et al. 2024 (arXiv 2403.03206, eq. 23).

    Jumps are measured before the shift: ``t = shift s / (1 + (shift - 1) s)``, so that the grid of a pipeline that
    shifts equal steps of s is uniform.

    Args:
        told_before: the network is told s, not t.
    """

    t_max = 1.0

    def __init__(self, shift: float = 1.0, num_timesteps: int = 1000, *, told_before: bool = False) -> None:
        if shift <= 0:
            raise UserError(f"the scheduler's shift is {shift}; wanted a number above 0")
        self.shift, self.num_timesteps, self.told_before = shift, num_timesteps, told_before
        self.t_min = float(self._shifted(torch.tensor(1 / num_timesteps, dtype=torch.float64)))

    def _shifted(self, s: Tensor) -> Tensor:
        return self.shift * s / (1 + (self.shift - 1) * s)

    def time_at(self, share: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time at a share of the way from t_min to 1, equal steps before the shift."""
        first = 1 / self.num_timesteps
        return self._shifted(first + (1 - first) * share.double())

    def position(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time before the shift."""
        t = t.double()
        return t / (self.shift - (self.shift - 1) * t)

    def rate(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The derivative of ``position`` in t."""
        return self.shift / (self.shift - (self.shift - 1) * t.double()).square()

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """``num_timesteps t``, or that of the time before the shift."""
        t = t.double().clamp_min(self.t_min)
        return (self.position(t) if self.told_before else t) * self.num_timesteps

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """``1 - t`` and ``t``."""
        t = t.double()
        return 1 - t, t

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """One."""
        return torch.ones_like(t.double())

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Equal steps before the shift."""
        _check_steps(steps, self.num_timesteps)
        return self._shifted(torch.arange(steps, -1, -1, dtype=torch.float64) / steps)

    def is_uniform(self, steps: int) -> bool:
        """Always."""
        return True


def _on_the_circle(t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
    """Alpha and sigma of a variance-preserving teacher at t."""
    t = t.double()
    norm = ((1 - t).square() + t.square()).sqrt()
    return (1 - t) / norm, t / norm


def _monotone_slopes(times: Float[Tensor, " knots"]) -> Float[Tensor, " knots"]:
    """Slopes at the knots that keep the cubic Hermite interpolant of 0, 1, 2, ... over ``times`` monotone.

    Weighted harmonic means inside (Fritsch and Butland 1984), the secant at both ends.
    """
    widths = times.diff()
    secants = 1 / widths
    left, right = 2 * widths[1:] + widths[:-1], widths[1:] + 2 * widths[:-1]
    inner = (left + right) / (left / secants[:-1] + right / secants[1:])
    return torch.cat([secants[:1], inner, secants[-1:]])
