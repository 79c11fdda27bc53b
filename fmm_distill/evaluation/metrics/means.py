"""Metrics that are means over samples: the endpoint error and the CLIP score."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fmm_distill.evaluation.metrics.base import Metric, Value

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["ClipScore", "EndpointError"]


class EndpointError(Metric):
    """Root mean square distance between samples and the endpoints of the teacher's ODE from the same noise.

    Args:
        endpoints: shape ``[batch, *event]``, in the order of the samples.
    """

    quantities = ("endpoint_error",)

    def __init__(self, endpoints: Float[Tensor, "batch *event"]) -> None:
        super().__init__()
        self.endpoints = endpoints

    def _measure(self, values: Float[Tensor, "batch *event"]) -> dict[str, Value]:
        squares = (values - self.endpoints).square().flatten(1).mean(1).double()
        root = squares.mean().sqrt().item()
        if len(squares) < 2 or root == 0:
            return {"endpoint_error": Value(root, None if len(squares) < 2 else 0.0)}
        # The delta method: d sqrt(m) = dm / (2 sqrt(m)).
        return {"endpoint_error": Value(root, squares.std().item() / math.sqrt(len(squares)) / (2 * root))}


class ClipScore(Metric):
    """Mean CLIP score (Hessel et al., arXiv 2104.08718) of samples whose scores are given, shape ``[samples]``."""

    quantities = ("clip_score",)

    def _measure(self, values: Float[Tensor, " samples"]) -> dict[str, Value]:
        error = values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else None
        return {"clip_score": Value(values.double().mean().item(), error)}
