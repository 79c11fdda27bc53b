"""Score identity distillation: Fisher's loss with a negative factor of the squared difference."""

from __future__ import annotations

from typing import ClassVar, Literal

from fmm_distill.losses.distribution_matching import Balance, MatchingLoss, Times

__all__ = ["ScoreIdentityDistillation"]


class ScoreIdentityDistillation(MatchingLoss):
    """``t^2 / n [2 (1 - alpha) |d|^2 + 2 d . (v_F - v_c)]``, ``d = v_T - v_F``, mean over the event.

    In estimates of x_0, ``y_T = x_t - t v_T`` and ``y_F = x_t - t v_F``, it is twice the paper's
    ``[(1 - alpha) |y_T - y_F|^2 + (y_T - y_F) . (y_F - x_0)] / n`` (Zhou et al., arXiv 2404.04057). alpha = 1.2, which
    is ``balance: -0.4``, is its best value and the gradient of no divergence; it diverges where the critic lags.
    alpha = 0.5 and 1 are the gradients of ``flow_generator_matching`` and, with a squared distance, of
    ``score_implicit_matching``. The noisiest fifth of the timesteps is left out, as in the paper.
    """

    summary: ClassVar[str] = (
        "two scores of the samples' distribution, with a negative weight of their squared difference"
    )
    paper: ClassVar[str] = "arXiv 2404.04057"

    name: Literal["score_identity_distillation"] = "score_identity_distillation"
    """Name of the loss."""
    divergence: Literal["fisher"] = "fisher"
    """The Fisher family."""
    balance: Balance = -0.4
    """The factor A of ``D(d)``: the paper's alpha is ``1 - A / 2``."""
    times: Times = (0.02, 0.8)
    """Smallest and largest time of the noise, as fractions of the teacher's timesteps; uniform between them."""
