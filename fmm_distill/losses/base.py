"""The interface of a loss, the jump that it is evaluated on, and the mean square of a residual."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

import torch

from fmm_distill.losses.settings import Settings
from fmm_distill.losses.time_sampling import TimeSampling

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["DerivativeLoss", "Jump", "Loss", "TargetNetwork", "squared_norm"]

TargetNetwork = Literal["average", "frozen"]


@dataclass(frozen=True)
class Jump:
    """A batch of jumps that a loss is evaluated on.

    Attributes:
        x: points ``x_t`` at which the jumps start, shape ``[batch, *event]``.
        t: times at which they start, float64, shape ``[batch]``.
        r: times at which they end, ``r <= t``, float64, shape ``[batch]``. A loss may evaluate the map in the other
            direction too, as ``flow_map_matching`` does.
        cond: what the networks are conditioned on; None for unconditional networks.
        uniform: random numbers, uniform on [0, 1], shape ``[batch]``, for a loss that places a middle time or chooses
            between two cases.
        target_map: a moving average or a frozen copy of the student, as ``Loss.target_network`` names it; None if the
            loss names neither.
    """

    x: Float[Tensor, "batch *event"]
    t: Float[Tensor, " batch"]
    r: Float[Tensor, " batch"]
    cond: Conditioning | None
    uniform: Float[Tensor, " batch"]
    target_map: FlowMap | None = None


class Loss(Settings):
    """A loss of flow map distillation: its fields are its settings, and a call evaluates it.

    A subclass sets ``summary`` and ``paper``, gives ``name`` a single literal value, and defines ``__call__``.

    Attributes:
        summary: one sentence for ``fmm-distill losses``.
        paper: the source of the loss.
        diagonal: whether it trains jumps of length 0 alone and ignores r.
        needed_sampling: the distribution of times that it needs, with the required fields set; None: any.
        without_data: the nearest alternative for a run without data, as an error message suggests it.
    """

    summary: ClassVar[str]
    paper: ClassVar[str]
    diagonal: ClassVar[bool] = False
    needed_sampling: ClassVar[TimeSampling | None] = None
    without_data: ClassVar[str] = "choose a loss that takes velocity: teacher"

    name: str
    """Name of the loss."""
    velocity: Literal["teacher", "self", "data"] = "teacher"
    """Source of the velocity: the teacher, the student's own diagonal, or the sample's own eps - x_0."""

    @abstractmethod
    def __call__(self, flow_map: FlowMap, velocity: VelocityField, jump: Jump) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``, before its distance and weight are applied.

        Args:
            flow_map: the student.
            velocity: the velocity field that the setting ``velocity`` names.
            jump: the batch of jumps.
        """

    @classmethod
    def velocities(cls) -> tuple[str, ...]:
        """Return the sources that the setting ``velocity`` may name."""
        return get_args(cls.model_fields["velocity"].annotation)

    @property
    def needs_data(self) -> bool:
        """Return whether the loss is learned from samples of a dataset."""
        return self.velocity == "data"

    @property
    def needs_velocity_term(self) -> bool:
        """Return whether the loss only makes a map consistent with itself.

        Another loss must teach it the velocity then.
        """
        return self.velocity == "self"

    @property
    def target_network(self) -> TargetNetwork | None:
        """Return which copy of the student is the jump's ``target_map``."""
        return None

    @property
    def differentiates(self) -> bool:
        """Return whether the loss takes a derivative of the map."""
        return False

    def accepts(self, sampling: TimeSampling) -> bool:
        """Return whether a distribution of times is one that the loss can be trained on."""
        needed = self.needed_sampling
        return needed is None or all(
            getattr(sampling, field) == getattr(needed, field) for field in needed.model_fields_set
        )

    def at_step(self, step: int) -> Self:
        """Return the loss in force at a step; one with a warm-up differs between steps."""
        return self

    def progress(self, step: int) -> dict[str, float]:
        """Return the settings that differ at this step from those after every warm-up, for the log."""
        return {}


class DerivativeLoss(Loss):
    """A loss that differentiates the map.

    Attributes:
        in_r: whether it does so in the end time alone, where central differences are within 1e-3 of forward mode.
    """

    in_r: ClassVar[bool] = False

    derivative: Literal["auto", "exact", "central"] = "auto"
    """Forward mode, central differences, or whichever runs on the networks (the choice is logged)."""

    @property
    def differentiates(self) -> bool:
        """Return whether a derivative is taken; a finite step can replace it."""
        return True

    @property
    def keeps_graph(self) -> bool:
        """Return whether gradients pass through the derivative."""
        return True

    @property
    def engine(self) -> Literal["exact", "central"]:
        """Return the engine of the derivatives; ``auto`` that was not resolved is forward mode."""
        # ``training.objective.resolve_engine`` replaces auto before a run; a loss on its own gets the exact one.
        return "exact" if self.derivative == "auto" else self.derivative


def squared_norm(residual: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    """Return the mean over the event of the squared residual, in float32 at least."""
    # fp16 overflows above 65504, and bfloat16 drops the small squares of a long sum.
    return residual.flatten(1).to(torch.promote_types(residual.dtype, torch.float32)).square().mean(1)
