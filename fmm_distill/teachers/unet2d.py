"""``UNet2DModel`` teachers: pixels or latents of a VQ model, unconditional or conditioned on a class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.errors import UserError
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.codec import LatentCodec, Pixels
from fmm_distill.teachers.components import open_network, open_scheduler
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.first_call import check_first_call, check_latents, image_size
from fmm_distill.teachers.scheduler import read_scheduler

if TYPE_CHECKING:
    import diffusers

    from fmm_distill.teachers.codec import Codec
    from fmm_distill.teachers.index import PipelineIndex
    from fmm_distill.teachers.scheduler import ScheduleSpec

__all__ = ["load_unet2d"]


def load_unet2d(index: PipelineIndex) -> Teacher:
    """Open a teacher from a folder with a ``UNet2DModel``, a scheduler and, for latents, a ``VQModel``.

    Raises:
        UserError: on a scheduler, a prediction or a network that has no exact counterpart.
    """
    spec = read_scheduler(open_scheduler(index), index.source)
    network = open_network(index, "unet")
    _check_network(network, spec, index.source)
    conditions = _classes(network, index.source)
    parametrization = Parametrization(spec.schedule, spec.prediction, sigma_data=spec.sigma_data)
    height, width = image_size(network.config.sample_size, index.source, "unet/config.json")
    codec: Codec = Pixels()
    if "vqvae" in index.components:
        # By ``open_network``, for its check that all weights are there and finite.
        codec = LatentCodec(open_network(index, "vqvae"))
        check_latents(network, codec.autoencoder, index.source)
    space = "pixels" if isinstance(codec, Pixels) else "latents of a VQModel"
    teacher = Teacher(
        network=network,
        parametrization=parametrization,
        event_shape=(network.config.in_channels, height, width),
        source=index.source,
        adapter=f"UNet2DModel, {space}, {'unconditional' if conditions is None else 'class-conditional'}",
        scheduler_config=spec.config,
        conditions=conditions,
        codec=codec,
        revision=index.revision,
        license=index.license,
    )
    check_first_call(teacher)
    return teacher


def _classes(network: diffusers.UNet2DModel, source: str) -> Classes | None:
    config = network.config
    if config.class_embed_type is not None:
        raise UserError(
            f"{source}: class_embed_type {config.class_embed_type!r}; expected a table of classes (num_class_embeds) "
            "or none; write an adapter for it (docs/add-a-teacher.md)"
        )
    count = config.num_class_embeds
    return None if count is None else Classes(tuple(str(label) for label in range(count)), null_label=None)


def _check_network(network: diffusers.UNet2DModel, spec: ScheduleSpec, source: str) -> None:
    config = network.config
    if spec.inverted:
        raise UserError(
            f"{source}: its scheduler has invert_sigmas, which no pipeline of UNet2DModel supports; expected "
            "invert_sigmas: false"
        )
    # With the Fourier embedding, UNet2DModel takes the logarithm of its time and divides its output by it: its time is
    # sigma and its output a score.
    expected = "fourier" if spec.prediction == "score" else "positional"
    if config.time_embedding_type != expected:
        kind = "fractional timesteps" if isinstance(spec.schedule, VariancePreserving) else "times"
        raise UserError(
            f"{source}: time_embedding_type {config.time_embedding_type!r}; expected {expected!r}, "
            f"which takes the {kind} of this schedule"
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise UserError(
            f"{source}: {config.in_channels} channels in, {config.out_channels} out; expected the same number, or "
            "twice as many (with a learned variance, which is left out)"
        )
