"""A stock pipeline whose network is a student flow map. Imports only torch and diffusers: it travels along."""

import functools
import inspect
import math
import types
from itertools import pairwise

import torch
from diffusers.utils import logging

logger = logging.get_logger(__name__)


def _place(levels: dict, sigma: float) -> float:
    """Where a noise level stands on the student's way, 0 at data."""
    if levels["kind"] == "flow":
        return sigma / (levels["shift"] - (levels["shift"] - 1) * sigma)
    low, high, rho = levels["sigma_min"], levels["sigma_max"], levels["rho"]
    warp = math.log if rho is None else lambda s: s ** (1 / rho)
    return (warp(max(sigma, low)) - warp(low)) / (warp(high) - warp(low))


def _jumps(scheduler, levels: dict) -> list[tuple[float, float]]:
    """Of every step: what the network is told, and the length of the jump."""
    timesteps = [float(timestep) for timestep in scheduler.timesteps]
    told = [levels["slope"] * (levels["flip"] - t if levels["flip"] else t) + levels["offset"] for t in timesteps]
    if levels["kind"] == "angular":
        # The levels of IPNDM are equal steps of what a jump is measured in.
        places = [1 - i / len(timesteps) for i in range(len(timesteps) + 1)]
    elif levels["kind"] == "discrete":
        places = [(t + 1) / levels["total"] for t in timesteps] + [0.0]
    else:
        sigmas = [float(sigma) for sigma in scheduler.sigmas[: len(timesteps) + 1]]
        places = [_place(levels, 1 - sigma if levels["flip"] else sigma) for sigma in sigmas]
    return [(time, places[i] - places[i + 1]) for i, time in enumerate(told)]


def _whole_jump(self, model_output, timestep, sample, eta=0.0, generator=None, return_dict=True, **kwargs):
    """The DDIM step (arXiv 2010.02502, eq. 12, sigma = 0) to the next timestep of the grid, data after the last."""
    index = int((self.timesteps.cpu() - torch.as_tensor(timestep).cpu()).abs().argmin())
    start = float(self.alphas_cumprod[int(self.timesteps[index])])
    end = float(self.alphas_cumprod[int(self.timesteps[index + 1])]) if index + 1 < len(self.timesteps) else 1.0
    alpha, sigma = start**0.5, (1 - start) ** 0.5
    if self.config.prediction_type == "epsilon":
        eps, x_0 = model_output, (sample - sigma * model_output) / alpha
    elif self.config.prediction_type == "sample":
        eps, x_0 = (sample - alpha * model_output) / sigma, model_output
    else:
        eps, x_0 = sigma * sample + alpha * model_output, alpha * sample - sigma * model_output
    moved = end**0.5 * x_0 + (1 - end) ** 0.5 * eps
    return (moved, x_0) if not return_dict else type("Step", (), {"prev_sample": moved, "pred_original_sample": x_0})()


def _angular_jump(self, model_output, timestep, sample, return_dict=True):
    """The same between two levels of ``IPNDMScheduler``, whose own steps look back and divide by alpha, 0 at first."""
    index = int((self.timesteps.cpu() - torch.as_tensor(timestep).cpu()).abs().argmin())
    (alpha, sigma), (alpha_end, sigma_end) = ((float(self.alphas[i]), float(self.betas[i])) for i in (index, index + 1))
    eps, x_0 = sigma * sample + alpha * model_output, alpha * sample - sigma * model_output
    moved = alpha_end * x_0 + sigma_end * eps
    return (moved,) if not return_dict else type("Step", (), {"prev_sample": moved})()


def _timesteps(self, num_inference_steps=None, device=None):
    """The stock grid of a discrete schedule, or the user's own."""
    type(self).set_timesteps(self, num_inference_steps, device)
    if self.given:
        self.timesteps = torch.tensor(self.given["timesteps"], dtype=torch.int64, device=self.timesteps.device)


def _flow_levels(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
    """The stock grid of a flow model, from equal steps where the pipeline does not say which, or the user's own.

    The user's sigmas are those before the shift, as in stock diffusers; their timesteps are what the network is told.
    """
    own, total = self.given, self.config.num_train_timesteps
    if own:
        num_inference_steps = None
        sigmas = own.get("sigmas") or [t / total for t in own["timesteps"]]
        timesteps = [sigma * total for sigma in sigmas] if self.told_before else None
    elif sigmas is None and timesteps is None:
        sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
    type(self).set_timesteps(self, num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)
    if "timesteps" in own and not self.told_before:
        # Stock tells the network these and shifts the levels.
        levels = torch.tensor([*sigmas, 0.0], device=self.sigmas.device)
        self.sigmas = 1 - levels if self.config.invert_sigmas else levels
        self.timesteps = self.sigmas[:-1] * total


def _noise_levels(self, num_inference_steps=None, device=None, sigmas=None):
    """Levels at equal shares of the way from sigma_max to sigma_min, or the user's own, then data."""
    type(self).set_timesteps(self, num_inference_steps, device)
    sigmas, levels = self.given.get("sigmas"), self.config
    if sigmas is None:
        warp, back = math.log, math.exp
        if levels.sigma_schedule == "karras":
            warp, back = (lambda s: s ** (1 / levels.rho)), (lambda s: s**levels.rho)
        low, high = warp(levels.sigma_min), warp(levels.sigma_max)
        shares = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        sigmas = [back(low + (high - low) * share) for share in shares]
    sigmas = torch.tensor(sigmas)
    # The stock scheduler has the logarithm; stable audio's own has the angle.
    times = sigmas.atan() * 2 / math.pi if self.told == "atan" else self.precondition_noise(sigmas)
    self.timesteps = times.to(self.timesteps.device)
    self.sigmas = torch.cat([sigmas, torch.zeros(1)])


def _chosen_guidance(config, levels: dict, given: dict) -> float | None:
    """The scale that a student with a range is told: what the call says, which the stock pipeline then does not see."""
    if config.get("guidance_range") is None:
        return None
    (low, high), name = config["guidance_range"], levels["guidance"]
    scale = given.pop(name, None)
    scale = levels["scale"] if scale is None else scale
    if not low <= scale <= high:
        raise ValueError(f"{name} must be {low:g} to {high:g}, the range that this student has learned, got {scale}")
    return scale


def _ends(levels: dict, name: str, total: int) -> tuple[float, float]:
    """The lowest and the highest time at which a jump can start, of those that a user names so."""
    kind = levels["kind"]
    if (kind, name) == ("discrete", "sigmas"):
        raise ValueError("sigmas: this student's noise schedule is discrete; wanted timesteps")
    if (kind, name) == ("exploding", "timesteps"):
        raise ValueError("timesteps: this student's noise schedule is continuous; wanted sigmas")
    if kind == "discrete":
        return 0, total - 1
    if kind == "exploding":
        return levels["sigma_min"], levels["sigma_max"]
    if name == "sigmas":
        return 1 / total, 1
    first = 1 / total
    if not levels["told_before"]:
        first = levels["shift"] * first / (1 + (levels["shift"] - 1) * first)
    return total * first, total


def _checked(given: dict, levels: dict, total: int) -> dict:
    """The times that a user gave, as numbers; ValueError where no jump can start there."""
    if len(given) > 1:
        raise ValueError("timesteps and sigmas are both given; give one of them")
    checked = {}
    for name, values in given.items():
        low, high = _ends(levels, name, total)
        numbers = [float(value) for value in values]
        wanted = f"numbers that decrease, from at most {high:g} to at least {low:g}"
        right = bool(numbers) and all(before > after for before, after in pairwise(numbers))
        right = right and low <= numbers[-1] and numbers[0] <= high
        if levels["kind"] == "discrete":
            wanted = f"whole {wanted}"
            right = right and all(number.is_integer() for number in numbers)
        if levels["kind"] == "exploding":
            # The pipeline scales its noise to the highest level.
            wanted = f"{wanted}, the first of them {high:g}"
            right = right and numbers[0] == high
        if not right:
            raise ValueError(f"{name}={numbers}: wanted {wanted}")
        checked[name] = numbers
    return checked


def jumping(scheduler, levels: dict, given: dict | None = None):
    """The same scheduler, its grid and steps those of a flow map's jumps.

    ``given``: the starts of the jumps, as ``timesteps`` or ``sigmas``, whatever a pipeline asks of the scheduler.
    """
    made = type(scheduler).from_config(scheduler.config)
    # On the object: some pipelines compare the scheduler's class.
    made.given = _checked(given or {}, levels, made.config.num_train_timesteps)
    made.told_before = levels["kind"] == "flow" and levels["told_before"]
    made.told = levels.get("told")
    grids = {"discrete": _timesteps, "flow": _flow_levels, "exploding": _noise_levels}
    if levels["kind"] in grids:
        made.set_timesteps = types.MethodType(grids[levels["kind"]], made)
    jumps = {"discrete": _whole_jump, "angular": _angular_jump}
    step = types.MethodType(jumps[levels["kind"]], made) if levels["kind"] in jumps else made.step
    # Pipelines of discrete schedules look for these, which a scheduler of flow models does not have.
    if not hasattr(made, "init_noise_sigma"):
        made.init_noise_sigma = 1.0
    if not hasattr(made, "scale_model_input"):
        made.scale_model_input = lambda sample, *args, **kwargs: sample
    made.steps_done = 0

    # With its signature: pipelines look at the parameters.
    @functools.wraps(step)
    def counted(*args, **kwargs):
        made.steps_done += 1
        result = step(*args, **kwargs)
        # PixArt takes the prediction of data, the second one, in a single step: the sample after it is that.
        return (*result, result[0]) if isinstance(result, tuple) and len(result) == 1 else result

    made.step = counted
    return made


def _length(scheduler, levels: dict, time: torch.Tensor) -> float:
    """The length of the jump that starts where the network is told ``time``, of shape ``[]``."""
    told, jumps = float(time), _jumps(scheduler, levels)
    distances = [abs(start - told) for start, _ in jumps]
    # In half precision neighbours are told one time: of those the jump that is next.
    rounding = 2 * torch.finfo(time.dtype).eps * abs(told) if time.is_floating_point() else 0.0
    near = [i for i, distance in enumerate(distances) if distance <= min(distances) + rounding]
    return jumps[min(near, key=lambda i: abs(i - scheduler.steps_done))][1]


def flow_map_pipeline(stock: type) -> type:
    """``stock`` with a two-time network: everything is the stock pipeline's own, any number of steps is right.

    The jump's length is read from the scheduler's grid. Where the stock pipeline takes ``timesteps`` or ``sigmas`` they
    are the starts of the jumps, ValueError where none can start there. What the student was guided by is in its
    weights: guidance is off unless it is asked for, which is warned of. A student with a range of guidance is told the
    call's instead.
    """

    class FlowMapPipeline(stock):
        __doc__ = flow_map_pipeline.__doc__

        def __call__(self, *args, **kwargs):
            network = self.transformer if getattr(self, "transformer", None) is not None else self.unet
            levels = network.config["flow_map"]
            bound = inspect.signature(stock.__call__).bind_partial(self, *args, **kwargs)
            given = bound.arguments
            scale = _chosen_guidance(network.config, levels, given)
            # Handed to the scheduler: some stock pipelines refuse them, or tell the network others than they step by.
            own = {name: given.pop(name) for name in ("timesteps", "sigmas") if given.get(name) is not None}
            for name, value in levels["call"].items():
                if name not in given:
                    given[name] = value
                elif name == levels["guidance"] and (given[name] or 0.0) > value:
                    logger.warning(f"{name}={given[name]}: guidance is in the student's weights, this adds to it")
            if own:
                given["num_inference_steps"] = len(next(iter(own.values())))
            names = list(inspect.signature(type(network).__mro__[2].forward).parameters)
            time_name = next(name for name in names if name in ("timestep", "timesteps", "t"))
            time_index = names.index(time_name) - 1

            def tell(module, inputs, keywords):
                time = keywords[time_name] if time_name in keywords else inputs[time_index]
                length = _length(self.scheduler, levels, torch.as_tensor(time).flatten()[0])
                # One length for all samples, however many the network is told a time for.
                told = {"h": torch.full((1,), length, device=module.device)}
                told |= {} if scale is None else {"w": torch.full((1,), scale, device=module.device)}
                return inputs, keywords | told

            scheduler, made = self.scheduler, jumping(self.scheduler, levels, own)
            hook = network.register_forward_pre_hook(tell, with_kwargs=True)
            self.scheduler = made
            try:
                return stock.__call__(*bound.args, **bound.kwargs)
            finally:
                hook.remove()
                self.scheduler = scheduler

    # Users and other pipelines look at the parameters.
    FlowMapPipeline.__call__.__signature__ = inspect.signature(stock.__call__)
    return FlowMapPipeline
