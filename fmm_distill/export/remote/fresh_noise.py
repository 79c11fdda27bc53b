"""Fresh noise between the jumps of an any-step pipeline. Imports torch and diffusers alone: exports have a copy.

A step from one noise level to the next one with a stochasticity s jumps beyond the next level, to the fraction m of its
noise, and independent noise makes up the rest. Levels are pairs of alpha and sigma, ``x = alpha x_0 + sigma eps``.
"""

import math

import torch
from diffusers.utils.torch_utils import randn_tensor


class FreshNoise:
    """The fresh noise in the steps of one call.

    Args:
        stochasticity: its strength; 0: none.
        generator: one, or one per sample; None: torch's own.

    Raises:
        ValueError: if the strength is negative or not finite.
    """

    def __init__(self, stochasticity: float, generator):
        if not 0 <= stochasticity < math.inf:
            raise ValueError(f"stochasticity must be a finite number of at least 0, got {stochasticity}")
        self.stochasticity, self.generator = stochasticity, generator

    def preserved(self, start: tuple, end: tuple) -> float:
        """Return the fraction m of the noise at the end of a step that the jump makes: the ratio of the levels to s^2.

        It is 1 without fresh noise.
        """
        (alpha, sigma), (alpha_end, sigma_end) = start, end
        # A product, as a power of a large float is an error instead of infinity.
        return (sigma_end * alpha / (sigma * alpha_end)) ** (self.stochasticity * self.stochasticity)

    def add(self, x: torch.Tensor, sigma: float, preserved: float) -> torch.Tensor:
        """Return samples with the fraction ``preserved`` of the noise sigma, with all of it."""
        spread = sigma * math.sqrt((1 - preserved) * (1 + preserved))
        # No random numbers where there is no noise, as at data.
        if not spread:
            return x
        generator = self.generator
        if isinstance(generator, list):
            # Some pipelines of videos pass one row per frame, those of a sample after one another.
            generator = [one for one in generator for _ in range(len(x) // len(generator))]
        return x + spread * randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def discrete_position(alphas_cumprod: torch.Tensor, level: tuple, total: int) -> float:
    """Return the position of a level on a discrete schedule, from 0 (data) to 1 (the last timestep).

    Between timesteps it is the cubic interpolant of Fritsch and Butland (1984) in ``sigma / (alpha + sigma)``, by which
    the student has learned the length of its jumps.
    """
    alpha, sigma = level
    products = alphas_cumprod.double().cpu()
    noise = (1 - products).sqrt()
    times = torch.cat([torch.zeros(1, dtype=torch.float64), noise / (products.sqrt() + noise)])
    widths = times.diff()
    # The slope at a knot is a weighted harmonic mean of the secants next to it, 1 / width each.
    left, right = 2 * widths[1:] + widths[:-1], widths[1:] + 2 * widths[:-1]
    inner = (left + right) / (left * widths[:-1] + right * widths[1:])
    slopes = torch.cat([1 / widths[:1], inner, 1 / widths[-1:]])
    time = sigma / (alpha + sigma)
    i = min(int(torch.searchsorted(times, time, right=True)), len(widths)) - 1
    width = float(widths[i])
    one, other, s = float(slopes[i]) * width, float(slopes[i + 1]) * width, (time - float(times[i])) / width
    # The Hermite cubic that grows by 1 over the interval; the first interval begins at data, timestep -1.
    return (i + s * (one + s * (3 - 2 * one - other + s * (one + other - 2)))) / total
