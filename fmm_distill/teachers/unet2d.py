"""Unconditional pixel teachers: ``UNet2DModel`` with a discrete variance-preserving scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import torch

from fmm_distill.errors import UserError
from fmm_distill.interpolant import PREDICTIONS, Schedule
from fmm_distill.teachers.base import Teacher

if TYPE_CHECKING:
    from pathlib import Path

    from fmm_distill.teachers.load import Found

__all__ = ["SCHEDULERS", "load_unet2d"]

SCHEDULERS = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
    # These walk in x / alpha and hand the network x again, at the same timesteps.
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
# Settings under which the network is told something else than whole timesteps of the schedule.
_OTHER_TIMES = {"use_flow_sigmas": True, "timestep_type": "continuous"}


def load_unet2d(found: Found) -> Teacher:
    """The teacher in a folder with a ``UNet2DModel`` and one of ``SCHEDULERS``.

    Raises:
        UserError: on a scheduler, a prediction or a network of the class that this adapter can't read exactly.
    """
    name = found.components["scheduler"][1]
    if name not in SCHEDULERS:
        raise UserError(
            f"{found.source}: scheduler {name}; wanted one of {', '.join(SCHEDULERS)}: "
            "save the pipeline with one of them if its schedule is the same, or add a teacher (docs/add-a-teacher.md)"
        )
    scheduler = _open(getattr(diffusers, name), found, "scheduler")
    prediction = scheduler.config.prediction_type
    if prediction not in PREDICTIONS:
        raise UserError(f"{found.source}: prediction_type {prediction!r}; wanted one of {', '.join(PREDICTIONS)}")
    for key, value in _OTHER_TIMES.items():
        if scheduler.config.get(key) == value:
            raise UserError(f"{found.source}: {name} with {key}: {value}; wanted a discrete schedule (not yet)")
    products = scheduler.alphas_cumprod.clone()
    if scheduler.config.get("rescale_betas_zero_snr"):
        # Some schedulers keep a small number here, larger than the one before it.
        products[-1] = 0
    schedule = Schedule(products)
    # Without this list another class takes what is written, not its own defaults.
    scheduler_config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    _check_stock(scheduler, scheduler_config, found.source)
    if prediction == "epsilon" and schedule.t_max == 1:
        raise UserError(
            f"{found.source}: its schedule ends in pure noise (rescale_betas_zero_snr), where a noise prediction says "
            "nothing; wanted v_prediction or sample"
        )
    _require_safetensors(found.component_folder("unet"), found.source)
    network = _open(diffusers.UNet2DModel, found, "unet", use_safetensors=True, torch_dtype=torch.float32)
    _check_network(network, found.source)
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return Teacher(
        network=network.eval().requires_grad_(False),
        schedule=schedule,
        prediction=prediction,
        event_shape=(network.config.in_channels, height, width),
        source=found.source,
        adapter="UNet2DModel, pixels, unconditional",
        scheduler_config=scheduler_config,
        revision=found.revision,
        licence=found.licence,
    )


def _open(kind: Any, found: Found, component: str, **options: object) -> Any:  # noqa: ANN401 a diffusers class
    """A component from its folder; whatever diffusers finds wrong with the files is the user's to mend."""
    try:
        return kind.from_pretrained(found.component_folder(component), **options)
    except (OSError, ValueError, RuntimeError, NotImplementedError, TypeError, KeyError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{found.source}: its {component} does not open ({type(error).__name__}: {lines[0]}); wanted a whole "
            "pipeline as save_pretrained writes it: fetch or save it again"
        ) from error


def _require_safetensors(folder: Path, source: str) -> None:
    if not list(folder.glob("diffusion_pytorch_model*.safetensors")):
        others = sorted(path.name for path in folder.glob("*.bin")) or ["no weights"]
        raise UserError(
            f"{source}: {folder.name} has {', '.join(others)} and no diffusion_pytorch_model.safetensors; "
            "pickled weights are not opened: save the pipeline again with save_pretrained(folder, "
            "safe_serialization=True)"
        )


def _check_stock(scheduler: Any, config: dict[str, Any], source: str) -> None:  # noqa: ANN401 a diffusers class
    """The stock DDIM scheduler must make the same schedule: students are evaluated beside it and exported with it."""
    try:
        stock = diffusers.DDIMScheduler.from_config(config)
    except NotImplementedError as error:
        raise UserError(f"{source}: {error}; wanted a schedule that the stock DDIM scheduler can make") from error
    if not torch.allclose(stock.alphas_cumprod[:-1], scheduler.alphas_cumprod[:-1], rtol=1e-4, atol=0):
        raise UserError(
            f"{source}: the stock DDIM scheduler makes another schedule of this configuration "
            f"(beta_schedule {config.get('beta_schedule')}); wanted one that it can make"
        )


def _check_network(network: diffusers.UNet2DModel, source: str) -> None:
    config = network.config
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        raise UserError(f"{source}: the UNet2DModel is class-conditional; wanted an unconditional one (not yet)")
    if config.time_embedding_type != "positional":
        raise UserError(
            f"{source}: time_embedding_type {config.time_embedding_type!r}; wanted 'positional', "
            "the one that takes the fractional timesteps of this schedule"
        )
    if config.out_channels != config.in_channels:
        raise UserError(
            f"{source}: {config.in_channels} channels in, {config.out_channels} out (a learned variance?); "
            "wanted the same number (not yet)"
        )
    if config.sample_size is None:
        raise UserError(f"{source}: unet/config.json has no sample_size; wanted the image size: add it there")
    for key, tensor in network.state_dict().items():
        if tensor.is_meta:
            raise UserError(f"{source}: {key} is missing in the weights; wanted a whole network: fetch it again")
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {key} holds NaN or infinite numbers; wanted a trained network: fetch it again")
