"""The interface of all metrics, and of those that compare features with a reference."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from fmm_distill.errors import FmmDistillError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float
    from torch import Tensor

__all__ = ["FeatureMetric", "GivenFeatures", "Metric", "Value", "quiet_and_seeded"]


@dataclass(frozen=True)
class Value:
    """The value of a quantity and its standard error; None if the error is unknown."""

    value: float
    error: float | None


class Metric(ABC):
    """A metric that accumulates batches and is computed from all of them at once.

    Attributes:
        quantities: names of the fields of a row that ``compute`` returns.
    """

    quantities: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def reset(self) -> None:
        """Forget all batches; a reference stays."""
        self._batches.clear()

    def update(self, batch: Float[Tensor, "batch ..."]) -> None:
        """Add a batch."""
        self._batches.append(batch)

    def compute(self) -> dict[str, Value]:
        """Return the quantities of all batches since the last reset."""
        return self._measure(torch.cat(self._batches))

    def __call__(self, batch: Float[Tensor, "batch ..."]) -> dict[str, Value]:
        """Return the quantities of one batch alone; earlier batches are forgotten."""
        self.reset()
        self.update(batch)
        return self.compute()

    @abstractmethod
    def _measure(self, values: Float[Tensor, "count ..."]) -> dict[str, Value]: ...


class FeatureMetric(Metric):
    """A metric that compares the features of samples with those of a reference.

    Args:
        reference: features of the reference images, shape ``[images, d]``.
        samples: the expected number of samples.
    """

    def __init__(self, reference: Float[Tensor, "images d"], samples: int) -> None:
        super().__init__()
        self.reference, self.samples = reference.double(), samples

    def compute(self) -> dict[str, Value]:
        """Return the quantities of all batches since the last reset.

        Raises:
            FmmDistillError: if the number of samples is not the expected one, on which these metrics depend.
        """
        count = sum(map(len, self._batches))
        if count != self.samples:
            raise FmmDistillError(
                f"expected {self.samples} samples (evaluation.samples), got {count}: the value depends on their number"
            )
        return super().compute()


class GivenFeatures(nn.Module):
    """A feature network for torchmetrics that returns its input: the features are computed beforehand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        """Return the features."""
        return features


@contextmanager
def quiet_and_seeded() -> Iterator[None]:
    """Let a metric of torchmetrics draw from seed 0, and restore the global generator afterwards."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Storing all features is intended here.
        warnings.filterwarnings("ignore", message="Metric `.*` will save all extracted features")
        torch.manual_seed(0)
        yield
