"""``UNet2DModel`` teachers: pixels or the latents of a VQ model, without a condition or with a class."""

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
    from fmm_distill.teachers.components import PipelineIndex
    from fmm_distill.teachers.first_call import check_first_call, check_latents, image_size
from fmm_distill.teachers.scheduler import ScheduleSpec

__all__ = ["load_unet2d"]


def load_unet2d(found: PipelineIndex) -> Teacher:
    """The teacher in a folder with a ``UNet2DModel``, a scheduler and, for latents, a ``VQModel``.

    Raises:
        UserError: on a scheduler, a prediction or a network of the class that this adapter can't read exactly.
    """
    levels = read_scheduler(open_scheduler(found), found.source)
    network = open_network(found, "unet")
    _check_network(network, levels, found.source)
    conditions = _classes(network, found.source)
    parametrization = Parametrization(levels.schedule, levels.prediction, sigma_data=levels.sigma_data)
    height, width = image_size(network.config.sample_size, found.source, "unet/config.json")
    codec: Codec = Pixels()
    if "vqvae" in found.components:
        codec = LatentCodec(open_network(found, "vqvae"))
        check_latents(network, codec.autoencoder, found.source)
    space = "pixels" if isinstance(codec, Pixels) else "latents of a VQModel"
    teacher = Teacher(
        network=network,
        parametrization=parametrization,
        event_shape=(network.config.in_channels, height, width),
        source=found.source,
        adapter=f"UNet2DModel, {space}, {'unconditional' if conditions is None else 'class-conditional'}",
        scheduler_config=levels.config,
        conditions=conditions,
        codec=codec,
        revision=found.revision,
        license=found.license,
    )
    check_first_call(teacher)
    return teacher


def _classes(network: diffusers.UNet2DModel, source: str) -> Classes | None:
    config = network.config
    if config.class_embed_type is not None:
        raise UserError(
            f"{source}: class_embed_type {config.class_embed_type!r}; wanted a table of classes (num_class_embeds) or "
            "none: the adapter for it is yours to write (docs/add-a-teacher.md)"
        )
    count = config.num_class_embeds
    return None if count is None else Classes(tuple(str(label) for label in range(count)), null_label=None)


def _check_network(network: diffusers.UNet2DModel, levels: ScheduleSpec, source: str) -> None:
    config = network.config
    if levels.inverted:
        raise UserError(
            f"{source}: its scheduler has invert_sigmas, and no pipeline of UNet2DModel turns the times back; expected "
            "invert_sigmas: false"
        )
    # The Fourier embedding takes a logarithm and divides the output by its time: it wants sigma.
    wanted = "fourier" if levels.prediction == "score" else "positional"
    if config.time_embedding_type != wanted:
        kind = "fractional timesteps" if isinstance(levels.schedule, VariancePreserving) else "times"
        raise UserError(
            f"{source}: time_embedding_type {config.time_embedding_type!r}; wanted {wanted!r}, "
            f"the one that takes the {kind} of this schedule"
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise UserError(
            f"{source}: {config.in_channels} channels in, {config.out_channels} out; wanted the same number, or twice "
            "as many (a learned variance, which is left out)"
        )
