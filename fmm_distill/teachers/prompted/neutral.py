"""Keywords of guidance other than classifier-free guidance, and the values that turn them off.

Perturbed attention, skipped blocks, normalized or rescaled outputs, scales that change from step to step: a teacher's
guidance is the plain combination of two outputs, and some of these act even where that one is off.
"""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from inspect import Parameter

__all__ = ["log_neutral", "neutral_keywords"]

logger = logging.getLogger(__name__)

_NEUTRAL: dict[str, float | bool] = {
    # These act without classifier-free guidance too.
    "pag_scale": 0.0,
    "sag_scale": 0.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "audio_guidance_scale": 1.0,
    # These change its result.
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
    "cfg_normalization": False,
    "cfg_normalize": False,
    "enable_cfg_renorm": False,
    "cfg_truncation": 1.0,
    "cfg_trunc_ratio": 1.0,
    "use_dynamic_cfg": False,
    # Fresh noise on the given frames in every step.
    "image_cond_noise_scale": 0.0,
}


def neutral_keywords(parameters: Mapping[str, Parameter]) -> dict[str, float | bool]:
    """Return the keywords that turn other guidance off, of a call with these parameters.

    Keywords that are off by default are left out.
    """
    return {name: value for name, value in _NEUTRAL.items() if name in parameters and parameters[name].default != value}


def log_neutral(pipeline: Any, call: Mapping[str, Any]) -> dict[str, float | bool]:  # noqa: ANN401 a diffusers class
    """Return and log the keywords that turn other guidance of a pipeline off.

    Args:
        call: the keywords that the user gives, which are left as they are.
    """
    found = neutral_keywords(inspect.signature(pipeline.__call__).parameters)
    found = {name: value for name, value in found.items() if name not in call}
    if found:
        shown = ", ".join(f"{name}={value}" for name, value in found.items())
        logger.warning(
            f"{type(pipeline).__name__} is called with {shown}: a teacher's guidance is the plain combination of two "
            "outputs, and its student's pipelines are called alike"
        )
    return found
