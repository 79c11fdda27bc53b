"""Preparation of a run's data before training: images are encoded, trajectories solved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fmm_distill.data.latents import Latents, encode_images, latent_layout
from fmm_distill.data.row_store import mebibytes
from fmm_distill.data.samples import load_images
from fmm_distill.data.trajectories import Trajectories, solve_trajectories, trajectory_layout
from fmm_distill.errors import UserError
from fmm_distill.teachers.codec import PipelineCodec, Pixels, Waves, encoder_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.config.settings import DataSettings
    from fmm_distill.data.samples import Images, Samples
    from fmm_distill.data.tables import Table
    from fmm_distill.teachers.base import Teacher

__all__ = ["describe_data", "disk_bytes", "open_images", "prepare_samples"]

logger = logging.getLogger(__name__)


def open_images(settings: DataSettings, teacher: Teacher, table: Table | None) -> Images | None:
    """Return the images of a recipe, of the size that its teacher's samples decode to; None if it has none.

    Raises:
        UserError: if they can't be used with this teacher.
    """
    if not settings.has_images:
        return None
    if isinstance(teacher.codec, Waves):
        raise UserError(
            f"--data {settings.source}: expected none, because data are images and {teacher.source} makes sounds"
        )
    if teacher.conditions is not None and settings.condition is None:
        raise UserError(
            f"--data {settings.source}: expected data.condition, the images' classes or captions, because "
            f"{teacher.source} is conditional; give it, or use none or teacher"
        )
    if teacher.conditions is None and settings.condition is not None:
        raise UserError(
            f"data.condition {settings.condition}: expected null, because {teacher.source} is unconditional"
        )
    shape = teacher.event_shape
    if not isinstance(teacher.codec, Pixels):
        # Decoded instead of computed: the factor between latents and images differs between autoencoders.
        shape = tuple(teacher.codec.decode(torch.zeros(1, *teacher.event_shape)).shape[1:])
    images = load_images(settings, shape, teacher.conditions, table=table)
    if not isinstance(teacher.codec, Pixels):
        # Raises if images cannot be encoded.
        encoder_of(teacher.codec, shape)
    return images


def prepare_samples(
    recipe: Recipe,
    teacher: Teacher,
    images: Images | None,
    folder: Path,
    accelerator: Accelerator,
) -> Samples | None:
    """Return the data that jumps start from; all processes share the work, and it resumes after a kill.

    Args:
        folder: folder of the run, where solved trajectories are stored.

    Raises:
        UserError: if the disk has no room for it.
    """
    shard = (accelerator.process_index, accelerator.num_processes)
    if recipe.data.source == "teacher":
        settings = recipe.data.trajectories
        layout = trajectory_layout(folder / "trajectories", settings, teacher.event_shape)
        layout.check_room("data: trajectories")
        # RK4 calls the teacher four times per step, and each stored point has its velocity.
        calls = 4 * settings.solver_steps + settings.points
        logger.info(
            f"data: {settings.count} trajectories of {settings.points} points take {mebibytes(layout.total_bytes)} in "
            f"{layout.folder}, and {calls} calls of the teacher each"
        )
        # The same batch for any number of processes: a batch of another size has other rounding.
        batch = recipe.evaluation.batch_size
        teacher.to(accelerator.device)
        solve_trajectories(
            teacher, settings, layout, recipe.training.seed, batch=batch, device=accelerator.device, shard=shard
        )
        accelerator.wait_for_everyone()
        return Trajectories(layout, teacher.schedule, settings.points)
    if images is None or isinstance(teacher.codec, Pixels):
        return images
    encoder = encoder_of(teacher.codec, images.shape)
    layout = latent_layout(images, encoder, teacher.event_shape)
    layout.check_room("data: latents")
    logger.info(f"data: {len(images)} latents take {mebibytes(layout.total_bytes)} in {layout.folder}")
    encode_images(images, encoder, layout, accelerator.device, shard=shard)
    if isinstance(teacher.codec, PipelineCodec):
        teacher.codec.release()
    accelerator.wait_for_everyone()
    return Latents(images, layout)


def disk_bytes(recipe: Recipe, teacher: Teacher, images: Images | None) -> int:
    """Return the bytes that ``prepare_samples`` writes if none of its files exist."""
    if recipe.data.source == "teacher":
        return trajectory_layout(Path(), recipe.data.trajectories, teacher.event_shape).total_bytes
    if images is None or isinstance(teacher.codec, Pixels):
        return 0
    return latent_layout(images, encoder_of(teacher.codec, images.shape), teacher.event_shape).total_bytes


def describe_data(settings: DataSettings, images: Images | None) -> str:
    """Describe the data of a run in one line."""
    if settings.source == "teacher":
        solved = settings.trajectories
        text = f"{solved.count} trajectories of the teacher's own, {solved.solver_steps} RK4 steps"
    elif images is None:
        return "none (noise alone)"
    else:
        text = f"{len(images)} images of {images.source}"
        text += f", conditioned on {settings.condition}" if settings.condition else ""
        text += ", resized and cropped" if settings.fit == "crop" else ""
        text += ", half of them mirrored" if settings.flip else ""
    return text + (
        f"; a fraction of {settings.on_policy:g} starts from the student's jumps" if settings.on_policy else ""
    )
