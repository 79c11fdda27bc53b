"""The schedule and the prediction of a teacher, read from its diffusers scheduler."""

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

__all__ = ["CONTINUOUS", "DISCRETE", "FLOW", "SCHEDULERS", "ScheduleSpec", "check_no_map", "read_scheduler"]

# Discrete and variance preserving: they have alphas_cumprod.
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
    # These step in x / alpha, and call the network with x at the same timesteps.
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
# The same, with noise levels that DDIMScheduler does not support.
_VIDEO = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
CONTINUOUS = (
    "ScoreSdeVeScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CosineDPMSolverMultistepScheduler",
)
SCHEDULERS = (*DISCRETE, *_VIDEO, *FLOW, *CONTINUOUS)
# Their networks are maps already: they have no velocity field to distill.
_MAPS = {
    "CMStochasticIterativeScheduler": "a consistency model",
    "LCMScheduler": "a latent consistency model",
    "TCDScheduler": "a trajectory consistency model",
    "FlowMapEulerDiscreteScheduler": "a flow map",
    "FlowMatchLCMScheduler": "a latent consistency model",
    "SCMScheduler": "a continuous-time consistency model",
}


@dataclass(frozen=True)
class ScheduleSpec:
    """The schedule and the prediction of a teacher.

    Attributes:
        config: the configuration of the scheduler, or of the stock one that steps alike.
        sigma_data: of the preconditioning of Karras et al. 2022, if the scheduler applies it.
        inverted: the scheduler's time runs from noise at 0 to data, and the network predicts the reverse velocity.
    """

    schedule: Schedule
    prediction: Prediction
    config: dict[str, Any]
    sigma_data: float | None = None
    inverted: bool = False


def check_no_map(name: str, source: str) -> None:
    """Check that a scheduler is not one of networks that are maps already.

    Args:
        name: of its class.
        source: the id or folder of the teacher, for messages.

    Raises:
        UserError: otherwise.
    """
    if name in _MAPS:
        raise UserError(
            f"{source}: expected a denoiser, got {_MAPS[name]} (scheduler {name}), which is a map already; try the "
            "model that it was distilled from"
        )


def read_scheduler(
    scheduler: Any,  # noqa: ANN401 a diffusers class
    source: str,
    *,
    shift: float | None = None,
    uses_unshifted_time: bool = False,
) -> ScheduleSpec:
    """Read the schedule and the prediction of a scheduler.

    Args:
        source: the id or folder of the teacher, for messages.
        shift: of a flow model whose pipeline passes it to the scheduler at every call (dynamic shifting).
        uses_unshifted_time: the network of a flow model takes the time before the shift.

    Raises:
        UserError: if the scheduler or one of its settings has no exact counterpart.
    """
    name = type(scheduler).__name__
    check_no_map(name, source)
    if name not in SCHEDULERS:
        raise UserError(
            f"{source}: scheduler {name}; expected one of {', '.join(SCHEDULERS)}; try to save the pipeline with one "
            "of them if its schedule is the same, or write an adapter (docs/add-a-teacher.md)"
        )
    # With this entry, another scheduler class would replace the values by its own defaults.
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    # A scheduler that its pipeline made itself, or from the configuration of another one, does not name its own class.
    config["_class_name"] = name
    if name in FLOW or config.get("use_flow_sigmas"):
        return _flow(config, source, shift, uses_unshifted_time)
    if name in CONTINUOUS:
        return _exploding(name, config, source)
    # With other predictions the scheduler ignores the setting.
    if config.get("timestep_type") == "continuous" and config["prediction_type"] == "v_prediction":
        return _exploding("EDMEulerScheduler", _edm_config(scheduler, config), source)
    return _preserving(scheduler, config, source)


def _prediction(config: dict[str, Any], known: tuple[str, ...], source: str) -> Prediction:
    prediction = config["prediction_type"]
    if config.get("predict_epsilon") is False and prediction == "epsilon":
        # A setting of 2022 that diffusers ignores: it would read a prediction of the sample as noise.
        raise UserError(
            f"{source}: expected prediction_type in scheduler_config.json, got predict_epsilon: false, which diffusers "
            "ignores; try prediction_type: sample"
        )
    if prediction not in known:
        raise UserError(f"{source}: prediction_type {prediction!r}; expected one of {', '.join(known)}")
    return cast("Prediction", prediction)


def _flow(config: dict[str, Any], source: str, shift: float | None, uses_unshifted_time: bool) -> ScheduleSpec:
    if "use_flow_sigmas" in config:
        _prediction(config, ("flow_prediction",), source)
        # The solvers that also support flow models call the same setting flow_shift.
        shift = config["flow_shift"] if shift is None else shift
    elif config.get("use_dynamic_shifting") and shift is None:
        raise UserError(
            f"{source}: expected the complete pipeline, which passes a shift to this scheduler at every call; try to "
            "save it with save_pretrained"
        )
    shift = config["shift"] if shift is None else shift
    schedule = FlowMatching(shift, config["num_train_timesteps"], uses_unshifted_time=uses_unshifted_time)
    return ScheduleSpec(schedule, "flow_prediction", config, inverted=bool(config.get("invert_sigmas")))


def _exploding(name: str, config: dict[str, Any], source: str) -> ScheduleSpec:
    ends, steps = (config["sigma_min"], config["sigma_max"]), config["num_train_timesteps"]
    if name == "ScoreSdeVeScheduler":
        schedule = VarianceExploding(*ends, rho=math.inf, network_input="sigma", num_timesteps=steps)
        return ScheduleSpec(schedule, "score", config)
    # An infinite rho is the exponential schedule: equal steps of log sigma.
    rho = config["rho"] if config["sigma_schedule"] == "karras" else math.inf
    network_input: Literal["atan", "log"] = "atan" if name == "CosineDPMSolverMultistepScheduler" else "log"
    schedule = VarianceExploding(*ends, rho=rho, network_input=network_input, num_timesteps=steps)
    prediction = _prediction(config, ("epsilon", "v_prediction"), source)
    return ScheduleSpec(schedule, prediction, config, sigma_data=config["sigma_data"])


def _edm_config(scheduler: Any, config: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 a diffusers class
    """Return the EDMEulerScheduler that is an EulerDiscreteScheduler with continuous timesteps.

    Their network is called with x / (sigma^2 + 1)^(1/2) at log(sigma) / 4, and has the output of v prediction: the
    preconditioning of Karras et al. 2022 (arXiv 2206.00364, table 1) for data of deviation 1.
    """
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    karras = bool(config.get("use_karras_sigmas"))
    ends = {"sigma_min": float(levels.min()), "sigma_max": float(levels.max())}
    if karras or config.get("use_exponential_sigmas") or config.get("use_beta_sigmas"):
        # Without these the scheduler does not read its own ends.
        ends = {name: end if config.get(name) is None else config[name] for name, end in ends.items()}
    return ends | {
        "_class_name": "EDMEulerScheduler",
        "num_train_timesteps": config["num_train_timesteps"],
        "prediction_type": "v_prediction",
        "sigma_data": 1.0,
        "sigma_schedule": "karras" if karras else "exponential",
        # The scheduler's own constant.
        "rho": 7.0,
    }


def _preserving(scheduler: Any, config: dict[str, Any], source: str) -> ScheduleSpec:  # noqa: ANN401 a diffusers class
    prediction = _prediction(config, ("epsilon", "sample", "v_prediction"), source)
    # A copy: the scheduler still runs in its pipeline.
    products = scheduler.alphas_cumprod.clone()
    if config.get("rescale_betas_zero_snr"):
        # Some schedulers store 2^-24 in place of 0, which can be larger than the entry before it.
        products[-1] = 0
    schedule = VariancePreserving(products)
    if type(scheduler).__name__ not in _VIDEO:
        _check_stock(scheduler, config, source)
    # The data would be a quotient by alpha, which is 0 there.
    if prediction == "epsilon" and schedule.t_max == 1:
        raise UserError(
            f"{source}: expected v_prediction or sample for a schedule that ends in pure noise "
            "(rescale_betas_zero_snr), got epsilon, which is undefined there; try another prediction_type"
        )
    return ScheduleSpec(schedule, prediction, config)


def _check_stock(scheduler: Any, config: dict[str, Any], source: str) -> None:  # noqa: ANN401 a diffusers class
    """Check that DDIMScheduler has the same noise levels: students are compared with it and exported with it."""
    try:
        stock = diffusers.DDIMScheduler.from_config(config)
    except NotImplementedError as error:
        raise UserError(f"{source}: {error}; expected a schedule that DDIMScheduler supports") from error
    # The last entry is left out: it differs under rescale_betas_zero_snr.
    # A relative tolerance, since the last levels are as small as 4e-5.
    if not torch.allclose(stock.alphas_cumprod[:-1], scheduler.alphas_cumprod[:-1], rtol=1e-4, atol=0):
        raise UserError(
            f"{source}: expected the noise levels of DDIMScheduler with the same configuration, got others "
            f"(beta_schedule {config.get('beta_schedule')}); try a beta_schedule that DDIMScheduler supports"
        )
