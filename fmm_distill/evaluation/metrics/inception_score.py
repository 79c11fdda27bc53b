"""The inception score."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fmm_distill.evaluation.metrics.base import GivenFeatures, Metric, Value, quiet_and_seeded

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["SPLITS", "InceptionScore"]

# As in published scores.
SPLITS = 10


class InceptionScore(Metric):
    """Exponential of the mean divergence between a sample's classes and all (Salimans et al., arXiv 1606.03498).

    Batches are class scores before the softmax, shape ``[batch, classes]``. The value is the mean over ten splits, and
    the standard error is that of this mean.
    """

    quantities = ("inception_score",)

    def _measure(self, values: Float[Tensor, "samples classes"]) -> dict[str, Value]:
        from torchmetrics.image.inception import InceptionScore as TorchInceptionScore

        splits = min(SPLITS, len(values) // 2)
        with quiet_and_seeded():
            metric = TorchInceptionScore(GivenFeatures(values.shape[1]), splits=splits, sync_on_compute=False)
            metric.update(values.double())
            value, deviation = metric.compute()
        error = float(deviation) / math.sqrt(splits) if splits > 1 else None
        return {"inception_score": Value(float(value), error)}
