"""A teacher: a velocity field on the time axis, with its conditions, its guidance and its origin."""

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
    from fmm_distill.teachers.conditions import Conditions, Embeddings
    from fmm_distill.teachers.guidance import Guidance
    from fmm_distill.teachers.pipeline import StockPipeline

__all__ = ["Distillable", "Teacher"]

# Channels, height and width.
_AXES_OF_IMAGE = 3


class Distillable(Protocol):
    """The part of a teacher that training uses.

    Attributes:
        event_shape: shape of one sample.
    """

    event_shape: tuple[int, ...]

    @property
    def conditions(self) -> Conditions | None:
        """The conditions of the velocity; None: it is unconditional."""
        ...

    @property
    def guidance(self) -> Guidance | None:
        """The guidance of the velocity; None: it is not guided."""
        ...

    @property
    def schedule(self) -> TimeAxis:
        """The time axis."""
        ...

    def velocity(
        self, x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """Return the velocity at x and t."""
        ...

    def prior(self, noise: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Return the start of sampling at t_max, from N(0, I) noise."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the teacher to ``device``, and return it."""
        ...


@dataclass
class Teacher:
    """A network and its parametrization as a velocity field on the time axis.

    Attributes:
        network: frozen, in evaluation mode.
        parametrization: the schedule, the prediction of the network, and the way in which it is called.
        event_shape: shape of one sample, (channels, height, width) of an image or its latent.
        source: the id or folder that it was loaded from.
        adapter: the name of the rule that opened it.
        scheduler_config: the configuration of its diffusers scheduler; empty: it has none.
        pipeline: the stock pipeline into copies of which students are exported; None: there is none.
        conditions: the conditions of the network; None: it is unconditional.
        guidance: guidance away from the unconditional output, or from a weaker teacher; None: it is not guided.
        weaker: the teacher of autoguidance (Karras et al. 2024, arXiv 2406.02507); None: classifier-free guidance.
        codec: converts samples to images and back.
        revision: the commit on the Hub; None: it is not from the Hub.
        license: ``license``, ``license_name`` and ``license_link`` of its model card, where it has them.
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
        """Return the guided velocity.

        Args:
            x: samples on the time axis, shape ``[batch, *event]``.
            t: times in [0, t_max], shape ``[batch]``; below t_min the network is called at the time of t_min.
            cond: the conditions, one per sample, with scales of guidance where it has a range; None: unconditional.

        Raises:
            UserError: on a condition for an unconditional teacher, or none for a conditional one.
        """
        if (cond is None) != (self.conditions is None):
            expected, got = ("none", "one") if self.conditions is None else ("one", "none")
            raise UserError(f"{self.source}: cond: expected {expected}, got {got}; pass {expected}")
        # The network is called without scales: here guidance combines two of its outputs.
        scales, cond = (None, None) if cond is None else (cond.guidance, cond.unguided())
        v = self.parametrization.velocity(self.network, x, t, cond)
        if self.guidance is None:
            return v
        weaker = self.weaker
        if weaker is not None:
            return self.guidance.guided(v, lambda: weaker.velocity(x, t, cond), t, scales)
        conditions, own = cast("Conditions", self.conditions), cast("Conditioning", cond)

        def without_prompt() -> Tensor:
            return self.parametrization.velocity(self.network, x, t, conditions.null(own).to(x.device))

        def without_image() -> Tensor:
            null = cast("Embeddings", conditions).without_image(own)
            return self.parametrization.velocity(self.network, x, t, null.to(x.device))

        return self.guidance.guided(v, without_prompt, t, scales, without_image)

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
        # The middle of each condition's interval, which rounding does not leave.
        return self.conditioned_on((torch.arange(count, dtype=torch.float64) % total + 0.5) / total)

    @property
    def schedule(self) -> Schedule:
        """The noise levels on the time axis."""
        return self.parametrization.schedule

    @property
    def prediction(self) -> Prediction:
        """The quantity that the network predicts."""
        return self.parametrization.prediction

    @property
    def boundary(self) -> float | None:
        """The lowest timestep of the network of high noise levels; None: there is one network."""
        return cast("float | None", getattr(self.parametrization.call, "boundary", None))

    @property
    def has_coordinates(self) -> bool:
        """True if a sample is a point with coordinates: its shape has no height and width."""
        return isinstance(self.codec, Pixels) and len(self.event_shape) < _AXES_OF_IMAGE

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the diffusers network, without the private entries; empty for another network."""
        # The network of a teacher that is its student's is inside of another module.
        network = getattr(self.network, "shared", self.network)
        config = dict(network.config) if isinstance(network, diffusers.ModelMixin) else {}
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def prior(self, noise: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Return the start of sampling at t_max, from N(0, I) noise; see ``Parametrization.prior``."""
        return self.parametrization.prior(noise)

    def to(self, device: torch.device | str) -> Self:
        """Move network and schedule, and those of a weaker teacher, to ``device``, and return the teacher."""
        self.network.to(device)
        # The tables of a discrete schedule: looked up on the CPU at every call, they would make a GPU wait.
        if isinstance(self.schedule, VariancePreserving):
            self.schedule.to(device)
        # Networks that run before this one belong to the call.
        if (move := getattr(self.parametrization.call, "to", None)) is not None:
            move(device)
        if self.weaker is not None:
            self.weaker.to(device)
        return self
