"""``UNet1DModel`` teachers: sound by Dance Diffusion, whose network is told an angle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import Angular
from fmm_distill.errors import UserError
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.codec import Waves
from fmm_distill.teachers.components import open_network, open_scheduler
from fmm_distill.teachers.first_call import check_first_call

if TYPE_CHECKING:
    from fmm_distill.teachers.components import PipelineIndex

__all__ = ["load_unet1d"]

# The other uses of the class (value functions and plans in reinforcement learning) differ in one of these.
_WANTED = {"time_embedding_type": "fourier", "use_timestep_embedding": False, "out_block_type": None}


def load_unet1d(found: PipelineIndex) -> Teacher:
    """The teacher in a folder as ``DanceDiffusionPipeline`` saves it: ``UNet1DModel`` and ``IPNDMScheduler``.

    ``IPNDMScheduler`` has ``sigma = sin(pi s / 2)^2``, ``alpha = sqrt(1 - sigma^2)``, a network that is told
    ``2 atan2(sigma, alpha) / pi`` and predicts ``v``.

    Raises:
        UserError: on another scheduler, or a network of the class that is built for something else.
    """
    others = sorted(set(found.components) - {"unet", "scheduler"})
    if others:
        raise UserError(
            f"{found.source}: UNet1DModel beside {', '.join(others)}; wanted a network and a scheduler alone, as "
            "DanceDiffusionPipeline has them"
        )
    scheduler = open_scheduler(found)
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    if type(scheduler).__name__ != "IPNDMScheduler" or config["trained_betas"] is not None:
        betas = " with trained_betas" if config.get("trained_betas") is not None else ""
        raise UserError(
            f"{found.source}: UNet1DModel with {type(scheduler).__name__}{betas}; wanted IPNDMScheduler with levels of "
            "its own, whose angle the network is told"
        )
    network = open_network(found, "unet", **_width(found))
    _check_network(network, found.source)
    teacher = Teacher(
        network=network,
        parametrization=Parametrization(Angular(config["num_train_timesteps"]), "v_prediction"),
        event_shape=(network.config.in_channels, network.config.sample_size),
        source=found.source,
        adapter="UNet1DModel, sound, unconditional",
        scheduler_config=config,
        folder=found.folder,
        codec=Waves(),
        revision=found.revision,
        license=found.license,
    )
    check_first_call(teacher)
    return teacher


def _width(found: PipelineIndex) -> dict[str, int]:
    """The width of the time embedding where the configuration lacks it, as the oldest do.

    It was 16 in every network once; diffusers' default is another number now, and such a folder does not open in it.
    The first block says how many channels it has for it.
    """
    config = found.config("unet")
    lacks = config.get("time_embedding_dim") is None and config.get("extra_in_channels")
    return {"time_embedding_dim": config["extra_in_channels"]} if lacks else {}


def _check_network(network: Any, source: str) -> None:  # noqa: ANN401 a diffusers class
    config = network.config
    for name, wanted in _WANTED.items():
        if config[name] != wanted:
            raise UserError(
                f"{source}: UNet1DModel with {name} {config[name]!r}; wanted {wanted!r}, a network of sounds as "
                "DanceDiffusionPipeline has it"
            )
    first, width = config.down_block_types[0], 2 * len(network.time_proj.weight)
    if first != "DownBlock1DNoSkip" or config.extra_in_channels != width:
        raise UserError(
            f"{source}: UNet1DModel with first block {first} and {config.extra_in_channels} extra_in_channels; wanted "
            f"DownBlock1DNoSkip and {width}, the channels of its time embedding"
        )
    if config.out_channels != config.in_channels:
        raise UserError(
            f"{source}: {config.in_channels} channels in, {config.out_channels} out; wanted the same number"
        )
    part = 2 ** len(config.up_block_types)
    size = config.sample_size
    if not config.sample_rate or type(size) is not int or size % part or size < 3 * part:
        raise UserError(
            f"{source}: unet/config.json has sample_size {config.sample_size!r} and sample_rate {config.sample_rate}; "
            f"wanted a multiple of {part} from {3 * part} on, its blocks halve it, and a rate: set them there"
        )
