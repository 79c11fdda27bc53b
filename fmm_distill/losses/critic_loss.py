"""The critic's loss: flow matching on generated samples, and optionally on images too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmm_distill.losses.base import squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.velocity import VelocityField
    from fmm_distill.losses.distribution_matching import NoisedSamples, RealData

__all__ = ["critic_loss"]


def critic_loss(
    critic: VelocityField,
    generated: NoisedSamples,
    images: NoisedSamples | None = None,
    real: RealData | None = None,
) -> Float[Tensor, " batch"]:
    """Return the critic's loss of each sample, shape ``[batch]``.

    Without images it is ``|v_F - v_c|^2`` (mean over the event), whose minimum is the velocity of the generated
    distribution. With images, it is RealUID's (arXiv 2509.22459)
    ``a |v_F(gen) - (b/a) v_gen|^2 + (1-a) |v_F(data) - ((1-b)/(1-a)) v_data|^2``, where v_gen and v_data are the
    conditional velocities. Its minimum is ``(b p v + (1-b) p' v') / (a p + (1-a) p')``, with p and v the density and
    the velocity at t of the generated samples, p' and v' those of the images: equal to both velocities where the two
    distributions are equal.

    Args:
        critic: the critic's velocity, whose weights get the gradient.
        generated: samples of the student; no gradient passes to them.
        images: noised images of the teacher's data, as many as there are samples, in the student's coordinates
            (latents, for a latent teacher) and with their own conditions.
        real: the setting ``real`` of the student's loss.

    Raises:
        ValueError: if there are images without ``real``, ``real`` without images, or not one image per sample.
    """
    if (images is None) != (real is None):
        raise ValueError("expected images and real together, or neither")
    if images is None or real is None:
        return _residual(critic, generated, 1.0)
    if len(images.t) != len(generated.t):
        raise ValueError(f"expected an image per sample, got {len(images.t)} for {len(generated.t)}")
    of_samples = real.a * _residual(critic, generated, real.b / real.a)
    return of_samples + (1 - real.a) * _residual(critic, images, (1 - real.b) / (1 - real.a))


def _residual(critic: VelocityField, samples: NoisedSamples, factor: float) -> Tensor:
    """Return ``|v_F - factor v_c|^2`` of each sample."""
    prediction = critic(samples.x_t.detach(), samples.t, samples.cond)
    return squared_norm(prediction - factor * samples.velocity.detach())
