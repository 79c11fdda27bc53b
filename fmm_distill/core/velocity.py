"""What a velocity field is, and what it may be conditioned on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fmm_distill.core.device import sent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["Conditioning", "VelocityField"]


@dataclass(frozen=True)
class Conditioning:
    """What a network is told besides sample and time.

    Attributes:
        inputs: keyword of the network's call to its rows, one a sample; a dot leads into a nested dictionary
            (``added_cond_kwargs.text_embeds``).
        shared: keywords that are the same for every sample (position ids, sizes), as the network takes them.
        guidance: of a teacher that is guided by another scale in every sample, these; shape ``[batch]``.
    """

    inputs: Mapping[str, Tensor]
    shared: Mapping[str, Any] = field(default_factory=dict)
    guidance: Float[Tensor, " batch"] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def rows(self, index: Int[Tensor, " some"]) -> Conditioning:
        """The samples at these rows."""
        return self._each(lambda rows: rows[index.to(rows.device)])

    def part(self, start: int, stop: int) -> Conditioning:
        """The samples from ``start`` to ``stop``."""
        return self._each(lambda rows: rows[start:stop])

    def twice(self) -> Conditioning:
        """The samples, and once more."""
        return self._each(lambda rows: torch.cat((rows, rows)))

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on ``device``."""
        moved = self._each(lambda rows: sent(rows, device))
        return replace(moved, shared={name: _moved(value, device) for name, value in self.shared.items()})

    def guided(self, scale: float | Float[Tensor, " batch"]) -> Conditioning:
        """The same with a scale of guidance, one for all samples or one each."""
        return replace(self, guidance=torch.as_tensor(scale, dtype=torch.float64).expand(len(self)))

    def unguided(self) -> Conditioning:
        """What the network itself is told: no scale of guidance."""
        return replace(self, guidance=None)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        inputs = {name: change(rows) for name, rows in self.inputs.items()}
        return replace(self, inputs=inputs, guidance=None if self.guidance is None else change(self.guidance))


def _moved(value: Any, device: torch.device | str) -> Any:  # noqa: ANN401 whatever a network takes
    if isinstance(value, torch.Tensor):
        return sent(value, device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


class VelocityField(Protocol):
    """``v(x, t) = E[eps - x_0 | x_t = x]`` on the axis of ``interpolant``; t in ``[t_min, t_max]``."""

    def __call__(
        self, x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """The velocity at x and t."""
        ...
