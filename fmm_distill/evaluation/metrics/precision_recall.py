"""Improved precision and recall."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fmm_distill.evaluation.metrics.base import FeatureMetric, Value

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["MAX_COMPARED", "NEIGHBORS", "QUICK_COMPARED", "PrecisionRecall", "compared_samples"]

# The value of the paper.
NEIGHBORS = 3
# All pairs of distances are needed: time grows with the square.
MAX_COMPARED = 10_000
# During training: with the 2048 features of Inception, a second per row on one core.
QUICK_COMPARED = 1024
# Rows of a block of distances: 1024 x 10,000 float64 distances are 80 MB.
_BLOCK = 1024


def compared_samples(samples: int, images: int, most: int = MAX_COMPARED) -> int:
    """Return the number of samples, and of images, that are compared."""
    return min(most, samples, images)


class PrecisionRecall(FeatureMetric):
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).

    Precision is the fraction of samples within the manifold of the reference, recall the fraction of the reference
    within the manifold of the samples. The manifold of a set is the union of balls around its members, each with the
    distance to its third neighbor as radius.

    Args:
        most: the largest number of samples, and of images, that are compared.
    """

    quantities = ("precision", "recall")

    def __init__(self, reference: Float[Tensor, "images d"], samples: int, *, most: int = MAX_COMPARED) -> None:
        super().__init__(reference, samples)
        self.compared = compared_samples(samples, len(reference), most)
        self._real: tuple[Tensor, Tensor] | None = None

    def _measure(self, values: Float[Tensor, "samples d"]) -> dict[str, Value]:
        # Equally many of both sets: radii shrink with the number of points, and with them the fractions.
        fake = values[: self.compared].double()
        if self._real is None:
            # Spread over the reference, since a dataset may be sorted by class.
            index = torch.linspace(0, len(self.reference) - 1, self.compared, dtype=torch.float64).round().long()
            centers = self.reference[index]
            self._real = centers, _radii(centers)
        real, radii = self._real
        fractions = {
            "precision": _fraction_within(fake, real, radii),
            "recall": _fraction_within(real, fake, _radii(fake)),
        }
        return {name: Value(p, math.sqrt(p * (1 - p) / self.compared)) for name, p in fractions.items()}


def _radii(points: Float[Tensor, "count d"]) -> Float[Tensor, " count"]:
    """Return the distance from each point to its third neighbor; the nearest point is the point itself."""
    nearest = min(NEIGHBORS, len(points) - 1) + 1
    found = [torch.cdist(part, points).topk(nearest, largest=False).values[:, -1] for part in points.split(_BLOCK)]
    return torch.cat(found)


def _fraction_within(
    points: Float[Tensor, "count d"], centers: Float[Tensor, "others d"], radii: Float[Tensor, " others"]
) -> float:
    """Return the fraction of the points that are in at least one ball."""
    inside = [(torch.cdist(part, centers) <= radii).any(1) for part in points.split(_BLOCK)]
    return torch.cat(inside).double().mean().item()
