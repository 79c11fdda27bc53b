"""Flow generator matching: the gradient of the squared difference of two velocities."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fmm_distill.losses.distribution_matching import Balance, MatchingLoss

__all__ = ["FlowGeneratorMatching"]


class FlowGeneratorMatching(MatchingLoss):
    """``|d|^2 + 2 d . (v_F - v_c)``, ``d = v_T - v_F``, mean over the event.

    The gradient of ``E |v_T - v_F|^2`` with v_F the velocity of the generated samples: of the two parts, the first has
    the dependence of x_t on the student, the second that of v_F (Huang et al., arXiv 2410.19310). With ``real`` it is
    RealUID's ``a |v_T - (b/a) v_c|^2 - a |v_F - (b/a) v_c|^2`` (Kornilov et al., arXiv 2509.22459), of which
    ``a |d|^2 + 2 d . (a v_F - b v_c)`` is the expansion: the gradient of the same square on a mixture of generated
    samples and images. Neither weights times or samples.
    """

    summary: ClassVar[str] = "the gradient of the squared difference between the teacher's and the samples' velocity"
    paper: ClassVar[str] = "arXiv 2410.19310; with images arXiv 2509.22459"

    name: Literal["flow_generator_matching"] = "flow_generator_matching"
    """Name of the loss."""
    divergence: Literal["fisher"] = "fisher"
    """The Fisher family."""
    balance: Balance = 1.0
    """The factor A of ``D(d)``; 0 leaves out the first part."""
    weight: Literal["distance", "none"] = "none"
    """Weight of a sample: the inverse of its mean absolute distance to the teacher's estimate of it, or none."""
    time_power: float = Field(default=0.0, ge=0, le=4)
    """Exponent of t in the weight of a time: 0 compares velocities, 2 estimates of x_0."""
