"""The kernel distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmm_distill.evaluation.metrics.base import FeatureMetric, GivenFeatures, Value, quiet_and_seeded

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["SUBSETS", "KernelDistance", "kernel_distance", "subset_size"]

SUBSETS = 10
MAX_SUBSET = 1000
# The error needs all pairs of these samples: time and memory grow with the square.
MAX_PAIRED = 2000


def subset_size(samples: int, images: int) -> int:
    """Return the number of samples in each subset: half of the smaller set, so that subsets differ."""
    return min(MAX_SUBSET, samples // 2, images // 2)


class KernelDistance(FeatureMetric):
    """Squared maximum mean discrepancy with a cubic kernel (Bińkowski et al., arXiv 1801.01401), as in KID.

    The value is the mean over subsets that are drawn with one seed.
    """

    quantities = ("kid",)

    def __init__(self, reference: Float[Tensor, "images d"], samples: int) -> None:
        super().__init__(reference, samples)
        self.subset = subset_size(samples, len(reference))

    def _measure(self, values: Float[Tensor, "samples d"]) -> dict[str, Value]:
        features = values.double()
        distance = kernel_distance(self.reference, features, SUBSETS, self.subset)
        return {"kid": Value(distance, self._error(features))}

    def _error(self, features: Float[Tensor, "samples d"]) -> float:
        """Return the standard error by the two terms of a U-statistic's variance (Hoeffding's decomposition)."""
        # The first ones: samples of independent noises have no order.
        some = features[:MAX_PAIRED]
        # A U-statistic leaves out the pairs of a sample with itself.
        among = _cubic(some, some).fill_diagonal_(0)
        count = len(some)
        rows, mean = among.sum(1) / (count - 1), among.sum() / (count * (count - 1))
        pairs = (among - rows[:, None] - rows[None, :] + mean).fill_diagonal_(0).square().sum() / (count * (count - 1))
        single = rows - _cubic(some, self.reference).mean(1)
        # The variance of the row means contains a part of the pairs'; the estimate can fall below 0.
        first = (single.var() - pairs / count).clamp_min(0)

        def variance(size: int) -> Tensor:
            return 4 * first / size + 2 * pairs / size**2

        everything, subset = variance(len(features)), variance(self.subset)
        # Subsets of one set share samples: only the excess over the variance of the set averages out.
        return float((everything + (subset - everything).clamp_min(0) / SUBSETS).sqrt())


def kernel_distance(
    reference: Float[Tensor, "images d"], features: Float[Tensor, "samples d"], subsets: int, size: int
) -> float:
    """Return the mean kernel distance over subsets of both sets, by torchmetrics."""
    from torchmetrics.image.kid import KernelInceptionDistance

    with quiet_and_seeded():
        metric = KernelInceptionDistance(
            GivenFeatures(features.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
        metric.update(reference, real=True)
        metric.update(features, real=False)
        return float(metric.compute()[0])


def _cubic(one: Float[Tensor, "count d"], other: Float[Tensor, "others d"]) -> Float[Tensor, "count others"]:
    """Return the default kernel of torchmetrics: ``(x . y / d + 1)^3``."""
    return (one @ other.T / one.shape[1] + 1) ** 3
