"""Keywords whose default makes a teacher another one, and the values that turn them off.

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
}
# These keep a part of an image in the start of sampling, or add noise to it, in every step or before it is encoded.
_PLAIN: dict[str, float | bool] = {"strength": 1.0, "image_cond_noise_scale": 0.0, "noise_aug_strength": 0.0}


def neutral_keywords(parameters: Mapping[str, Parameter]) -> dict[str, float | bool]:
    """Return the keywords that turn other guidance off and start from noise, of a call with these parameters.

    Keywords that are off by default are left out.
    """
    known = _NEUTRAL | _PLAIN
    return {name: value for name, value in known.items() if name in parameters and parameters[name].default != value}


def log_neutral(pipeline: Any, call: Mapping[str, Any]) -> dict[str, float | bool]:  # noqa: ANN401 a diffusers class
    """Return and log the keywords that turn other guidance of a pipeline off, and that make it start from noise.

    Args:
        call: the keywords that the user gives, which are left as they are.
    """
    found = neutral_keywords(inspect.signature(pipeline.__call__).parameters)
    found = {name: value for name, value in found.items() if name not in call}
    reasons = (
        (_NEUTRAL, "a teacher's guidance is the plain combination of two outputs"),
        (_PLAIN, "a teacher's samples start from noise, and its velocity has none"),
    )
    for table, reason in reasons:
        shown = ", ".join(f"{name}={value}" for name, value in found.items() if name in table)
        if shown:
            logger.warning(
                f"{type(pipeline).__name__} is called with {shown}: {reason}, and its student's pipelines are called "
                "alike"
            )
    return found
