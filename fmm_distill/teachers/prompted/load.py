"""Teachers with text encoders: any stock pipeline whose network is called for one sample at one time.

The adapter runs the pipeline for a few steps (``PipelineProbe``), reads how its network and scheduler are called, and
checks that it can call the network in the same way.
"""

from __future__ import annotations

import inspect
import logging
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import diffusers

from fmm_distill.core.parametrization import Parametrization
from fmm_distill.errors import UserError, named
from fmm_distill.teachers.adapter_loading import open_frozen
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.codec import PipelineCodec
from fmm_distill.teachers.components import STOCK_ERRORS, check_weights, open_pipeline
from fmm_distill.teachers.first_call import check_latents, image_size
from fmm_distill.teachers.guiders import guider_names, log_guiders, turn_guiders_off
from fmm_distill.teachers.ip_adapter import IMAGE
from fmm_distill.teachers.pipeline import StockPipeline
from fmm_distill.teachers.prompted.call_keywords import as_tuple, check_keywords
from fmm_distill.teachers.prompted.embeddings import embed_prompts
from fmm_distill.teachers.prompted.neutral import log_neutral
from fmm_distill.teachers.prompted.probe import STEPS, PipelineProbe
from fmm_distill.teachers.requirements import describe_optional_inputs, pipeline_class
from fmm_distill.teachers.scheduler import check_no_map
from fmm_distill.teachers.stages import check_stages, network_of, networks_of

if TYPE_CHECKING:
    from fmm_distill.teachers.conditions import Embeddings
    from fmm_distill.teachers.guidance import Guidance
    from fmm_distill.teachers.index import PipelineIndex
    from fmm_distill.teachers.prompts import Prompts

__all__ = ["load_prompted"]

logger = logging.getLogger(__name__)

# Of what diffusers and transformers name otherwise than the package: its module and its name for pip.
_PACKAGES = {
    "bs4": ("bs4", "beautifulsoup4"),
    "invisible_watermark": ("imwatermark", "invisible-watermark"),
    "k_diffusion": ("k_diffusion", "k-diffusion"),
    "opencv": ("cv2", "opencv-python"),
    "vision": ("PIL", "pillow"),
}


def load_prompted(
    index: PipelineIndex,
    prompts: Prompts,
    call: dict[str, Any] | None = None,
    guidance: Guidance | None = None,
) -> Teacher:
    """Open a pipeline with text encoders as a teacher.

    Args:
        prompts: the prompts that the student learns, with images where the pipeline takes any.
        call: keywords of the pipeline's call in addition to the prompt, such as height and width.
        guidance: of the teacher. A network that is conditioned on its guidance scale is called with the scale instead.

    Raises:
        UserError: if the pipeline can't be opened or run, or if its network call can't be reproduced.
    """
    component = "transformer" if "transformer" in index.components else "unet"
    # Sizes are tuples in diffusers, and lists in files.
    call = {name: as_tuple(value) for name, value in (index.call | (call or {})).items()}
    _check_components(index, component)
    second = check_stages(index, component)
    pipeline = _open(index)
    check_keywords(pipeline, call)
    check_weights(network_of(pipeline, component), index.source)
    adapter = None if index.ip_adapter is None else open_frozen(pipeline, index.folder, index.ip_adapter)
    scale = 1.0 if guidance is None else guidance.scale
    probe = PipelineProbe.of(pipeline, component, call, scale, index.source, prompts)
    conditions = embed_prompts(probe, prompts, index)
    probe.check()
    if len(probe.event_shape) == 3 and probe.call.joined is None and getattr(pipeline, "vae", None) is not None:
        # Three dimensions: latents that are not packed into tokens. With joined channels the network has more.
        check_latents(probe.network, pipeline.vae, index.source)
    spec, own_call = probe.spec, log_neutral(pipeline, call) | call
    log_guiders(pipeline)
    return Teacher(
        network=probe.network.eval().requires_grad_(False),
        parametrization=Parametrization(
            spec.schedule, spec.prediction, replace(probe.call, adapter=adapter), spec.sigma_data
        ),
        event_shape=probe.event_shape,
        source=index.source,
        adapter=f"{type(pipeline).__name__} with {_named_networks(probe)}, found by running it",
        scheduler_config=spec.config,
        pipeline=replace(_stock_pipeline(probe, index, own_call, conditions), second=second),
        conditions=conditions,
        guidance=_plain_guidance(
            guidance,
            conditions,
            index.source,
            takes_guidance=probe.recording.takes_guidance,
            is_component=bool(guider_names(pipeline)),
        ),
        codec=_codec(probe, index, prompts),
        revision=index.revision,
        license=index.license,
    )


def _named_networks(probe: PipelineProbe) -> str:
    networks = networks_of(probe.pipeline, probe.component)
    # Two networks are of one class.
    kinds = {type(network).__name__ for network in networks.values()}
    return f"{'' if len(networks) == 1 else 'two '}{' and '.join(sorted(kinds))}"


def _stock_pipeline(
    probe: PipelineProbe, index: PipelineIndex, call: dict[str, Any], conditions: Embeddings
) -> StockPipeline:
    """Return the pipeline into copies of which students are exported, and the keywords of its call."""
    keywords = probe.keywords
    return StockPipeline(
        index.folder,
        probe.component,
        call,
        condition="prompt" if keywords.takes_prompt else None,
        guidance=keywords.guidance,
        guidance_off=keywords.off,
        first_guidance=keywords.first_guidance,
        image_guidance=None if conditions.image_guidance is None else conditions.image_guidance.keyword,
        network_guidance=keywords.fixed.get("guidance_scale"),
        one_prompt=keywords.one_prompt,
        positions=probe.positions,
        ip_adapter=index.ip_adapter,
        task=index.task,
        task_settings=index.task_settings,
    )


def _codec(probe: PipelineProbe, index: PipelineIndex, prompts: Prompts) -> PipelineCodec:
    # Not the empty prompt, of which some tokenizers make no token.
    call = probe.keywords.call(prompts.some((0,)), STEPS)
    # Only the network uses it, which does not run: the image encoder would, in every call.
    call.pop(IMAGE, None)
    output = tuple(probe.recording.calls[0].output.shape[1:])
    return PipelineCodec(index.folder, probe.component, probe.network, call, probe.event_shape, output, probe.positions)


def _check_components(index: PipelineIndex, component: str) -> None:
    """Check what the configurations tell, before the weights are opened."""
    _check_no_consistency_model(index, component)
    if "scheduler" in index.components:
        check_no_map(index.components["scheduler"][1], index.source)
    size = index.config(component).get("sample_size")
    # Without a sample_size the pipeline's own keywords set the size; a video may have more than two sides.
    if size is not None and not (isinstance(size, list) and len(size) > 2):
        image_size(size, index.source, f"{component}/config.json")


def _plain_guidance(
    guidance: Guidance | None, conditions: Embeddings, source: str, *, takes_guidance: bool, is_component: bool
) -> Guidance | None:
    """Return guidance by two outputs; None if the network is conditioned on its scale, or if there is none.

    Args:
        takes_guidance: the network is conditioned on its guidance scale.
        is_component: the pipeline's own guidance is a component, not a keyword of its call.
    """
    if guidance is None or guidance.is_off:
        return None
    if takes_guidance:
        if guidance.image_scale != 1:
            conditions.check_without_image()
        if guidance.range is not None:
            raise UserError(
                "guidance.range: expected none for a network that is conditioned on its guidance scale; try "
                "guidance.scale"
            )
        if guidance.interval != (0.0, 1.0):
            raise UserError(
                "guidance.interval: expected [0, 1] for a network that is conditioned on its guidance scale, got "
                f"{list(guidance.interval)}; try without guidance.interval"
            )
        return None
    if guidance.range is not None and is_component:
        raise UserError(
            "guidance.range: expected none for a pipeline whose guidance is a component, not a keyword; try "
            "guidance.scale"
        )
    guidance.check(conditions, source)
    if conditions.image_guidance is not None and guidance.image_scale == 1:
        keyword = conditions.image_guidance.keyword
        logger.warning(f"guidance.image_scale is 1: the second guidance of {source} ({keyword}), by its image, is off")
    return guidance if conditions.empty is None else replace(guidance, norm_axis=conditions.empty.norm_axis)


def _check_no_consistency_model(index: PipelineIndex, component: str) -> None:
    """Refuse a latent consistency model: its network embeds the guidance scale, whatever its scheduler is."""
    width = index.config(component).get("time_cond_proj_dim")
    # Upscalers of images embed the noise level of their input in the same way.
    width = None if describe_optional_inputs(index.pipeline) is not None else width
    if width is not None or index.pipeline.startswith("LatentConsistencyModel"):
        kind = f"time_cond_proj_dim {width}" if width is not None else index.pipeline
        raise UserError(
            f"{index.source}: expected a denoiser, got a latent consistency model ({kind}), which is a map to data "
            "already; try the model that it was distilled from"
        )


def _demanded(index: PipelineIndex) -> list[str]:
    """Return the components whose folders stock diffusers opens.

    A component with a default value is one that the pipeline can make itself, and has no folder, unless its class lists
    it as optional.
    """
    kind = pipeline_class(index.pipeline)
    parameters = {} if kind is None else inspect.signature(kind).parameters
    optional = getattr(kind, "_optional_components", ())
    made = {name for name, one in parameters.items() if one.default is not one.empty and name not in optional}
    return [name for name in index.components if name not in made]


def _check_packages(index: PipelineIndex) -> None:
    """Check that the packages are installed that components need; their classes are stand-ins otherwise.

    Raises:
        UserError: otherwise.
    """
    classes = {name: (sys.modules.get(library), kind) for name, (library, kind) in index.components.items()}
    for name, (module, kind) in ({"pipeline": (diffusers, index.pipeline)} | classes).items():
        needed = getattr(getattr(module, kind, None), "_backends", ())
        for module_name, package in (_PACKAGES.get(each, (each, each)) for each in needed):
            if find_spec(module_name) is None:
                raise UserError(
                    f"{index.source}: its {name} ({kind}) needs {package}, which is not installed; try `pip install "
                    f"{package}`"
                )


def _open(index: PipelineIndex) -> Any:  # noqa: ANN401 a diffusers class
    missing = [name for name in _demanded(index) if not (index.folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{index.source}: its {missing[0]} is missing (no folder of that name); expected a complete pipeline as "
            "save_pretrained writes it; try to download or save it again"
        )
    try:
        import transformers  # noqa: F401 a test for the optional dependency
    except ImportError as error:
        raise UserError(
            f"{index.source}: expected transformers for its text encoders; try `pip install fmm-distill[text]`"
        ) from error
    if not hasattr(diffusers, index.pipeline):
        raise UserError(
            f"{index.source}: expected a pipeline class of diffusers {diffusers.__version__}, got "
            f"{index.pipeline or 'none'}; try a newer diffusers"
        )
    _check_packages(index)
    try:
        return turn_guiders_off(open_pipeline(index.folder))
    except STOCK_ERRORS as error:
        raise UserError(
            f"{index.source}: the pipeline does not open ({named(error)}); expected a complete pipeline as "
            "save_pretrained writes it, in safetensors; try to download or save it again"
        ) from error
