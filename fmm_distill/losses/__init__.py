"""The losses, one class per file.

``registered_losses()`` maps the name of each registered loss of the map to its class, and ``matching_losses()`` that of
each loss of distribution matching. The classes of this package are also its attributes
(``fmm_distill.losses.Lagrangian``), imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fmm_distill.losses.base import DerivativeLoss, Jump, Loss, squared_norm
from fmm_distill.losses.critic_loss import critic_loss
from fmm_distill.losses.distribution_matching import MatchingLoss, NoisedSamples, RealData
from fmm_distill.losses.matching_registry import AnyMatchingLoss, matching_losses
from fmm_distill.losses.registry import BUILT_IN, MATCHING, AnyLoss, registered_losses
from fmm_distill.losses.rollout import Rollout
from fmm_distill.losses.time_sampling import TimeSampling
from fmm_distill.losses.weighting import Distance, Weight

__all__ = [
    "AnyLoss",
    "AnyMatchingLoss",
    "DerivativeLoss",
    "Distance",
    "Jump",
    "Loss",
    "MatchingLoss",
    "NoisedSamples",
    "RealData",
    "Rollout",
    "TimeSampling",
    "Weight",
    "critic_loss",
    "matching_losses",
    "registered_losses",
    "squared_norm",
]

_CLASSES = dict(reference.split(":")[::-1] for reference in (BUILT_IN | MATCHING).values())


def __getattr__(name: str) -> Any:  # noqa: ANN401 the class of a loss
    if name not in _CLASSES:
        raise AttributeError(f"module 'fmm_distill.losses' has no attribute {name!r}")
    return getattr(import_module(_CLASSES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_CLASSES])
