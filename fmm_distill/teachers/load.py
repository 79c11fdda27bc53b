"""Open a teacher from an id or a folder: the components of its pipeline decide which adapter opens it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers

from fmm_distill.core.torch_state import own_state
from fmm_distill.errors import UserError
from fmm_distill.teachers.adapter_loading import check_ip_adapter, find_ip_adapter, link_ip_adapter
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.class_names import current_classes
from fmm_distill.teachers.dit import load_dit
from fmm_distill.teachers.hub.download import Snapshot, find_on_hub
from fmm_distill.teachers.hub.model_card import license_of
from fmm_distill.teachers.hub.variant import link_variant
from fmm_distill.teachers.index import PipelineIndex
from fmm_distill.teachers.prompted.load import load_prompted
from fmm_distill.teachers.prompts import Prompts, as_prompts
from fmm_distill.teachers.requirements import check_requirements, describe_optional_inputs, takes_prompts
from fmm_distill.teachers.safety import describe_checkers
from fmm_distill.teachers.tasks import as_base, link_base, task_of
from fmm_distill.teachers.unet1d import load_unet1d
from fmm_distill.teachers.unet2d import load_unet2d
from fmm_distill.teachers.weight_files import check_weight_files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fmm_distill.teachers.guidance import Guidance
    from fmm_distill.teachers.ip_adapter import IpAdapter

__all__ = ["BUILTIN", "download", "find_index", "load_teacher"]

logger = logging.getLogger(__name__)

BUILTIN = Path(__file__).parent / "builtin"
_PREFIX = "builtin:"
# Names of checkpoints in one file, with which users try to open a teacher.
_SINGLE_FILES = (".safetensors", ".ckpt", ".gguf", ".bin", ".pt", ".pth", ".sft")


@own_state()
def load_teacher(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prompts: Sequence[str] | Prompts = (),
    call: dict[str, Any] | None = None,
    guidance: Guidance | None = None,
    ip_adapter: IpAdapter | None = None,
) -> Teacher:
    """Open a pretrained diffusers pipeline as a velocity field on the time axis.

    Args:
        source: a Hub id, a folder written by ``save_pretrained``, or ``builtin:<name>``.
        revision: branch, tag or commit on the Hub.
        variant: of the weights, such as fp16; None: the default weights. All are opened in float32.
        prompts: the prompts of a teacher with text encoders, ``Prompts`` with images; none: the empty prompt.
        call: keywords of such a pipeline's call, such as height and width.
        guidance: classifier-free guidance of the velocity; None: no guidance.
        ip_adapter: an IP-Adapter of the pipeline, whose images are ``ip_adapter_image`` of the prompts; None: none.

    Raises:
        UserError: if the teacher can't be found, or if no adapter opens its components.
    """
    index = find_index(source, revision)
    load = _adapter(index, as_prompts(prompts), call, guidance)
    check_ip_adapter(index, ip_adapter, as_prompts(prompts).images)
    files = None if ip_adapter is None else find_ip_adapter(index, ip_adapter)
    # After an adapter is found: weights that can't be opened are not downloaded.
    index = download(index, variant)
    if ip_adapter is not None and files is not None:
        index = link_ip_adapter(index, ip_adapter, files)
    check_weight_files(index)
    if checkers := describe_checkers(index.pipeline, index.components):
        logger.warning(
            f"images are decoded without the {checkers} of {index.pipeline}, the teacher's and the student's alike"
        )
    if index.task is not None and (task := task_of(index.task)) is not None:
        extra = "".join(f", called with {name}={value}" for name, value in index.call.items())
        logger.warning(
            f"{task.pipeline} {task.does} with the network of {task.base}: the teacher and its student are opened as "
            f"{task.base}{extra}, and the student has the task as {task.method}()"
        )
    teacher = load(index)
    given = as_prompts(prompts).images
    if (data := describe_optional_inputs(index.pipeline, given)) is not None:
        logger.warning(f"{index.pipeline} can take {data}; this teacher and its student are opened without")
    return teacher


def _adapter(
    index: PipelineIndex, prompts: Prompts, call: dict[str, Any] | None, guidance: Guidance | None
) -> Callable[[PipelineIndex], Teacher]:
    """Return the function that opens a pipeline with these components."""
    networks = {name: cls for name, (_, cls) in index.components.items() if name in ("unet", "transformer")}
    check_requirements(index, prompts.images)
    has_prompts = takes_prompts(index) or bool(prompts.images)
    # Before the other rules: a prompted pipeline may have a network that they know too.
    if has_prompts and networks:
        return lambda complete: load_prompted(complete, prompts if len(prompts) else Prompts(("",)), call, guidance)
    if (len(prompts) or call) and not has_prompts:
        raise UserError(
            f"{index.source}: expected a pipeline with a text encoder for prompts and pipeline, got one without; try "
            "without prompts, pipeline and a text column in data.condition"
        )
    if "scheduler" in index.components:
        if networks == {"unet": "UNet1DModel"}:
            return lambda complete: _guided(load_unet1d(complete), guidance)
        if networks == {"unet": "UNet2DModel"} and set(index.components) <= {"unet", "scheduler", "vqvae"}:
            return lambda complete: _guided(load_unet2d(complete), guidance)
        if networks == {"transformer": "DiTTransformer2DModel"}:
            return lambda complete: _guided(load_dit(complete), guidance)
    described = ", ".join(f"{name}: {cls}" for name, (_, cls) in index.components.items())
    raise UserError(
        f"{index.source}: no adapter for {described or 'an empty pipeline'}; expected UNet2DModel (pixels, or latents "
        "of a VQModel), UNet1DModel (Dance Diffusion), DiTTransformer2DModel (pixels, or latents of a VAE), or a "
        "pipeline with text encoders; to add an adapter see docs/add-a-teacher.md"
    )


def _guided(teacher: Teacher, guidance: Guidance | None) -> Teacher:
    if guidance is None or guidance.is_off:
        return teacher
    guidance.check(teacher.conditions, teacher.source)
    teacher.guidance = guidance
    return teacher


def find_index(source: str, revision: str | None = None) -> PipelineIndex:
    """Return the index of a pipeline; for a Hub id, only the index is downloaded.

    Raises:
        UserError: if there is no index, or if it names code of the repository.
    """
    location = _locate(source, revision)
    folder = location if isinstance(location, Path) else location.folder
    file = folder / "model_index.json"
    if not file.is_file():
        raise UserError(f"{source}: no model_index.json in it; {_instead_of_index(folder)}")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{source}: model_index.json is not JSON ({error}); try to download the pipeline again"
        ) from error
    if not isinstance(entries, dict):
        raise UserError(f"{source}: model_index.json has no components; try to download the pipeline again")
    components = {
        # Other entries of the index are settings of the pipeline and no components.
        name: (value[0], value[1])
        for name, value in entries.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
    }
    pipeline = entries.get("_class_name", "")
    if not isinstance(pipeline, str):
        raise UserError(
            f"{source}: its pipeline is code of the repository ({pipeline}), which is not run; expected a class of "
            "diffusers"
        )
    _check_code(source, components)
    if isinstance(location, Path) and revision is not None:
        raise UserError(f"{source}: expected a Hub id for revision {revision}, got a folder; try without revision")

    def config_of(name: str) -> dict[str, Any]:
        if isinstance(location, Snapshot):
            location.fetch_config(name)
        return PipelineIndex(source, folder).config(name)

    components = current_classes(components, config_of)
    index = PipelineIndex(source, folder, pipeline=pipeline, components=components)
    if isinstance(location, Snapshot):
        index = replace(index, revision=location.commit, snapshot=location)
    return as_base(index, entries, config_of)


def _check_code(source: str, components: dict[str, tuple[str, str]]) -> None:
    """Check that every component is of a library or of a stock pipeline, not code of the repository."""
    for name, (library, _) in components.items():
        known = library in ("diffusers", "transformers") or hasattr(diffusers.pipelines, str(library))
        if not known:
            raise UserError(
                f"{source}: its {name} is code of the repository ({library}.py), which is not run; expected components "
                "of diffusers and transformers"
            )


def download(index: PipelineIndex, variant: str | None = None) -> PipelineIndex:
    """Return the index with all its files on this disk, its license, and the variant as the default weights."""
    if index.snapshot is not None:
        index.snapshot.fetch(variant)
    index = replace(index, license=license_of(index.folder))
    if variant is not None:
        index = replace(index, folder=link_variant(index.source, index.folder, variant))
    return replace(index, folder=link_base(index))


def _locate(source: str, revision: str | None) -> Path | Snapshot:
    if source.startswith(_PREFIX):
        name = source.removeprefix(_PREFIX)
        if name == "checkerboard":
            raise UserError(
                f"{source} is a velocity field on the plane, not a diffusers pipeline; in a checkout of the project "
                "run python -m experiments.checkerboard"
            )
        known = sorted(path.name for path in BUILTIN.iterdir() if (path / "model_index.json").is_file())
        if name not in known:
            raise UserError(f"{source}: expected one of {', '.join(_PREFIX + n for n in known)}")
        return BUILTIN / name
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file() or path.suffix in _SINGLE_FILES:
        raise UserError(_about_file(source, path))
    if "://" in source:
        raise UserError(f"{source}: an address; expected a pipeline folder, a Hub id (owner/name) or builtin:digits")
    # A Hub id has at most one slash.
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such folder; expected a pipeline folder, a Hub id or builtin:digits")
    return find_on_hub(source, revision)


def _about_file(source: str, path: Path) -> str:
    """Return the message on a file in place of a folder, in most cases a checkpoint of another program."""
    if path.suffix not in _SINGLE_FILES:
        return f"{source}: a file; expected a pipeline folder, a Hub id or builtin:digits"
    if not path.is_file():
        return f"{source}: no such file, and a file is not a pipeline; expected a folder, a Hub id or builtin:digits"
    if path.suffix == ".gguf":
        return f"{source}: quantized weights in a single file; expected the pipeline folder of the weights in float"
    return (
        f"{source}: a single-file checkpoint; expected a pipeline folder; try to convert it once, with the class of "
        'its family: python -c "from diffusers import StableDiffusionXLPipeline as P; '
        f"P.from_single_file('{source}').save_pretrained('teacher')\""
    )


def _instead_of_index(folder: Path) -> str:
    """Return the remedy for a folder without an index, by its files."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if any("lora" in name.lower() and name.endswith(_SINGLE_FILES) for name in names):
        return "it has a LoRA; expected its pipeline; try fuse_lora and save_pretrained(folder)"
    if "config.json" in names:
        return "it has one component; expected a complete diffusers pipeline; try the folder above it"
    single = [name for name in names if name.endswith(_SINGLE_FILES)]
    if single:
        return (
            f"it has {single[0]}, a single-file checkpoint; expected a pipeline folder; try from_single_file of the "
            "pipeline class of its family and save_pretrained(folder)"
        )
    return "expected a complete diffusers pipeline (save_pretrained)"
