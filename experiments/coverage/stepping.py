"""Steps that a stock pipeline makes with a deterministic scheduler of first order, on the time axis."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import diffusers
import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Run", "Step", "first_order", "record_run"]

_FLOW, _EDM = "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"


class _Flow(diffusers.FlowMatchEulerDiscreteScheduler):
    """The stock scheduler with the methods that pipelines of other solvers call."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        return sample


@dataclass(frozen=True)
class Step:
    """A step of a scheduler.

    Attributes:
        t, r: times of its start and its end.
        x: the sample at t, in coordinates of the time axis.
        end: the sample at r, in the same coordinates.
    """

    t: float
    r: float
    x: Tensor
    end: Tensor


@dataclass
class Run:
    """A run of a pipeline.

    Attributes:
        samples: the network's sample argument at each call, as the pipeline passes it.
    """

    steps: list[Step] = field(default_factory=list)
    samples: list[Any] = field(default_factory=list)


def first_order(scheduler: Any) -> Any | None:
    """Return the stock scheduler of first order with the noise levels of ``scheduler``; None: there is none.

    Solvers of higher order and ancestral samplers make no Euler steps. Nothing is clipped.
    """
    # With this entry, another class would replace the values by its own defaults.
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    config.pop("_class_name", None)
    if type(scheduler).__name__ == _FLOW:
        return type(scheduler).from_config(config | {"stochastic_sampling": False})
    if config.get("use_flow_sigmas"):
        return _Flow(num_train_timesteps=config["num_train_timesteps"], shift=config.get("flow_shift", 1.0))
    if "sigma_data" in config:
        made = diffusers.EDMEulerScheduler.from_config(config)
        # The cosine scheduler of Stable Audio passes another function of the noise level to the network.
        one = torch.ones(1)
        return made if torch.equal(made.precondition_noise(one), scheduler.precondition_noise(one)) else None
    if _is_continuous(config):
        return type(scheduler).from_config(config)
    if not hasattr(scheduler, "alphas_cumprod"):
        return None
    video = type(scheduler).__name__.startswith("CogVideoX")
    changes = {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    made = (diffusers.CogVideoXDDIMScheduler if video else diffusers.DDIMScheduler).from_config(config | changes)
    # Pipelines split a learned variance off unless their scheduler takes it.
    made.register_to_config(variance_type="fixed_small")
    return made


def _is_continuous(config: Any) -> bool:
    """Return whether a scheduler makes Euler steps on continuous levels, whatever its table of levels has."""
    return config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"


def record_run(pipeline: Any, component: str, sample: str, call: dict[str, Any]) -> Run:
    """Run a pipeline whose scheduler is one of ``first_order``, and return its steps.

    Args:
        component: the name of the network in the pipeline.
        sample: the name of the network's sample argument.
    """
    run, network = Run(), getattr(pipeline, component)
    owner = type(pipeline.scheduler)
    original = owner.step

    @functools.wraps(original)
    def step(scheduler: Any, *args: Any, **given: Any) -> Any:
        start = (args[2] if len(args) > 2 else given["sample"]).clone()
        made = original(scheduler, *args, **given)
        timestep = args[1] if len(args) > 1 else given["timestep"]
        t, r, scales = _levels(scheduler, timestep)
        end = made[0] if isinstance(made, tuple) else made.prev_sample
        run.steps.append(Step(t, r, start / scales[0], end.clone() / scales[1]))
        return made

    def before(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        value = given.get(sample, args[0] if args else None)
        run.samples.append(torch.stack(list(value)) if isinstance(value, list) else value.clone())

    # Of the class, since pipelines copy their scheduler: a method of the object would step the original. No subclass,
    # since some pipelines compare the class.
    owner.step = step
    hook = network.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with torch.no_grad():
            pipeline(**call)
    finally:
        hook.remove()
        owner.step = original
    return run


def _levels(scheduler: Any, timestep: Any) -> tuple[float, float, tuple[float, float]]:
    """Return the times at both ends of the step just made, and the scales from the time axis to the samples."""
    continuous = _is_continuous(scheduler.config)
    if hasattr(scheduler, "alphas_cumprod") and not continuous:
        timestep = int(timestep)
        before = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        last = scheduler.final_alpha_cumprod
        pairs = [float(scheduler.alphas_cumprod[k].double() if k >= 0 else last) for k in (timestep, before)]
        (a, s), (b, q) = [(level**0.5, (1 - level) ** 0.5) for level in pairs]
        return s / (a + s), q / (b + q), (a + s, b + q)
    index = scheduler.step_index
    sigma, after = (float(scheduler.sigmas[k]) for k in (index - 1, index))
    if continuous or hasattr(scheduler, "precondition_inputs"):
        return sigma / (1 + sigma), after / (1 + after), (1 + sigma, 1 + after)
    if scheduler.config.get("invert_sigmas"):
        sigma, after = 1 - sigma, 1 - after
    return sigma, after, (1.0, 1.0)
