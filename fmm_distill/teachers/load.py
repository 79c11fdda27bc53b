"""From an id or a folder to a teacher: the components decide which adapter opens it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import yaml
from huggingface_hub import ModelCard

from fmm_distill.core.torch_state import own_state
from fmm_distill.errors import UserError, named
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.components import PipelineIndex
from fmm_distill.teachers.dit import load_dit
from fmm_distill.teachers.hub.download import Snapshot, find_on_hub
from fmm_distill.teachers.hub.variant import as_plain
from fmm_distill.teachers.prompted.load import load_prompted
from fmm_distill.teachers.renamed import current_classes
from fmm_distill.teachers.safety import about_checkers
from fmm_distill.teachers.unet1d import load_unet1d
from fmm_distill.teachers.unet2d import load_unet2d
from fmm_distill.teachers.weight_files import check_weight_files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fmm_distill.teachers.guidance import Guidance

__all__ = ["BUILTIN", "fetched", "find", "load_teacher"]

logger = logging.getLogger(__name__)

BUILTIN = Path(__file__).parent / "builtin"
_PREFIX = "builtin:"
_SINGLE_FILES = (".safetensors", ".ckpt", ".gguf", ".bin", ".pt", ".pth", ".sft")


@own_state()
def load_teacher(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prompts: Sequence[str] = (),
    call: dict[str, Any] | None = None,
    guidance: Guidance | None = None,
) -> Teacher:
    """A pretrained diffusers pipeline as a velocity field on the time axis.

    Args:
        source: a Hub id, a folder written by ``save_pretrained``, or ``builtin:<name>``.
        revision: branch, tag or commit on the Hub.
        variant: of the weights, such as fp16; None: the plain ones. They are opened in float32 either way.
        prompts: what a teacher of prompts is told; none: the empty prompt.
        call: keywords of such a pipeline's call, such as height and width.
        guidance: classifier-free guidance of the velocity; None: none.

    Raises:
        UserError: if it can't be found or no adapter opens it; the message says what was found.
    """
    found = find(source, revision)
    load = _adapter(found, prompts, call, guidance)
    # Only what an adapter opens is fetched.
    found = fetched(found, variant)
    check_weight_files(found)
    if checkers := about_checkers(found.pipeline, found.components):
        logger.warning(
            f"images are decoded without the {checkers} of {found.pipeline}, the teacher's and the student's alike"
        )
    return load(found)


def _adapter(
    found: PipelineIndex, prompts: Sequence[str], call: dict[str, Any] | None, guidance: Guidance | None
) -> Callable[[PipelineIndex], Teacher]:
    """What opens a pipeline of these components."""
    networks = {name: cls for name, (_, cls) in found.components.items() if name in ("unet", "transformer")}
    has_text = any(name.startswith("text_encoder") for name in found.components)
    if has_text and networks:
        return lambda whole: load_prompted(whole, prompts or ("",), call, guidance)
    if (prompts or call) and not has_text:
        raise UserError(
            f"{found.source}: prompts and pipeline are for pipelines with a text encoder; it has none "
            "(a data.condition of text is prompts)"
        )
    if "scheduler" in found.components:
        if networks == {"unet": "UNet1DModel"}:
            return lambda whole: _guided(load_unet1d(whole), guidance)
        if networks == {"unet": "UNet2DModel"} and set(found.components) <= {"unet", "scheduler", "vqvae"}:
            return lambda whole: _guided(load_unet2d(whole), guidance)
        if networks == {"transformer": "DiTTransformer2DModel"} and "vae" in found.components:
            return lambda whole: _guided(load_dit(whole), guidance)
    described = ", ".join(f"{name}: {cls}" for name, (_, cls) in found.components.items())
    raise UserError(
        f"{found.source}: no adapter for {described or 'an empty pipeline'}; known: UNet2DModel (pixels, or latents of "
        "a VQModel), UNet1DModel (Dance Diffusion), DiTTransformer2DModel with a VAE, and pipelines with text "
        "encoders. To add one see docs/add-a-teacher.md"
    )


def _guided(teacher: Teacher, guidance: Guidance | None) -> Teacher:
    if guidance is None or (guidance.scale == 1 and guidance.range is None):
        return teacher
    if teacher.conditions is None:
        raise UserError(f"{teacher.source}: guidance.scale {guidance.scale} on an unconditional teacher; expected 1")
    teacher.conditions.null(1)
    teacher.guidance = guidance
    return teacher


def find(source: str, revision: str | None = None) -> PipelineIndex:
    """The pipeline's folder and components; of a Hub id the index alone is fetched, the rest by ``fetched``."""
    place = _place(source, revision)
    folder = place if isinstance(place, Path) else place.folder
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{source}: no model_index.json in it; {_instead_of_index(folder)}")
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{source}: model_index.json is not JSON ({error}); fetch the pipeline again") from error
    if not isinstance(entries, dict):
        raise UserError(f"{source}: model_index.json holds no components; fetch the pipeline again")
    components = {
        name: (value[0], value[1])
        for name, value in entries.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
    }
    pipeline = entries.get("_class_name", "")
    if not isinstance(pipeline, str):
        raise UserError(
            f"{source}: its pipeline is code of the repository ({pipeline}); expected one of diffusers' own"
        )
    _check_code(source, components)
    if isinstance(place, Path) and revision is not None:
        raise UserError(f"{source}: revision {revision} is of a teacher on the Hub, this is a folder; leave it out")

    def config_of(name: str) -> dict[str, Any]:
        if isinstance(place, Snapshot):
            place.fetch_config(name)
        return PipelineIndex(source, folder).config(name)

    components = current_classes(components, config_of)
    if isinstance(place, Path):
        return PipelineIndex(source, folder, pipeline=pipeline, components=components)
    return PipelineIndex(source, folder, place.commit, pipeline=pipeline, components=components, snapshot=place)


def _check_code(source: str, components: dict[str, tuple[str, str]]) -> None:
    """A component is of a library or a part of a stock pipeline, or code that travels with the repository."""
    for name, (library, _) in components.items():
        known = library in ("diffusers", "transformers") or hasattr(diffusers.pipelines, str(library))
        if not known:
            raise UserError(
                f"{source}: its {name} is code of the repository ({library}.py), which is not run; expected components "
                "of diffusers and transformers"
            )


def fetched(found: PipelineIndex, variant: str | None = None) -> PipelineIndex:
    """The same with all its files on this disk, its license, and the weights of the variant as the plain ones."""
    if found.snapshot is not None:
        found.snapshot.fetch(variant)
    found = replace(found, license=_license(found.folder))
    return found if variant is None else replace(found, folder=as_plain(found.source, found.folder, variant))


def _place(source: str, revision: str | None) -> Path | Snapshot:
    if source.startswith(_PREFIX):
        name = source.removeprefix(_PREFIX)
        if name == "checkerboard":
            raise UserError(
                f"{source} is a velocity field on the plane, not a diffusers pipeline; in a checkout of the project "
                "run python -m experiments.checkerboard"
            )
        known = sorted(path.name for path in BUILTIN.iterdir() if (path / "model_index.json").is_file())
        if name not in known:
            raise UserError(f"{source}: no such built-in teacher; known: {', '.join(_PREFIX + n for n in known)}")
        return BUILTIN / name
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file() or path.suffix in _SINGLE_FILES:
        raise UserError(_about_file(source, path))
    if "://" in source:
        raise UserError(f"{source}: an address; expected a pipeline folder, a Hub id (owner/name) or builtin:digits")
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such folder; expected a pipeline folder, a Hub id or builtin:digits")
    return find_on_hub(source, revision)


def _about_file(source: str, path: Path) -> str:
    """A file in place of a folder: a checkpoint of another program, in most cases."""
    if path.suffix not in _SINGLE_FILES:
        return f"{source}: a file; expected a pipeline folder, a Hub id or builtin:digits"
    if not path.is_file():
        return (
            f"{source}: no such file, and a single file is no pipeline; expected a folder, a Hub id or builtin:digits"
        )
    if path.suffix == ".gguf":
        return f"{source}: quantized weights in a single file; expected the pipeline folder of the plain weights"
    return (
        f"{source}: a single-file checkpoint; expected a pipeline folder. Convert it once, with the class of its "
        'family: python -c "from diffusers import StableDiffusionXLPipeline as P; '
        f"P.from_single_file('{source}').save_pretrained('teacher')\""
    )


def _instead_of_index(folder: Path) -> str:
    """The remedy, by the files that a folder has."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if any("lora" in name.lower() and name.endswith(_SINGLE_FILES) for name in names):
        return "it holds a LoRA; expected the pipeline that it belongs to, fused with it (fuse_lora) and saved"
    if "config.json" in names:
        return "it holds one component; expected a complete diffusers pipeline, such as the folder above it"
    single = [name for name in names if name.endswith(_SINGLE_FILES)]
    if single:
        return (
            f"it holds {single[0]}, a single-file checkpoint: open it with from_single_file of the pipeline class of "
            "its family, and save it with save_pretrained(folder)"
        )
    return "expected a complete diffusers pipeline (save_pretrained)"


def _license(folder: Path) -> dict[str, Any]:
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        # A model index that is not whole is no matter of the license.
        said = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{card}: the model card's metadata can't be read ({named(error)}); repair it") from error
    return {key: said[key] for key in ("license", "license_name", "license_link") if said.get(key)}
