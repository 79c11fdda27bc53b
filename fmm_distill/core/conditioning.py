"""The inputs of a network in addition to sample and time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.device import to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["Conditioning"]


@dataclass(frozen=True)
class Conditioning:
    """The inputs that a network is conditioned on.

    Attributes:
        inputs: keywords of the network's call and their tensors, one row per sample. A dot leads into a nested
            dictionary (``added_cond_kwargs.text_embeds``).
        shared: keywords with one value for all samples (position ids, image sizes), passed on unchanged. Dots lead
            into the same dictionaries.
        guidance: guidance scales of the samples, shape ``[batch]``; None: the scale of the teacher's ``Guidance``.
    """

    inputs: Mapping[str, Tensor]
    shared: Mapping[str, Any] = field(default_factory=dict)
    guidance: Float[Tensor, " batch"] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def rows(self, index: Int[Tensor, " some"]) -> Conditioning:
        """Return the samples at these rows."""
        # Indices are made on the CPU, where the draws are, and conditions may be on a GPU.
        return self._map(lambda rows: rows[index.to(rows.device)])

    def part(self, start: int, stop: int) -> Conditioning:
        """Return the samples from ``start`` up to ``stop``."""
        return self._map(lambda rows: rows[start:stop])

    def twice(self) -> Conditioning:
        """Return the samples followed by the same samples again."""
        # Shared keywords are not repeated: they have no row per sample.
        return self._map(lambda rows: torch.cat((rows, rows)))

    def to(self, device: torch.device | str) -> Conditioning:
        """Return the same conditions with all tensors on ``device``."""
        moved = self._map(lambda rows: to_device(rows, device))
        return replace(moved, shared={name: _moved(value, device) for name, value in self.shared.items()})

    def guided(self, scale: float | Float[Tensor, " batch"]) -> Conditioning:
        """Return the same conditions with a guidance scale, one for all samples or one per sample."""
        # float64 as the times are: the scale is cast only where it enters a network.
        return replace(self, guidance=torch.as_tensor(scale, dtype=torch.float64).expand(len(self)))

    def unguided(self) -> Conditioning:
        """Return the same conditions without guidance scales, as a stock network takes them."""
        return replace(self, guidance=None)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        inputs = {name: change(rows) for name, rows in self.inputs.items()}
        return replace(self, inputs=inputs, guidance=None if self.guidance is None else change(self.guidance))


def _moved(value: Any, device: torch.device | str) -> Any:  # noqa: ANN401 any argument of a network
    if isinstance(value, torch.Tensor):
        return to_device(value, device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
