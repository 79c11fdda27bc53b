"""Score implicit matching: a distance of two velocities, with the distribution that it is averaged on held fixed."""

from __future__ import annotations

from typing import ClassVar, Literal

from fmm_distill.losses.distribution_matching import Balance, MatchingLoss

__all__ = ["ScoreImplicitMatching"]


class ScoreImplicitMatching(MatchingLoss):
    """``w(t) / n  d . (v_F - v_c) / sqrt(|d|^2 + c^2)``, ``d = v_T - v_F``, mean over the event.

    The paper's loss ``-D'(s_F - s_T) . (s_F - s_c)`` for scores s (Luo et al., arXiv 2410.16794) with its pseudo-Huber
    distance ``D(y) = sqrt(|y|^2 + c^2) - c``, in velocities: a difference of scores is ``(t - 1) / t`` times that of
    velocities. Its mean is the gradient of ``E w(t) D(v_T - v_F)`` with the distribution of x_t held fixed. The paper's
    norm is a sum over the coordinates, ours a mean: a constant of its norm is ``constant`` times the square root of
    their number.
    """

    summary: ClassVar[str] = "the gradient of a pseudo-Huber distance between the teacher's and the samples' velocity"
    paper: ClassVar[str] = "arXiv 2410.16794"

    name: Literal["score_implicit_matching"] = "score_implicit_matching"
    """Name of the loss."""
    divergence: Literal["fisher"] = "fisher"
    """The Fisher family."""
    balance: Balance = 0.0
    """The factor A of ``D(d)``; 0: the distribution of x_t is held fixed."""
    distance: Literal["squared", "pseudo_huber"] = "pseudo_huber"
    """Distance D between both velocities: the mean square, or ``sqrt(|d|^2 + constant^2) - constant``."""
    weight: Literal["distance", "none"] = "none"
    """Weight of a sample: the inverse of its mean absolute distance to the teacher's estimate of it, or none: the
    pseudo-Huber distance normalizes by itself."""
