"""The scheduler of an any-step pipeline of a stock class. Imports torch and diffusers alone: exports have a copy.

``FlowMapEulerDiscreteScheduler`` of diffusers steps by the same rule on flow models of a fixed shift. It takes no
``mu``, has no inverted sigmas, shifts the timesteps of the caller and computes its grid in float64, so that pipelines
of dynamic shifting fail with it and others give images that differ in the last bits.
"""

import functools
import math
from itertools import pairwise

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    ConfigMixin,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    SchedulerMixin,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from fmm_distill.export.remote.fresh_noise import FreshNoise, discrete_position


def _counted(step):
    """Count the calls of a step. The signature stays: pipelines read it to decide which arguments they pass."""

    @functools.wraps(step)
    def counted(self, *args, **kwargs):
        self.steps_done += 1
        result = step(self, *args, **kwargs)
        # PixArt reads the second output, the prediction of the data, in a single step: the sample after it is that.
        return (*result, result[0]) if isinstance(result, tuple) and len(result) == 1 else result

    return counted


class FlowMapScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler of first order whose steps are the jumps of a student flow map.

    The subclasses are stock scheduler classes as well: pipelines test the class of their scheduler, and read the
    members and the signatures that a stock class has.

    Attributes:
        flow_map: the settings of the student: the noise levels, and the line from timesteps to the network's times.
        starts: the starts of the jumps that the caller chose, as ``timesteps`` or ``sigmas``; empty: the stock grid.
        steps_done: the number of jumps since the scheduler was made.
        fresh_noise: the noise that is added in each step.
    """

    @classmethod
    def from_stock(
        cls,
        scheduler: SchedulerMixin,
        flow_map: dict,
        starts: dict | None = None,
        stochasticity: float = 0.0,
        generator=None,
    ):
        """Make the scheduler of one call of a pipeline.

        Args:
            scheduler: the stock scheduler that the student was exported with.
            flow_map: the ``flow_map`` entry of the network's configuration.
            starts: ``timesteps`` or ``sigmas`` at which the jumps start.
            stochasticity: the strength of the fresh noise in each step.
            generator: of the fresh noise.

        Raises:
            ValueError: on starts from which the student has no jump, or a stochasticity that is negative or not finite.
        """
        made = _CLASSES[type(scheduler).__name__].from_config(scheduler.config)
        if "variance_type" not in made.config:
            # DeepFloyd's pipeline reads it, and splits the learned variance off unless its scheduler takes it.
            made.register_to_config(variance_type="fixed_small")
        made.flow_map, made.steps_done = flow_map, 0
        made.fresh_noise = FreshNoise(stochasticity, generator)
        made.starts = check_starts(starts or {}, flow_map, made.config.num_train_timesteps)
        return made

    def jump_length(self, time: torch.Tensor) -> float:
        """Return the length of the jump that starts where the network is called at ``time``, of shape ``[]``."""
        value, times, positions = float(time), self.network_times(), self.positions()
        distances = [abs(start - value) for start in times]
        # In half precision two neighbors may have one time: of those the next jump is meant.
        rounding = 2 * torch.finfo(time.dtype).eps * abs(value) if time.is_floating_point() else 0.0
        near = [i for i, distance in enumerate(distances) if distance <= min(distances) + rounding]
        index = min(near, key=lambda i: abs(i - self.steps_done))
        if not self.fresh_noise.stochasticity:
            return positions[index] - positions[index + 1]
        alpha, sigma = self.levels()[index + 1]
        return positions[index] - self.position_at(alpha, self.preserved(index) * sigma)

    def preserved(self, index: int) -> float:
        """Return the fraction of the noise at the end of a step that the jump itself makes; see ``FreshNoise``."""
        if not self.fresh_noise.stochasticity:
            return 1.0
        start, end = self.levels()[index : index + 2]
        return self.fresh_noise.preserved(start, end)

    def network_times(self) -> list[float]:
        """Return the times that the network is called at, one per jump."""
        flow_map, timesteps = self.flow_map, [float(timestep) for timestep in self.timesteps]
        flip = flow_map["flip"]
        return [flow_map["slope"] * (flip - t if flip else t) + flow_map["offset"] for t in timesteps]

    def positions(self) -> list[float]:
        """Return the positions of the grid in the variable that jumps are measured in, 1 at noise, 0 at data."""
        sigmas, flip = [float(sigma) for sigma in self.sigmas[: len(self.timesteps) + 1]], self.flow_map["flip"]
        return [self.position_of(1 - sigma if flip else sigma) for sigma in sigmas]

    def levels(self) -> list[tuple[float, float]]:
        """Return alpha and sigma at the points of the grid, data last."""
        raise NotImplementedError

    def position_at(self, alpha: float, sigma: float) -> float:
        """Return the position of a noise level in the variable that jumps are measured in."""
        raise NotImplementedError


class _FlowMapDiscreteScheduler(FlowMapScheduler):
    """Jumps on a discrete schedule."""

    def set_timesteps(self, num_inference_steps=None, device=None):
        """Take the stock grid of a discrete schedule, or the timesteps that the caller chose."""
        super().set_timesteps(num_inference_steps, device)
        if self.starts:
            self.timesteps = torch.tensor(self.starts["timesteps"], dtype=torch.int64, device=self.timesteps.device)

    def positions(self):
        """Return the timesteps as fractions of their number; data is at timestep -1."""
        return [(float(timestep) + 1) / self.flow_map["total"] for timestep in self.timesteps] + [0.0]

    def levels(self):
        """Return the levels of the timesteps, then those of data."""
        products = [float(self.alphas_cumprod[int(timestep)]) for timestep in self.timesteps] + [1.0]
        return [(product**0.5, (1 - product) ** 0.5) for product in products]

    def position_at(self, alpha, sigma):
        """Return the fraction of the timesteps, which are interpolated."""
        return discrete_position(self.alphas_cumprod, (alpha, sigma), self.flow_map["total"])

    @_counted
    def step(self, model_output, timestep, sample, eta=0.0, generator=None, return_dict=True, **kwargs):
        """Jump to the next timestep of the grid, data after the last: DDIM, arXiv 2010.02502, eq. 12, sigma = 0."""
        index = _nearest(self.timesteps, timestep)
        start = float(self.alphas_cumprod[int(self.timesteps[index])])
        end = float(self.alphas_cumprod[int(self.timesteps[index + 1])]) if index + 1 < len(self.timesteps) else 1.0
        alpha, sigma = start**0.5, (1 - start) ** 0.5
        if self.config.prediction_type == "epsilon":
            eps, x_0 = model_output, (sample - sigma * model_output) / alpha
        elif self.config.prediction_type == "sample":
            eps, x_0 = (sample - alpha * model_output) / sigma, model_output
        else:
            eps, x_0 = sigma * sample + alpha * model_output, alpha * sample - sigma * model_output
        # Without the stochastic part of DDIM, whatever eta is: a jump is deterministic.
        preserved = self.preserved(int(index))
        moved = end**0.5 * x_0 + preserved * (1 - end) ** 0.5 * eps
        moved = self.fresh_noise.add(moved, (1 - end) ** 0.5, preserved)
        return DDIMSchedulerOutput(prev_sample=moved, pred_original_sample=x_0) if return_dict else (moved, x_0)


class FlowMapDDIMScheduler(_FlowMapDiscreteScheduler, DDIMScheduler):
    """Jumps on the levels of ``DDIMScheduler``."""


class FlowMapCogVideoXDDIMScheduler(_FlowMapDiscreteScheduler, CogVideoXDDIMScheduler):
    """Jumps on the levels of ``CogVideoXDDIMScheduler``."""


class FlowMapIPNDMScheduler(FlowMapScheduler, IPNDMScheduler):
    """Jumps on the levels of ``IPNDMScheduler``."""

    def positions(self):
        """Return equal steps: those of this grid are equal in the variable that jumps are measured in."""
        return [1 - i / len(self.timesteps) for i in range(len(self.timesteps) + 1)]

    def levels(self):
        """Return the stock levels."""
        return [(float(alpha), float(sigma)) for alpha, sigma in zip(self.alphas, self.betas, strict=True)]

    def position_at(self, alpha, sigma):
        """Return the s of ``sigma = sin(pi s / 2)^2``, for levels of any scale."""
        sigma = sigma / math.hypot(alpha, sigma)
        # Not the arc sine, whose derivative is infinite at noise.
        return math.atan2(math.sqrt(sigma), math.sqrt(1 - sigma)) * 2 / math.pi

    @_counted
    def step(self, model_output, timestep, sample, return_dict=True):
        """Jump by the DDIM step between two levels; the steps of the stock class divide by alpha, 0 at first."""
        i = _nearest(self.timesteps, timestep)
        (alpha, sigma), (alpha_end, sigma_end) = ((float(self.alphas[k]), float(self.betas[k])) for k in (i, i + 1))
        eps, x_0 = sigma * sample + alpha * model_output, alpha * sample - sigma * model_output
        preserved = self.preserved(i)
        moved = alpha_end * x_0 + preserved * sigma_end * eps
        moved = self.fresh_noise.add(moved, sigma_end, preserved)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)


class FlowMapFlowMatchEulerDiscreteScheduler(FlowMapScheduler, FlowMatchEulerDiscreteScheduler):
    """Jumps of a flow model: the Euler step of ``FlowMatchEulerDiscreteScheduler`` is the jump."""

    # Pipelines of discrete schedules read these two; the stock class has neither.
    init_noise_sigma = 1.0

    def scale_model_input(self, sample, timestep=None):
        """Return the sample: the network of a flow model is called at it."""
        return sample

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        """Take the grid of the pipeline, equal steps where it passes none, or the starts that the caller chose.

        The sigmas of the caller are those before the shift, as in stock diffusers. The timesteps of the caller are
        those that the network is called at.
        """
        own, total = self.starts, self.config.num_train_timesteps
        unshifted = self.flow_map["unshifted_time"]
        if own:
            num_inference_steps = None
            sigmas = own.get("sigmas") or [t / total for t in own["timesteps"]]
            timesteps = [sigma * total for sigma in sigmas] if unshifted else None
        elif sigmas is None and timesteps is None:
            # The stock default goes down to the first timestep, so that its last step is almost empty.
            sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        super().set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        if "timesteps" in own and not unshifted:
            # The stock class calls the network at these timesteps and shifts the levels.
            levels = torch.tensor([*sigmas, 0.0], device=self.sigmas.device)
            self.sigmas = 1 - levels if self.config.invert_sigmas else levels
            self.timesteps = self.sigmas[:-1] * total

    def position_of(self, sigma: float) -> float:
        """Return the level before the shift."""
        shift = self.flow_map["shift"]
        return sigma / (shift - (shift - 1) * sigma)

    def levels(self):
        """Return the levels of the grid, of which alpha and sigma add up to 1."""
        flip, points = self.config.invert_sigmas, [float(sigma) for sigma in self.sigmas]
        return [(sigma, 1 - sigma) if flip else (1 - sigma, sigma) for sigma in points]

    def position_at(self, alpha, sigma):
        """Return the level before the shift, for levels of any scale."""
        return self.position_of(sigma / (alpha + sigma))

    @_counted
    @functools.wraps(FlowMatchEulerDiscreteScheduler.step)
    def step(self, model_output, timestep, sample, *args, **kwargs):
        """Make the stock step, of another length and with fresh noise where the call has a stochasticity."""
        stock = FlowMatchEulerDiscreteScheduler.step
        if not self.fresh_noise.stochasticity:
            return stock(self, model_output, timestep, sample, *args, **kwargs)
        if self.step_index is None:
            self._init_step_index(timestep)
        index = self.step_index
        (_, start), (alpha, sigma) = self.levels()[index : index + 2]
        preserved = self.preserved(index)
        factor = alpha + preserved * sigma
        longer = (start - preserved * sigma / factor) / (start - sigma)
        result = stock(self, longer * model_output, timestep, sample, *args, **kwargs)
        return _replaced(result, self.fresh_noise.add(factor * result[0], sigma, preserved))


class FlowMapEDMEulerScheduler(FlowMapScheduler, EDMEulerScheduler):
    """Jumps on exploding levels: the Euler step of ``EDMEulerScheduler`` is the jump."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None):
        """Take equal steps of the warped level from sigma_max to sigma_min, or the caller's levels, then data."""
        super().set_timesteps(num_inference_steps, device)
        sigmas, levels = self.starts.get("sigmas"), self.config
        if sigmas is None:
            warp, back = math.log, math.exp
            if levels.sigma_schedule == "karras":
                warp, back = (lambda s: s ** (1 / levels.rho)), (lambda s: s**levels.rho)
            low, high = warp(levels.sigma_min), warp(levels.sigma_max)
            fractions = [1 - i / num_inference_steps for i in range(num_inference_steps)]
            sigmas = [back(low + (high - low) * fraction) for fraction in fractions]
        sigmas = torch.tensor(sigmas)
        # The stock scheduler calls the network at the logarithm; the one of Stable Audio at the angle.
        angle = self.flow_map["network_time"] == "atan"
        times = sigmas.atan() * 2 / math.pi if angle else self.precondition_noise(sigmas)
        self.timesteps = times.to(self.timesteps.device)
        self.sigmas = torch.cat([sigmas, torch.zeros(1)])

    def position_of(self, sigma: float) -> float:
        """Return the fraction of the way from sigma_min to sigma_max, in the warped level."""
        low, high, rho = self.flow_map["sigma_min"], self.flow_map["sigma_max"], self.flow_map["rho"]
        warp = math.log if rho is None else lambda s: s ** (1 / rho)
        # The last level is 0, whose logarithm is -infinity; the last jump ends at position 0 all the same.
        return (warp(max(sigma, low)) - warp(low)) / (warp(high) - warp(low))

    def levels(self):
        """Return the levels of the grid, whose alpha is 1."""
        return [(1.0, float(sigma)) for sigma in self.sigmas]

    def position_at(self, alpha, sigma):
        """Return the position of sigma over alpha."""
        return self.position_of(sigma / alpha)

    @_counted
    @functools.wraps(EDMEulerScheduler.step)
    def step(self, model_output, timestep, sample, *args, **kwargs):
        """Make the stock step, of another length and with fresh noise where the call has a stochasticity."""
        result = EDMEulerScheduler.step(self, model_output, timestep, sample, *args, **kwargs)
        if not self.fresh_noise.stochasticity:
            return result
        index = self.step_index - 1
        start, sigma = (level[1] for level in self.levels()[index : index + 2])
        preserved, x_0 = self.preserved(index), result[1]
        moved = (x_0 + preserved * sigma / start * (sample - x_0)).to(model_output.dtype)
        return _replaced(result, self.fresh_noise.add(moved, sigma, preserved))


_CLASSES = {
    "DDIMScheduler": FlowMapDDIMScheduler,
    "CogVideoXDDIMScheduler": FlowMapCogVideoXDDIMScheduler,
    "IPNDMScheduler": FlowMapIPNDMScheduler,
    "FlowMatchEulerDiscreteScheduler": FlowMapFlowMatchEulerDiscreteScheduler,
    "EDMEulerScheduler": FlowMapEDMEulerScheduler,
}


def _replaced(result, sample):
    """Return the result of a step, a tuple or an output, with another sample."""
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result["prev_sample"] = sample
    return result


def _nearest(timesteps, timestep) -> int:
    # Pipelines pass a timestep of either device, or a number.
    return int((timesteps.cpu() - torch.as_tensor(timestep).cpu()).abs().argmin())


def _ends(flow_map: dict, name: str, total: int) -> tuple[float, float]:
    """Return the lowest and the highest start of a jump, as ``timesteps`` or ``sigmas``."""
    kind = flow_map["kind"]
    if (kind, name) == ("discrete", "sigmas"):
        raise ValueError("sigmas: this student's noise schedule is discrete; expected timesteps")
    if (kind, name) == ("exploding", "timesteps"):
        raise ValueError("timesteps: this student's noise schedule is continuous; expected sigmas")
    if kind == "discrete":
        return 0, total - 1
    if kind == "exploding":
        return flow_map["sigma_min"], flow_map["sigma_max"]
    # With one timestep the network's time is the level itself, and the student's smallest one is 1 / 1000.
    first = 1 / (total if total > 1 else 1000)
    if name == "sigmas":
        return first, 1
    if not flow_map["unshifted_time"]:
        first = flow_map["shift"] * first / (1 + (flow_map["shift"] - 1) * first)
    return total * first, total


def check_starts(starts: dict, flow_map: dict, total: int) -> dict:
    """Return the starts of the jumps as numbers; ValueError where no jump can start there."""
    if len(starts) > 1:
        raise ValueError("timesteps and sigmas are both given; expected one of them")
    checked = {}
    for name, values in starts.items():
        low, high = _ends(flow_map, name, total)
        numbers = [float(value) for value in values]
        expected = f"numbers that decrease, from at most {high:g} to at least {low:g}"
        right = bool(numbers) and all(before > after for before, after in pairwise(numbers))
        right = right and low <= numbers[-1] and numbers[0] <= high
        if flow_map["kind"] == "discrete":
            expected = f"integers that decrease, from at most {high:g} to at least {low:g}"
            right = right and all(number.is_integer() for number in numbers)
        if flow_map["kind"] == "exploding":
            # The pipeline scales its noise to the highest level.
            expected = f"{expected}, the first of them {high:g}"
            right = right and numbers[0] == high
        if not right:
            raise ValueError(f"{name}={numbers}: expected {expected}")
        checked[name] = numbers
    return checked
