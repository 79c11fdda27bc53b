"""A stock pipeline whose network is a student flow map. Imports only torch and diffusers: it travels along."""

import inspect
import math
import types

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


def _equal_steps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
    """The stock grid of a flow model, from equal steps where the pipeline does not say which."""
    if sigmas is None and timesteps is None:
        sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
    type(self).set_timesteps(self, num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)


def _equal_shares(self, num_inference_steps=None, device=None, sigmas=None):
    """Levels at equal shares of the way from sigma_max to sigma_min, then data."""
    type(self).set_timesteps(self, num_inference_steps, device)
    levels = self.config
    warp, back = math.log, math.exp
    if levels.sigma_schedule == "karras":
        warp, back = (lambda s: s ** (1 / levels.rho)), (lambda s: s**levels.rho)
    low, high = warp(levels.sigma_min), warp(levels.sigma_max)
    shares = [1 - i / num_inference_steps for i in range(num_inference_steps)]
    sigmas = torch.tensor([back(low + (high - low) * share) for share in shares])
    self.timesteps = self.precondition_noise(sigmas).to(self.timesteps.device)
    self.sigmas = torch.cat([sigmas, torch.zeros(1)])


def jumping(scheduler, levels: dict):
    """The same scheduler, its grid and steps those of a flow map's jumps."""
    own = {
        "discrete": ("step", _whole_jump),
        "angular": ("step", _angular_jump),
        "flow": ("set_timesteps", _equal_steps),
    }
    name, method = own.get(levels["kind"], ("set_timesteps", _equal_shares))
    made = type(scheduler).from_config(scheduler.config)
    # On the object: some pipelines compare the scheduler's class.
    setattr(made, name, types.MethodType(method, made))
    return made


def flow_map_pipeline(stock: type) -> type:
    """``stock`` with a two-time network: everything is the stock pipeline's own, any number of steps is right.

    The jump's length is read from the scheduler's grid. What the student was guided by is in its weights: guidance is
    off unless it is asked for, which is warned of.
    """

    class FlowMapPipeline(stock):
        __doc__ = flow_map_pipeline.__doc__

        def __call__(self, *args, **kwargs):
            network = self.transformer if getattr(self, "transformer", None) is not None else self.unet
            levels = network.config["flow_map"]
            given = inspect.signature(stock.__call__).bind_partial(self, *args, **kwargs).arguments
            for name, value in levels["call"].items():
                if name not in given:
                    kwargs[name] = value
                elif name == levels["guidance"] and (given[name] or 0.0) > value:
                    logger.warning(f"{name}={given[name]}: guidance is in the student's weights, this adds to it")
            names = list(inspect.signature(type(network).__mro__[2].forward).parameters)
            time_name = next(name for name in names if name in ("timestep", "timesteps", "t"))
            time_index = names.index(time_name) - 1

            def tell(module, inputs, keywords):
                time = keywords[time_name] if time_name in keywords else inputs[time_index]
                time = torch.as_tensor(time).flatten()[:1].float()
                _, length = min(_jumps(self.scheduler, levels), key=lambda jump: abs(jump[0] - float(time)))
                # One length for all samples, however many the network is told a time for.
                return inputs, keywords | {"h": torch.full((1,), length, device=module.device)}

            scheduler, made = self.scheduler, jumping(self.scheduler, levels)
            hook = network.register_forward_pre_hook(tell, with_kwargs=True)
            self.scheduler = made
            try:
                return super().__call__(*args, **kwargs)
            finally:
                hook.remove()
                self.scheduler = scheduler

    # Users and other pipelines look at the parameters.
    FlowMapPipeline.__call__.__signature__ = inspect.signature(stock.__call__)
    return FlowMapPipeline
