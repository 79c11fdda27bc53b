"""From a diffusers scheduler to the schedule and the prediction of its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import diffusers
import torch

from fmm_distill.core.schedules import FlowMatching, VarianceExploding, VariancePreserving
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from fmm_distill.core.schedules import Schedule
    from fmm_distill.core.time_axis import Prediction

__all__ = ["CONTINUOUS", "DISCRETE", "FLOW", "SCHEDULERS", "ScheduleSpec", "read_scheduler"]

# Discrete, variance preserving: they have alphas_cumprod.
DISCRETE = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
    # These walk in x / alpha and hand the network x again, at the same timesteps.
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
# The same with levels that no DDIMScheduler makes.
_VIDEO = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
CONTINUOUS = (
    "ScoreSdeVeScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CosineDPMSolverMultistepScheduler",
)
SCHEDULERS = (*DISCRETE, *_VIDEO, *FLOW, *CONTINUOUS)
_NO_FIELD = {
    "CMStochasticIterativeScheduler": "a consistency model's network is a map to data already, not a denoiser",
    "LCMScheduler": "a latent consistency model is a map to data already, not a denoiser",
    "TCDScheduler": "a trajectory consistency model is a flow map already",
    "FlowMapEulerDiscreteScheduler": "this is a flow map already",
    "FlowMatchLCMScheduler": "a latent consistency model is a map to data already, not a denoiser",
    "SCMScheduler": "a continuous-time consistency model is a map to data already",
}


@dataclass(frozen=True)
class ScheduleSpec:
    """What a scheduler says of its teacher.

    Attributes:
        sigma_data: of Karras's preconditioning, where the scheduler applies it.
        inverted: the scheduler's own time runs from noise at 0 to data, and its velocity the other way.
    """

    schedule: Schedule
    prediction: Prediction
    config: dict[str, Any]
    sigma_data: float | None = None
    inverted: bool = False


def read_scheduler(
    scheduler: Any,  # noqa: ANN401 a diffusers class
    source: str,
    *,
    shift: float | None = None,
    uses_unshifted_time: bool = False,
) -> ScheduleSpec:
    """The levels of a scheduler, and its configuration whole.

    Args:
        shift: of a flow model whose scheduler takes it at every call (dynamic shifting).
        uses_unshifted_time: a flow model's network is told the time before the shift.

    Raises:
        UserError: on a scheduler, or settings of one, that can't be read exactly.
    """
    name = type(scheduler).__name__
    if name in _NO_FIELD:
        raise UserError(f"{source}: scheduler {name}: {_NO_FIELD[name]}; wanted the model that it was distilled from")
    if name not in SCHEDULERS:
        raise UserError(
            f"{source}: scheduler {name}; wanted one of {', '.join(SCHEDULERS)}: "
            "save the pipeline with one of them if its schedule is the same, or add a teacher (docs/add-a-teacher.md)"
        )
    # Without this list another class takes what is written, not its own defaults.
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    if name in FLOW or config.get("use_flow_sigmas"):
        return _flow(config, source, shift, uses_unshifted_time)
    if name in CONTINUOUS:
        return _exploding(name, config, source)
    return _preserving(scheduler, config, source)


def _prediction(config: dict[str, Any], known: tuple[str, ...], source: str) -> Prediction:
    prediction = config["prediction_type"]
    if config.get("predict_epsilon") is False and prediction == "epsilon":
        # The name of 2022, which stock diffusers reads no more.
        raise UserError(
            f"{source}: predict_epsilon: false in scheduler_config.json, which diffusers ignores, so that a prediction "
            "of the sample would be read as noise; write prediction_type: sample in its place"
        )
    if prediction not in known:
        raise UserError(f"{source}: prediction_type {prediction!r}; wanted one of {', '.join(known)}")
    return cast("Prediction", prediction)


def _flow(config: dict[str, Any], source: str, shift: float | None, uses_unshifted_time: bool) -> ScheduleSpec:
    if "use_flow_sigmas" in config:
        _prediction(config, ("flow_prediction",), source)
        shift = config["flow_shift"] if shift is None else shift
    elif config.get("use_dynamic_shifting") and shift is None:
        raise UserError(f"{source}: its scheduler is shifted by the pipeline at every call; wanted the whole pipeline")
    shift = config["shift"] if shift is None else shift
    schedule = FlowMatching(shift, config["num_train_timesteps"], uses_unshifted_time=uses_unshifted_time)
    return ScheduleSpec(schedule, "flow_prediction", config, inverted=bool(config.get("invert_sigmas")))


def _exploding(name: str, config: dict[str, Any], source: str) -> ScheduleSpec:
    ends, steps = (config["sigma_min"], config["sigma_max"]), config["num_train_timesteps"]
    if name == "ScoreSdeVeScheduler":
        schedule = VarianceExploding(*ends, rho=math.inf, network_input="sigma", num_timesteps=steps)
        return ScheduleSpec(schedule, "score", config)
    rho = config["rho"] if config["sigma_schedule"] == "karras" else math.inf
    network_input: Literal["atan", "log"] = "atan" if name == "CosineDPMSolverMultistepScheduler" else "log"
    schedule = VarianceExploding(*ends, rho=rho, network_input=network_input, num_timesteps=steps)
    prediction = _prediction(config, ("epsilon", "v_prediction"), source)
    return ScheduleSpec(schedule, prediction, config, sigma_data=config["sigma_data"])


def _preserving(scheduler: Any, config: dict[str, Any], source: str) -> ScheduleSpec:  # noqa: ANN401 a diffusers class
    prediction = _prediction(config, ("epsilon", "sample", "v_prediction"), source)
    if config.get("timestep_type") == "continuous":
        raise UserError(
            f"{source}: {type(scheduler).__name__} with timestep_type: continuous; wanted a discrete schedule (not yet)"
        )
    products = scheduler.alphas_cumprod.clone()
    if config.get("rescale_betas_zero_snr"):
        # Some schedulers keep a small number here, larger than the one before it.
        products[-1] = 0
    schedule = VariancePreserving(products)
    if type(scheduler).__name__ not in _VIDEO:
        _check_stock(scheduler, config, source)
    if prediction == "epsilon" and schedule.t_max == 1:
        raise UserError(
            f"{source}: its schedule ends in pure noise (rescale_betas_zero_snr), where a noise prediction says "
            "nothing; wanted v_prediction or sample"
        )
    return ScheduleSpec(schedule, prediction, config)


def _check_stock(scheduler: Any, config: dict[str, Any], source: str) -> None:  # noqa: ANN401 a diffusers class
    """The stock DDIM scheduler must make the same schedule: students are evaluated beside it and exported with it."""
    try:
        stock = diffusers.DDIMScheduler.from_config(config)
    except NotImplementedError as error:
        raise UserError(f"{source}: {error}; wanted a schedule that the stock DDIM scheduler can make") from error
    if not torch.allclose(stock.alphas_cumprod[:-1], scheduler.alphas_cumprod[:-1], rtol=1e-4, atol=0):
        raise UserError(
            f"{source}: the stock DDIM scheduler makes another schedule of this configuration "
            f"(beta_schedule {config.get('beta_schedule')}); wanted one that it can make"
        )
