"""Teachers of prompts: any stock pipeline whose network is called for one sample at one time.

The adapter runs the pipeline a few steps, looks at what its network and scheduler are given (``recording``), and checks
that it can call the network the same itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import torch

from fmm_distill.core.parametrization import Parametrization
from fmm_distill.errors import UserError, named
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.codec import PipelineCodec
from fmm_distill.teachers.components import STOCK_ERRORS, check_weights, open_pipeline
from fmm_distill.teachers.first_call import check_latents, image_size
from fmm_distill.teachers.prompted.call import RecordedCall, check_recorded_call, read_call, uses_unshifted_time
from fmm_distill.teachers.prompted.embeddings import embed, embeddings_of
from fmm_distill.teachers.prompted.probe import PROBES, STEPS, CallKeywords, DrivenPipeline, check_call
from fmm_distill.teachers.recording import tensor_of
from fmm_distill.teachers.scheduler import read_scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fmm_distill.teachers.components import PipelineIndex
    from fmm_distill.teachers.conditions import Embeddings
    from fmm_distill.teachers.guidance import Guidance
    from fmm_distill.teachers.recording import Recording
    from fmm_distill.teachers.scheduler import ScheduleSpec

__all__ = ["RecordedCall", "load_prompted"]

# Another number than that of the recording, so that most of its times are new ones. PNDM needs four at least.
_CHECK_STEPS = 5


def load_prompted(
    found: PipelineIndex,
    prompts: Sequence[str] = ("",),
    call: dict[str, Any] | None = None,
    guidance: Guidance | None = None,
) -> Teacher:
    """The teacher in a folder with text encoders.

    Args:
        prompts: those that the student learns.
        call: keywords of the pipeline's call besides the prompt, such as height and width.
        guidance: of the teacher; a network that takes its guidance as an input is called with the scale instead.

    Raises:
        UserError: if the pipeline can't be opened or run, or the inputs of its network can't be parted.
    """
    component = "transformer" if "transformer" in found.components else "unet"
    _check_one_network(found, component)
    _check_no_map(found, component)
    size = found.config(component).get("sample_size")
    # Without one the pipeline's own keywords say it; of a video there may be more sides.
    if size is not None and not (isinstance(size, list) and len(size) > 2):
        image_size(size, found.source, f"{component}/config.json")
    pipeline = _open(found)
    check_call(pipeline, call or {}, found.source)
    scale = 1.0 if guidance is None else guidance.scale
    driven = DrivenPipeline(pipeline, component, CallKeywords.of(pipeline, call or {}, scale))
    check_weights(driven.network, found.source)
    probe = driven.record()
    if driven.keys.guidance == "guidance_scale" and _takes_guidance(probe):
        keys = CallKeywords(driven.keys.fixed | {"guidance_scale": scale}, None, 1.0)
        driven = DrivenPipeline(pipeline, component, keys)
        probe = driven.record()
    levels = _levels(pipeline, probe, found.source)
    recorded = read_call(probe, levels, found.source)
    conditions = embeddings_of(driven, recorded, tuple(prompts), found, inverted=levels.inverted)
    again, cond = driven.record(_CHECK_STEPS), embed(driven, recorded, PROBES)
    check_recorded_call(driven.network, recorded, again, cond, levels, found.source)
    width = tuple(tensor_of(probe.calls[0].given[recorded.sample]).shape[1:])
    if len(width) == 3 and getattr(pipeline, "vae", None) is not None:
        # Latents that are not packed into tokens.
        check_latents(driven.network, pipeline.vae, found.source)
    return Teacher(
        network=driven.network.eval().requires_grad_(False),
        parametrization=Parametrization(levels.schedule, levels.prediction, recorded, levels.sigma_data),
        event_shape=width,
        source=found.source,
        adapter=f"{driven.kind} with {type(driven.network).__name__}, found by running it",
        scheduler_config=levels.config,
        component=component,
        folder=found.folder,
        call=dict(call or {}),
        conditions=conditions,
        guidance=_checked(guidance, conditions, probe),
        codec=PipelineCodec(
            found.folder, component, driven.network, driven.keys.call(("",), STEPS), driven.keys, width
        ),
        revision=found.revision,
        license=found.license,
    )


def _levels(pipeline: Any, probe: Recording, source: str) -> ScheduleSpec:  # noqa: ANN401 a diffusers class
    config = pipeline.scheduler.config
    before = uses_unshifted_time(probe, config.num_train_timesteps)
    return read_scheduler(pipeline.scheduler, source, shift=_shift(probe, config), uses_unshifted_time=before)


def _takes_guidance(probe: Recording) -> bool:
    return probe.calls[0].given.get("guidance") is not None


def _checked(guidance: Guidance | None, conditions: Embeddings, probe: Recording) -> Guidance | None:
    """Guidance by two answers, or None where the network is told its guidance or there is none."""
    if guidance is None or (guidance.scale == 1 and guidance.range is None):
        return None
    if _takes_guidance(probe):
        if guidance.range is not None:
            raise UserError("guidance.range: this network is told its guidance already; wanted one guidance.scale")
        if guidance.interval != (0.0, 1.0):
            raise UserError("guidance.interval: this network is told its guidance, at every time; wanted [0, 1]")
        return None
    # Says why, where there is nothing to be guided away from.
    conditions.null(1)
    return guidance


def _check_one_network(found: PipelineIndex, component: str) -> None:
    """A pipeline may change to a second network at a time that the few steps of the recording don't reach."""
    kind = found.components[component][1]
    others = [name for name, (_, cls) in found.components.items() if cls == kind and name != component]
    if others:
        raise UserError(
            f"{found.source}: its {others[0]} is a second {kind} for a part of the times; wanted one network for all "
            "of them: choose a checkpoint that has one"
        )


def _check_no_map(found: PipelineIndex, component: str) -> None:
    """A latent consistency model is recognized by its input of the guidance's scale, whatever its scheduler is."""
    width = found.config(component).get("time_cond_proj_dim")
    if width is not None or found.pipeline.startswith("LatentConsistencyModel"):
        kind = f"time_cond_proj_dim {width}" if width is not None else found.pipeline
        raise UserError(
            f"{found.source}: its {component} embeds the scale of the guidance ({kind}), as latent consistency models "
            "do, which are a map to data already and no denoiser; wanted the model that it was distilled from"
        )


def _open(found: PipelineIndex) -> Any:  # noqa: ANN401 a diffusers class
    missing = [name for name in found.components if not (found.folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{found.source}: its {missing[0]} is missing (no folder of that name); wanted a whole pipeline as "
            "save_pretrained writes it: fetch or save it again"
        )
    try:
        import transformers  # noqa: F401 only whether it is there
    except ImportError as error:
        raise UserError(f"{found.source} has text encoders: they need `pip install fmm-distill[text]`") from error
    if not hasattr(diffusers, found.pipeline):
        raise UserError(
            f"{found.source}: this diffusers has no {found.pipeline or 'class for it'}; install a newer one"
        )
    try:
        return open_pipeline(found.folder)
    except STOCK_ERRORS as error:
        raise UserError(
            f"{found.source}: the pipeline does not open ({named(error)}); wanted a whole pipeline "
            "as save_pretrained writes it, in safetensors"
        ) from error


def _shift(probe: Recording, config: Any) -> float | None:  # noqa: ANN401 a diffusers configuration
    """The shift that a pipeline gives its scheduler at every call."""
    if not config.get("use_dynamic_shifting") or probe.mu is None:
        return None
    mu = torch.tensor(float(probe.mu))
    return float(mu if config.get("time_shift_type") == "linear" else mu.exp())
