"""The losses, one class per file.

``registered_losses()`` maps the name of each registered loss to its class. The classes of this package
are also its attributes (``fmm_distill.losses.Lagrangian``), imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fmm_distill.losses.base import DerivativeLoss, Jump, Loss, squared_norm
from fmm_distill.losses.registry import BUILT_IN, AnyLoss, registered_losses
from fmm_distill.losses.time_sampling import TimeSampling
from fmm_distill.losses.weighting import Distance, Weight

__all__ = [
    "AnyLoss",
    "DerivativeLoss",
    "Distance",
    "Jump",
    "Loss",
    "TimeSampling",
    "Weight",
    "registered_losses",
    "squared_norm",
]

_CLASSES = dict(reference.split(":")[::-1] for reference in BUILT_IN.values())


def __getattr__(name: str) -> Any:  # noqa: ANN401 the class of a loss
    if name not in _CLASSES:
        raise AttributeError(f"module 'fmm_distill.losses' has no attribute {name!r}")
    return getattr(import_module(_CLASSES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_CLASSES])
