"""Stock schedulers with a teacher's noise levels, for exports: the levels are the teacher's, every switch is set."""

from __future__ import annotations

import inspect
import json
import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import diffusers

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fmm_distill.core.schedules import FlowMatching, Schedule
    from fmm_distill.core.time_axis import Prediction
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.pipeline import StockPipeline

__all__ = ["LEVELS", "SWITCHES", "make_scheduler", "settings_of", "why_levels_do_not_fold"]

# The trailing grid has no offset, but pipelines of Stable Diffusion warn of another one than their own.
_BETAS = frozenset(
    {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
        "steps_offset",
    }
)
# Of each stock class the settings that make its noise levels: these are the teacher's.
LEVELS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "DDIMScheduler": _BETAS,
        "CogVideoXDDIMScheduler": _BETAS | {"snr_shift_scale"},
        "FlowMatchEulerDiscreteScheduler": frozenset(
            {
                "num_train_timesteps",
                "shift",
                "use_dynamic_shifting",
                "base_shift",
                "max_shift",
                "base_image_seq_len",
                "max_image_seq_len",
                "time_shift_type",
                "invert_sigmas",
            }
        ),
        "EDMEulerScheduler": frozenset(
            {"num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho"}
        ),
        "ScoreSdeVeScheduler": frozenset({"num_train_timesteps", "sigma_min", "sigma_max"}),
        "IPNDMScheduler": frozenset({"num_train_timesteps", "trained_betas"}),
    }
)
# The trailing grid starts at the last timestep, and a jump ends in data: nothing is clipped, no step is stochastic.
_PLAIN = {
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
# The settings that change how a scheduler steps and which levels it picks: a jump has its own, whatever the teacher's.
SWITCHES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "DDIMScheduler": _PLAIN | {"thresholding": False, "dynamic_thresholding_ratio": 0.995},
        "CogVideoXDDIMScheduler": _PLAIN,
        "FlowMatchEulerDiscreteScheduler": {
            # Stretched to a last level, a grid of one step divides by zero; its last step is empty anyway.
            "shift_terminal": None,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "stochastic_sampling": False,
        },
        "EDMEulerScheduler": {"final_sigmas_type": "zero"},
        "ScoreSdeVeScheduler": {"snr": 0.15, "sampling_eps": 1e-5, "correct_steps": 1},
        "IPNDMScheduler": {},
    }
)
_OF_PREDICTION = "prediction_type"


def make_scheduler(teacher: Teacher, prediction: Prediction, equal_steps: int | None = None) -> Any:  # noqa: ANN401
    """Make a stock scheduler of first order with the teacher's levels; nothing is clipped, no step is stochastic.

    Args:
        prediction: what the student's network predicts.
        equal_steps: the number of steps of which the stock grid makes equal jumps, two or more of a flow model. The
            grids of flow models and of exploding levels go down to the first timestep, so that their last step would be
            almost empty.

    Raises:
        UserError: if the installed diffusers has a setting of the scheduler that is not known here, and the teacher
            sets it.
    """
    return _MAKERS[teacher.schedule.kind](teacher, prediction, equal_steps)


def _discrete(teacher: Teacher, prediction: Prediction, equal_steps: int | None) -> Any:  # noqa: ANN401 diffusers
    config = teacher.scheduler_config
    name = "CogVideoXDDIMScheduler" if config["_class_name"].startswith("CogVideoX") else "DDIMScheduler"
    made = _made(name, config, {_OF_PREDICTION: prediction})
    if _reads_variance(teacher.pipeline):
        # The pipeline splits the learned variance off unless its scheduler takes it.
        made.register_to_config(variance_type="fixed_small")
    return made


def _angular(teacher: Teacher, prediction: Prediction, equal_steps: int | None) -> Any:  # noqa: ANN401 diffusers
    return _made("IPNDMScheduler", teacher.scheduler_config, {})


def _exploding(teacher: Teacher, prediction: Prediction, equal_steps: int | None) -> Any:  # noqa: ANN401 diffusers
    if prediction == "score":
        return _made("ScoreSdeVeScheduler", teacher.scheduler_config, {})
    changes: dict[str, Any] = {_OF_PREDICTION: prediction}
    if equal_steps is not None:
        # Its steps are equal from sigma_max to sigma_min, and one more goes to data: that is the last of ours.
        last = float(teacher.schedule.grid(equal_steps)[-2])
        changes["sigma_min"] = last / (1 - last)
    return _made("EDMEulerScheduler", teacher.scheduler_config, changes)


def _flow(teacher: Teacher, prediction: Prediction, equal_steps: int | None) -> Any:  # noqa: ANN401 diffusers
    config, name = teacher.scheduler_config, "FlowMatchEulerDiscreteScheduler"
    schedule = cast("FlowMatching", teacher.schedule)
    if config["_class_name"] != name:
        config = {"num_train_timesteps": schedule.time_scale, "shift": schedule.shift}
    if equal_steps is None:
        return _made(name, config, {})
    changes = {"shift_terminal": float(schedule.grid(equal_steps)[-2])}
    shift = None if config.get("use_dynamic_shifting") else _shift_of_equal_jumps(schedule, equal_steps)
    return _made(name, config, changes | ({} if shift is None else {"shift": shift}))


def _shift_of_equal_jumps(schedule: FlowMatching, steps: int) -> float | None:
    """Return the shift with which the stretched grid of the stock scheduler has equal jumps; None: there is none.

    The scheduler shifts equal steps from 1 to its first level and stretches the result, and equal jumps are another
    shift of equal steps. Both are quotients of linear functions of the step's number i, with the value 1 at i = 0, and
    the stretching makes them equal at the last i. They are equal for every i where their poles are:
    ``c k^2 - (1 - c)(T - 1) k + T - 1 = 0`` for the shift k, T timesteps and ``c = (1 - 1 / shift)(N - 1) / N``.
    """
    most = schedule.time_scale - 1
    if most == 0:
        # The grid of the scheduler is a single level, so that the pipeline has its own.
        return None
    c = (1 - 1 / schedule.shift) * (steps - 1) / steps
    half = (1 - c) * most / 2
    if (root := half**2 - c * most) < 0:
        return None
    # The smaller root in the form that does not cancel, which also holds at c = 0.
    return most / (half + math.sqrt(root))


# One per ``kind`` of a schedule.
_MAKERS: Mapping[str, Callable[[Teacher, Prediction, int | None], Any]] = MappingProxyType(
    {"discrete": _discrete, "angular": _angular, "exploding": _exploding, "flow": _flow}
)


def _reads_variance(pipeline: StockPipeline | None) -> bool:
    """Decide whether a pipeline reads ``variance_type`` of its scheduler without a default."""
    code = "" if pipeline is None else pipeline.code
    return "scheduler.config.variance_type" in code and 'config, "variance_type")' not in code


def _made(name: str, config: Mapping[str, Any], changes: dict[str, Any]) -> Any:  # noqa: ANN401 a diffusers class
    kind = getattr(diffusers, name)
    # Nothing else of the teacher's scheduler: it may be of another class, with switches of its own.
    levels = {key: value for key, value in config.items() if key in LEVELS[name]}
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    for parameter in parameters:
        key = parameter.name
        known = key in LEVELS[name] or key in SWITCHES[name] or key in changes
        if not known and config.get(key, parameter.default) != parameter.default:
            raise UserError(
                f"the teacher's scheduler sets {key}: {config[key]!r}, a setting of {name} in diffusers "
                f"{diffusers.__version__} that this version does not know; try the diffusers of constraints.txt"
            )
    return kind(**(levels | dict(SWITCHES[name]) | changes))


def settings_of(scheduler: Any) -> dict[str, Any]:  # noqa: ANN401 a diffusers class
    """Return a scheduler's configuration as JSON, without the settings of the teacher's class that it ignores."""
    settings: dict[str, Any] = json.loads(scheduler.to_json_string())
    own = inspect.signature(type(scheduler).__init__).parameters
    return {name: value for name, value in settings.items() if name == "_class_name" or name in own}


def why_levels_do_not_fold(schedule: Schedule) -> str | None:
    """Return the reason why no stock scheduler steps by the jumps of a student of this schedule; None: one does."""
    return None if schedule.folds else _NOT_FOLDED[schedule.kind]


_NOT_FOLDED = {
    "angular": "of the stock schedulers IPNDM alone has these noise levels, and its steps mix several network calls",
    "exploding": "no stock pipeline steps through a variance-exploding schedule by one network call per jump",
}
