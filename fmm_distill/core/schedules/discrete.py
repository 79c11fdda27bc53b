"""A discrete variance-preserving schedule, continuous in t."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.schedules.base import check_steps, variance_preserving_levels
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["VariancePreserving"]


class VariancePreserving:
    """A discrete variance-preserving schedule on the time axis, continuous in t.

    Timestep k in 0 .. N - 1 is at ``t_k = sigma_k / (alpha_k + sigma_k)``. Data are at timestep -1 and t = 0, where the
    last step of the stock DDIM sampler ends. In between, the timestep is the monotone cubic interpolant of Fritsch and
    Butland (SIAM J. Sci. Stat. Comput. 5, 1984) in t. It is once differentiable and finite down to data, where an
    interpolant in log-SNR is not. alpha and sigma are functions of t and need no interpolation.

    Args:
        alphas_cumprod: ``alpha_k^2``, shape ``[N]``, strictly decreasing, in (0, 1); the last may be 0 (zero terminal
            SNR, Lin et al. 2023, arXiv 2305.08891).

    Raises:
        UserError: if ``alphas_cumprod`` does not decrease, or leaves (0, 1) before its end.
    """

    kind = "discrete"
    folds = True

    def __init__(self, alphas_cumprod: Float[Tensor, " timesteps"]) -> None:
        # float64: the times of neighboring timesteps are close, and the timestep is a quotient of their differences.
        products = alphas_cumprod.detach().double().cpu()
        # Strictly, since equal levels would be equal times and the interpolant of the timestep infinitely steep.
        decreasing = bool((products[1:] < products[:-1]).all())
        if not (decreasing and len(products) >= 2 and products[0] < 1 and products[-1] >= 0):
            raise UserError(
                f"the scheduler's alphas_cumprod run from {products[0]:.3g} to {products[-1]:.3g}; expected at least "
                "two numbers between 1 and 0 that decrease; try other betas in its scheduler_config.json"
            )
        alpha, sigma = products.sqrt(), (1 - products).sqrt()
        self.num_timesteps = len(products)
        times = torch.cat([torch.zeros(1, dtype=torch.float64), sigma / (alpha + sigma)])
        self._tables = {times.device: (times, _monotone_slopes(times))}
        # times[0] is data, which is no timestep of the teacher.
        self.t_min, self.t_max = float(times[1]), float(times[-1])

    def to(self, device: torch.device | str) -> None:
        """Copy the tables to ``device``: a copy in every call would make the host wait for a GPU."""
        times, slopes = (table.to(device) for table in self._on(torch.device("cpu")))
        self._tables[times.device] = times, slopes

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the times of the timesteps from -1 on, and the slopes of the interpolant there."""
        if device in self._tables:
            return self._tables[device]
        times, slopes = self._tables[torch.device("cpu")]
        return times.to(device), slopes.to(device)

    def time(self, timestep: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return t of integer timesteps from -1 (data) to N - 1, in float64."""
        return self._on(timestep.device)[0][timestep + 1]

    def time_at(self, progress: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the time at a progress from 0 (timestep 0) to 1 (timestep N - 1), linear between timesteps."""
        timestep = progress * (self.num_timesteps - 1)
        # At progress 1 the interval is the last one, and the position in it 1.
        below: Int[Tensor, " batch"] = timestep.long().clamp_max(self.num_timesteps - 2)
        return torch.lerp(self.time(below), self.time(below + 1), timestep - below)

    def timestep(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the timestep at t in [0, t_max], from -1 to N - 1; exact at the times of integer timesteps."""
        t = t.double()
        times, slopes = self._on(t.device)
        # The index of the interval is piecewise constant in t and has no derivative.
        # The clamps put t_max into the last interval; ``contiguous`` avoids torch's warning.
        index = torch.searchsorted(times, t.detach().contiguous(), right=True).clamp(1, self.num_timesteps) - 1
        width = times[index + 1] - times[index]
        s = (t - times[index]) / width
        cubic = (slopes[index] + slopes[index + 1]) * width - 2
        square = 3 - (2 * slopes[index] + slopes[index + 1]) * width
        return index - 1 + s * (slopes[index] * width + s * (square + s * cubic))

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the timestep; 0 below t_min."""
        # Between timestep 0 and data no time was trained, and the stock sampler makes one last step.
        return self.timestep(t).clamp_min(0)

    def warp(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the timestep divided by the number of timesteps."""
        return self.timestep(t) / self.num_timesteps

    def dwarp_dt(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the derivative of ``warp`` in t."""
        # Not a table of derivatives: this is the exact slope of the interpolant that ``warp`` evaluates.
        return torch.func.jvp(self.warp, (t.double(),), (torch.ones_like(t.double()),))[1]

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at t in [0, t_max], with ``alpha^2 + sigma^2 = 1``."""
        return variance_preserving_levels(t)

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return ``alpha + sigma``, the factor from coordinates of the time axis to the teacher's."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha + sigma

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Return the stock DDIM grid with trailing spacing, and 0 at its end; float64.

        If ``steps`` does not divide the number of timesteps, halves are rounded to even; diffusers rounds some of them
        to the other side.
        """
        n = self.num_timesteps
        check_steps(steps, n)
        remaining = torch.arange(steps, -1, -1, dtype=torch.float64) * n / steps
        return self.time(remaining.round().long() - 1)

    def to_config(self) -> dict[str, Any]:
        """Return the noise levels as JSON."""
        return {"kind": self.kind, "total": self.num_timesteps}

    def is_uniform(self, steps: int) -> bool:
        """Return whether ``steps`` divides the number of timesteps."""
        return self.num_timesteps % steps == 0


def _monotone_slopes(times: Float[Tensor, " knots"]) -> Float[Tensor, " knots"]:
    """Return slopes with which the cubic Hermite interpolant of 0, 1, 2, ... over ``times`` is monotone.

    They are weighted harmonic means of the secants (Fritsch and Butland 1984), and the secant at both ends.
    """
    widths = times.diff()
    secants = 1 / widths
    left, right = 2 * widths[1:] + widths[:-1], widths[1:] + 2 * widths[:-1]
    inner = (left + right) / (left / secants[:-1] + right / secants[1:])
    return torch.cat([secants[:1], inner, secants[-1:]])
