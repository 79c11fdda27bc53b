"""A discrete variance-preserving schedule, continuous in t."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.schedules.base import check_steps, on_the_circle
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["VariancePreserving"]


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

    kind = "discrete"
    folds = True

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

    def warp(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The timestep as a share of their number: jumps are measured in it."""
        return self.timestep(t) / self.num_timesteps

    def dwarp_dt(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The derivative of ``warp`` in t."""
        return torch.func.jvp(self.warp, (t.double(),), (torch.ones_like(t.double()),))[1]

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """The teacher's alpha and sigma at t in [0, t_max], with alpha^2 + sigma^2 = 1."""
        return on_the_circle(t)

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """``alpha + sigma``: the teacher's coordinates are those of the axis times this."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha + sigma

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """The stock DDIM grid with trailing spacing, and data at its end; float64.

        Where ``steps`` does not divide the timesteps, halves are rounded to even; stock rounds some the other way.
        """
        n = self.num_timesteps
        check_steps(steps, n)
        remaining = torch.arange(steps, -1, -1, dtype=torch.float64) * n / steps
        return self.time(remaining.round().long() - 1)

    def to_config(self) -> dict[str, Any]:
        """The noise levels as JSON."""
        return {"kind": self.kind, "total": self.num_timesteps}

    def is_uniform(self, steps: int) -> bool:
        """Whether ``steps`` divides the number of timesteps."""
        return self.num_timesteps % steps == 0


def _monotone_slopes(times: Float[Tensor, " knots"]) -> Float[Tensor, " knots"]:
    """Slopes at the knots that keep the cubic Hermite interpolant of 0, 1, 2, ... over ``times`` monotone.

    Weighted harmonic means inside (Fritsch and Butland 1984), the secant at both ends.
    """
    widths = times.diff()
    secants = 1 / widths
    left, right = 2 * widths[1:] + widths[:-1], widths[1:] + 2 * widths[:-1]
    inner = (left + right) / (left / secants[:-1] + right / secants[1:])
    return torch.cat([secants[:1], inner, secants[-1:]])
