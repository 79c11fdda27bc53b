"""Distances between two sets of features, and scores of one: computed from the same features, which are seen once.

Values come from torchmetrics where it has the metric, in float64. Standard errors say how much a value would move with
other noises: from resamples of the samples, the reference stays as it is.
"""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from fmm_distill.errors import FmmDistillError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float
    from torch import Tensor
    from torchmetrics.image.fid import FrechetInceptionDistance

__all__ = ["ImageMetrics", "Value", "rms_error"]

NEIGHBORS = 3
SPLITS = 10
SUBSETS = 10
# A resample leaves out one in so many samples.
LEFT_OUT = 10
# Precision and recall need all pairs of distances.
MOST_NEIGHBORS = 10_000
MOST_SUBSET = 1000
# Samples whose pairs say how uncertain a kernel distance is.
MOST_PAIRS = 2000
# Above this many features a resample takes seconds.
_WIDE = 512
_CHUNK = 1024


@dataclass(frozen=True)
class Value:
    """A number and its standard error; None: not known."""

    value: float
    error: float | None


class _Given(nn.Module):
    """The feature network of a torchmetrics metric that is handed features."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, features: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        """What came."""
        return features


class ImageMetrics:
    """What samples are measured with against the features of a reference.

    Args:
        reference: shape ``[images, d]``.
        samples: how many will be measured; others are refused.
    """

    def __init__(self, reference: Float[Tensor, "images d"], samples: int) -> None:
        self.reference, self.samples = reference.double(), samples
        count, width = reference.shape
        self.subset = min(MOST_SUBSET, samples // 2, count // 2)
        self.neighbors = min(MOST_NEIGHBORS, samples, count)
        self.resamples = 50 if width <= _WIDE else 20
        self._frechet = _frechet_metric(width)
        self._frechet.update(self.reference, real=True)
        self._mean, covariance = _moments(self.reference)
        self._root, self._trace = _square_root(covariance), covariance.trace()
        self._near: Tensor | None = None
        self._radii: Tensor | None = None

    def check(self, features: Float[Tensor, "samples d"]) -> None:
        """Refuse another count of samples than asked for: a Fréchet distance falls with it.

        Raises:
            FmmDistillError: with both counts.
        """
        if len(features) != self.samples:
            raise FmmDistillError(
                f"{len(features)} samples were made, evaluation.samples is {self.samples}: distances of different "
                "counts can't be compared, and none is given"
            )

    def frechet(self, features: Float[Tensor, "samples d"], *, with_error: bool = True) -> Value:
        """Fréchet distance of two Gaussians with the sets' means and covariances (Heusel et al., arXiv 1706.08500)."""
        self.check(features)
        features = features.double()
        self._frechet.reset()
        self._frechet.update(features, real=False)
        value = float(self._frechet.compute())
        if not with_error:
            return Value(value, None)
        # Resamples without replacement: those with it, whose doubles narrow the covariance, say up to twice as much.
        generator = torch.Generator().manual_seed(0)
        count = len(features)
        kept = count - max(1, count // LEFT_OUT)
        picks = (torch.randperm(count, generator=generator)[:kept] for _ in range(self.resamples))
        again = torch.stack([self._closed_form(features[pick]) for pick in picks])
        return Value(value, float(again.std()) * math.sqrt(kept / (count - kept)))

    def _closed_form(self, features: Float[Tensor, "samples d"]) -> Tensor:
        """The same distance by symmetric matrices, which takes a tenth of the time."""
        mean, covariance = _moments(features)
        eigenvalues = torch.linalg.eigvalsh(self._root @ covariance @ self._root)
        cross = eigenvalues.clamp_min(0).sqrt().sum()
        return (mean - self._mean).square().sum() + self._trace + covariance.trace() - 2 * cross

    def kernel(self, features: Float[Tensor, "samples d"]) -> Value:
        """Kernel distance: squared maximum mean discrepancy, cubic kernel (Bińkowski et al., arXiv 1801.01401).

        The mean over subsets drawn with one seed.
        """
        self.check(features)
        features = features.double()
        return Value(self._kernel(self.reference, features, SUBSETS, self.subset), self._kernel_error(features))

    def _kernel_error(self, features: Float[Tensor, "samples d"]) -> float:
        """By the two terms of a U-statistic's variance (Hoeffding's decomposition), of subsets and of all."""
        some = features[:MOST_PAIRS]
        among = _cubic(some, some).fill_diagonal_(0)
        count = len(some)
        rows, mean = among.sum(1) / (count - 1), among.sum() / (count * (count - 1))
        pairs = (among - rows[:, None] - rows[None, :] + mean).fill_diagonal_(0).square().sum() / (count * (count - 1))
        single = rows - _cubic(some, self.reference).mean(1)
        first = (single.var() - pairs / count).clamp_min(0)

        def variance(size: int) -> Tensor:
            return 4 * first / size + 2 * pairs / size**2

        whole, subset = variance(len(features)), variance(self.subset)
        return float((whole + (subset - whole).clamp_min(0) / SUBSETS).sqrt())

    @staticmethod
    def _kernel(reference: Tensor, features: Tensor, subsets: int, size: int) -> float:
        from torchmetrics.image.kid import KernelInceptionDistance

        with _quiet_and_seeded():
            metric = KernelInceptionDistance(
                _Given(features.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
            )
            metric.update(reference, real=True)
            metric.update(features, real=False)
            return float(metric.compute()[0])

    def precision_recall(self, features: Float[Tensor, "samples d"]) -> tuple[Value, Value]:
        """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).

        The share of samples within the reference's manifold, and of the reference within that of the samples. The
        manifold of a set is made of balls around its members, each as wide as the way to its third neighbor.
        """
        self.check(features)
        fake = features[: self.neighbors].double()
        if self._near is None or self._radii is None:
            index = torch.linspace(0, len(self.reference) - 1, self.neighbors, dtype=torch.float64).round().long()
            self._near = self.reference[index]
            self._radii = _radii(self._near)
        shares = (
            _share_within(fake, self._near, self._radii),
            _share_within(self._near, fake, _radii(fake)),
        )
        precision, recall = (Value(p, math.sqrt(p * (1 - p) / self.neighbors)) for p in shares)
        return precision, recall


def inception_score(scores: Float[Tensor, "samples classes"]) -> Value:
    """exp of the mean Kullback-Leibler divergence of a sample's classes from all (Salimans et al., arXiv 1606.03498).

    The mean over ten splits; its error is theirs.
    """
    from torchmetrics.image.inception import InceptionScore

    splits = min(SPLITS, len(scores) // 2)
    with _quiet_and_seeded():
        metric = InceptionScore(_Given(scores.shape[1]), splits=splits, sync_on_compute=False)
        metric.update(scores.double())
        value, deviation = metric.compute()
    return Value(float(value), float(deviation) / math.sqrt(splits) if splits > 1 else None)


def rms_error(distances: Float[Tensor, " samples"]) -> Value:
    """The root of a mean of squares.

    Args:
        distances: of each sample, squared, the mean over its entries.
    """
    root = distances.double().mean().sqrt().item()
    if len(distances) < 2 or root == 0:
        return Value(root, None if len(distances) < 2 else 0.0)
    return Value(root, distances.double().std().item() / math.sqrt(len(distances)) / (2 * root))


def mean_value(values: Float[Tensor, " samples"]) -> Value:
    """The mean of numbers, one a sample."""
    error = values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return Value(values.double().mean().item(), error)


def _frechet_metric(width: int) -> FrechetInceptionDistance:
    from torchmetrics.image.fid import FrechetInceptionDistance

    # Features are gathered before; the other processes compute nothing, and would be waited for.
    return FrechetInceptionDistance(
        feature=_Given(width), normalize=True, reset_real_features=False, sync_on_compute=False
    )


def _moments(features: Float[Tensor, "count d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    mean = features.mean(0)
    centered = features - mean
    return mean, centered.T @ centered / (len(features) - 1)


def _square_root(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    values, vectors = torch.linalg.eigh(covariance)
    return cast("Tensor", (vectors * values.clamp_min(0).sqrt()) @ vectors.T)


def _cubic(one: Float[Tensor, "count d"], other: Float[Tensor, "others d"]) -> Float[Tensor, "count others"]:
    """torchmetrics' default kernel."""
    return (one @ other.T / one.shape[1] + 1) ** 3


def _radii(points: Float[Tensor, "count d"]) -> Float[Tensor, " count"]:
    """How far it is from each point to its third neighbor."""
    nearest = min(NEIGHBORS, len(points) - 1) + 1
    found = [torch.cdist(part, points).topk(nearest, largest=False).values[:, -1] for part in points.split(_CHUNK)]
    return torch.cat(found)


def _share_within(
    points: Float[Tensor, "count d"], centers: Float[Tensor, "others d"], radii: Float[Tensor, " others"]
) -> float:
    """The share of the points that lie in one of the balls."""
    inside = [(torch.cdist(part, centers) <= radii).any(1) for part in points.split(_CHUNK)]
    return torch.cat(inside).double().mean().item()


@contextmanager
def _quiet_and_seeded() -> Iterator[None]:
    """Metrics that draw from the global generator draw the same each time, and the generator stays as it was."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # That features are kept is what is wanted here.
        warnings.filterwarnings("ignore", message="Metric `.*` will save all extracted features")
        torch.manual_seed(0)
        yield
