"""Metrics of generated samples, with the interface of torchmetrics: ``update``, ``compute`` and ``reset``.

Each metric also gives a standard error: how much its value varies with the noises of the samples. The reference is
fixed. Values come from torchmetrics where it has the metric, in float64.
"""

from fmm_distill.evaluation.metrics.base import FeatureMetric, Metric, Value
from fmm_distill.evaluation.metrics.frechet import FrechetDistance
from fmm_distill.evaluation.metrics.inception_score import InceptionScore
from fmm_distill.evaluation.metrics.kernel import KernelDistance
from fmm_distill.evaluation.metrics.means import ClipScore, EndpointError
from fmm_distill.evaluation.metrics.precision_recall import PrecisionRecall

__all__ = [
    "ClipScore",
    "EndpointError",
    "FeatureMetric",
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "Metric",
    "PrecisionRecall",
    "Value",
]
