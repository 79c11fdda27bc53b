"""What the rest of the package knows of a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import diffusers
import torch

from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.errors import UserError
from fmm_distill.teachers.codec import Pixels

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.parametrization import Parametrization
    from fmm_distill.core.schedules import Schedule
    from fmm_distill.core.time_axis import Prediction, TimeAxis
    from fmm_distill.teachers.codec import Codec
    from fmm_distill.teachers.conditions import Conditions
    from fmm_distill.teachers.guidance import Guidance
    from fmm_distill.teachers.pipeline import StockPipeline

__all__ = ["Distillable", "Teacher"]


class Distillable(Protocol):
    """What training needs of a teacher, wherever it comes from.

    Attributes:
        event_shape: shape of one sample.
    """

    event_shape: tuple[int, ...]

    @property
    def conditions(self) -> Conditions | None:
        """What it can be told; None: nothing."""
        ...

    @property
    def guidance(self) -> Guidance | None:
        """How much its velocity is guided; None: not at all."""
        ...

    @property
    def schedule(self) -> TimeAxis:
        """The times that it is trained on."""
        ...

    def velocity(
        self, x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """Its velocity at x and t."""
        ...

    def prior(self, noise: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Where sampling starts, at t_max, from N(0, I)."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same teacher on ``device``."""
        ...


@dataclass
class Teacher:
    """A network and its parametrization as a velocity field; what it is and where it comes from.

    Attributes:
        network: frozen, in evaluation mode.
        parametrization: its schedule, what it predicts and how it is called.
        event_shape: shape of one sample, (channels, height, width) of an image or its latent.
        source: the id or folder that it was loaded from.
        adapter: the name of the rule that opened it.
        scheduler_config: the configuration of its diffusers scheduler.
        pipeline: the stock pipeline into copies of which students are exported; None: there is none.
        conditions: what it can be told; None: nothing.
        guidance: how much it is drawn away from what it says untold, or from a weaker teacher; None: not at all.
        weaker: the teacher of autoguidance (Karras et al. 2024, arXiv 2406.02507); None: classifier-free guidance.
        codec: from its samples to images and back.
        revision: the commit on the Hub, where it comes from there.
        license: ``license``, ``license_name`` and ``license_link`` of its model card, those that it has.
    """

    network: nn.Module
    parametrization: Parametrization
    event_shape: tuple[int, ...]
    source: str
    adapter: str
    scheduler_config: dict[str, Any]
    pipeline: StockPipeline | None = None
    conditions: Conditions | None = None
    guidance: Guidance | None = None
    weaker: Teacher | None = None
    codec: Codec = field(default_factory=Pixels)
    revision: str | None = None
    license: dict[str, Any] = field(default_factory=dict)

    def velocity(
        self, x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """``v(x, t)`` for t in [t_min, t_max], guided; below t_min the network is told what it is told there."""
        if (cond is None) != (self.conditions is None):
            wanted = "is unconditional, but a condition came" if self.conditions is None else "wants a condition"
            raise UserError(f"{self.source} {wanted}: pass {'none' if self.conditions is None else 'one'}")
        scales, cond = (None, None) if cond is None else (cond.guidance, cond.unguided())
        v = self.parametrization.velocity(self.network, x, t, cond)
        if self.guidance is None:
            return v
        weaker = self.weaker
        if weaker is not None:
            return self.guidance.guided(v, lambda: weaker.velocity(x, t, cond), t, scales)
        null = cast("Conditions", self.conditions).null(len(x)).to(x.device)
        return self.guidance.guided(v, lambda: self.parametrization.velocity(self.network, x, t, null), t, scales)

    def conditioned_on(self, positions: Float[Tensor, " batch"]) -> Conditioning | None:
        """Return the conditions at these positions in [0, 1), with the guidance scale that is evaluated and folded.

        Args:
            positions: one per sample; uniform positions give every condition the same probability.
        """
        if self.conditions is None:
            return None
        cond = self.conditions.pick(positions)
        return cond if self.guidance is None else self.guidance.at(cond)

    def first_conditions(self, count: int) -> Conditioning | None:
        """Return the first ``count`` conditions, from the first again after the last; None: unconditional."""
        if self.conditions is None:
            return None
        total = len(self.conditions.names)
        return self.conditioned_on((torch.arange(count, dtype=torch.float64) % total + 0.5) / total)

    @property
    def schedule(self) -> Schedule:
        """Its noise levels on the time axis."""
        return self.parametrization.schedule

    @property
    def prediction(self) -> Prediction:
        """What the network predicts."""
        return self.parametrization.prediction

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the diffusers network, without the private entries; empty for another network."""
        config = dict(self.network.config) if isinstance(self.network, diffusers.ModelMixin) else {}
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def prior(self, noise: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Where sampling starts, at t_max, from N(0, I); see ``Parametrization.prior``."""
        return self.parametrization.prior(noise)

    def to(self, device: torch.device | str) -> Self:
        """The same teacher with its network and schedule, and those of a weaker one, on ``device``."""
        self.network.to(device)
        if isinstance(self.schedule, VariancePreserving):
            self.schedule.to(device)
        if self.weaker is not None:
            self.weaker.to(device)
        return self
