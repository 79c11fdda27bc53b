"""``UNet1DModel`` teachers: audio of Dance Diffusion, whose network is conditioned on an angle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import Angular
from fmm_distill.errors import UserError
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.codec import Waves
from fmm_distill.teachers.components import open_network, open_scheduler
from fmm_distill.teachers.first_call import check_first_call
from fmm_distill.teachers.pipeline import StockPipeline

if TYPE_CHECKING:
    from fmm_distill.teachers.index import PipelineIndex

__all__ = ["load_unet1d"]

# Other uses of the class, value functions and planners of reinforcement learning, differ in one of these.
_REQUIRED = {"time_embedding_type": "fourier", "use_timestep_embedding": False, "out_block_type": None}


def load_unet1d(index: PipelineIndex) -> Teacher:
    """Open a teacher that ``DanceDiffusionPipeline`` has saved: ``UNet1DModel`` and ``IPNDMScheduler``.

    The scheduler has ``sigma = sin(pi s / 2)^2`` and ``alpha = sqrt(1 - sigma^2)``. The network takes the time
    ``2 atan2(sigma, alpha) / pi`` and predicts ``v``.

    Raises:
        UserError: on another scheduler, or a network for another purpose.
    """
    others = sorted(set(index.components) - {"unet", "scheduler"})
    if others:
        raise UserError(
            f"{index.source}: expected UNet1DModel and a scheduler, as in DanceDiffusionPipeline, got also "
            f"{', '.join(others)}; try an unconditional audio model"
        )
    scheduler = open_scheduler(index)
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    if type(scheduler).__name__ != "IPNDMScheduler" or config["trained_betas"] is not None:
        betas = " with trained_betas" if config.get("trained_betas") is not None else ""
        raise UserError(
            f"{index.source}: UNet1DModel with {type(scheduler).__name__}{betas}; expected IPNDMScheduler without "
            "trained_betas; try to save the pipeline with it"
        )
    network = open_network(index, "unet", **_width(index))
    _check_network(network, index.source)
    teacher = Teacher(
        network=network,
        parametrization=Parametrization(Angular(config["num_train_timesteps"]), "v_prediction"),
        event_shape=(network.config.in_channels, network.config.sample_size),
        source=index.source,
        adapter="UNet1DModel, sound, unconditional",
        scheduler_config=config,
        pipeline=StockPipeline(index.folder, "unet"),
        codec=Waves(),
        revision=index.revision,
        license=index.license,
    )
    check_first_call(teacher)
    return teacher


def _width(index: PipelineIndex) -> dict[str, int]:
    """Return the width of the time embedding, where the configuration of an old folder lacks it.

    The default of diffusers has changed since such a folder was saved. The first block of the network has
    ``extra_in_channels`` channels for the embedding.
    """
    config = index.config("unet")
    lacks = config.get("time_embedding_dim") is None and config.get("extra_in_channels")
    return {"time_embedding_dim": config["extra_in_channels"]} if lacks else {}


def _check_network(network: Any, source: str) -> None:  # noqa: ANN401 a diffusers class
    config = network.config
    for name, expected in _REQUIRED.items():
        if config[name] != expected:
            raise UserError(
                f"{source}: UNet1DModel with {name} {config[name]!r}; expected {expected!r}, as in "
                "DanceDiffusionPipeline; try an unconditional audio model"
            )
    # The Fourier embedding has a sine and a cosine per frequency.
    first, width = config.down_block_types[0], 2 * len(network.time_proj.weight)
    if first != "DownBlock1DNoSkip" or config.extra_in_channels != width:
        raise UserError(
            f"{source}: UNet1DModel with first block {first} and {config.extra_in_channels} extra_in_channels; "
            f"expected DownBlock1DNoSkip and {width}, the channels of its time embedding; try an unconditional audio "
            "model"
        )
    if config.out_channels != config.in_channels:
        raise UserError(
            f"{source}: {config.in_channels} channels in, {config.out_channels} out; expected the same number"
        )
    # Each block halves the length. Upsampling pads the shortest by two samples by reflection, which needs three.
    part = 2 ** len(config.up_block_types)
    size = config.sample_size
    if not config.sample_rate or type(size) is not int or size % part or size < 3 * part:
        raise UserError(
            f"{source}: unet/config.json has sample_size {config.sample_size!r} and sample_rate {config.sample_rate}; "
            f"expected a multiple of {part} of at least {3 * part}, which its blocks halve, and a rate; try to set "
            "them there"
        )
