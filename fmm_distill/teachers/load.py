"""From an id or a folder to a teacher: the components decide which adapter opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError

from fmm_distill.errors import UserError
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.components import Found
from fmm_distill.teachers.dit import load_dit
from fmm_distill.teachers.prompted import load_prompted
from fmm_distill.teachers.unet1d import load_unet1d
from fmm_distill.teachers.unet2d import load_unet2d

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fmm_distill.teachers.guidance import Guidance

__all__ = ["BUILTIN", "find", "load_teacher"]

BUILTIN = Path(__file__).parent.parent / "builtin"
_PREFIX = "builtin:"
# Tokenizers come as text and as sentencepiece models.
_TRAVELS = ["*.json", "*.safetensors", "README.md", "*.txt", "*.model", "*.jinja"]


def load_teacher(
    source: str,
    *,
    revision: str | None = None,
    prompts: Sequence[str] = (),
    call: dict[str, Any] | None = None,
    guidance: Guidance | None = None,
) -> Teacher:
    """A pretrained diffusers pipeline as a velocity field on the time axis.

    Args:
        source: a Hub id, a folder written by ``save_pretrained``, or ``builtin:<name>``.
        revision: branch, tag or commit on the Hub.
        prompts: what a teacher of prompts is told; none: the empty prompt.
        call: keywords of such a pipeline's call, such as height and width.
        guidance: classifier-free guidance of the velocity; None: none.

    Raises:
        UserError: if it can't be found or no adapter opens it; the message says what was found.
    """
    found = find(source, revision)
    networks = {name: cls for name, (_, cls) in found.components.items() if name in ("unet", "transformer")}
    has_text = any(name.startswith("text_encoder") for name in found.components)
    if has_text and networks:
        return load_prompted(found, prompts or ("",), call, guidance)
    if (prompts or call) and not has_text:
        raise UserError(
            f"{source}: prompts and pipeline are for pipelines with a text encoder; it has none "
            "(a data.condition of text is prompts)"
        )
    if "scheduler" in found.components:
        if networks == {"unet": "UNet1DModel"}:
            return _guided(load_unet1d(found), guidance)
        if networks == {"unet": "UNet2DModel"} and set(found.components) <= {"unet", "scheduler", "vqvae"}:
            return _guided(load_unet2d(found), guidance)
        if networks == {"transformer": "DiTTransformer2DModel"} and "vae" in found.components:
            return _guided(load_dit(found), guidance)
    described = ", ".join(f"{name}: {cls}" for name, (_, cls) in found.components.items())
    raise UserError(
        f"{source}: no adapter for {described or 'an empty pipeline'}; known: UNet2DModel (pixels, or latents of a "
        "VQModel), UNet1DModel (Dance Diffusion), DiTTransformer2DModel with a VAE, and pipelines with text encoders. "
        "To add one see docs/add-a-teacher.md"
    )


def _guided(teacher: Teacher, guidance: Guidance | None) -> Teacher:
    if guidance is None or (guidance.scale == 1 and guidance.range is None):
        return teacher
    if teacher.conditions is None:
        raise UserError(f"{teacher.source}: guidance.scale {guidance.scale} on an unconditional teacher; wanted 1")
    teacher.conditions.null(1)
    teacher.guidance = guidance
    return teacher


def find(source: str, revision: str | None = None) -> Found:
    """The pipeline's folder and components; downloads it if ``source`` is a Hub id."""
    folder, commit = _folder(source, revision)
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{source}: no model_index.json in it; wanted a whole diffusers pipeline (save_pretrained)")
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
        raise UserError(f"{source}: its pipeline is code of the repository ({pipeline}); wanted one of diffusers' own")
    return Found(source, folder, commit, _licence(folder), pipeline, components)


def _folder(source: str, revision: str | None) -> tuple[Path, str | None]:
    if source.startswith(_PREFIX):
        name = source.removeprefix(_PREFIX)
        if name == "checkerboard":
            raise UserError(
                f"{source} is a velocity field on the plane, not a diffusers pipeline; in a checkout of the project "
                "run python -m benchmarks.checkerboard"
            )
        known = sorted(path.name for path in BUILTIN.iterdir() if (path / "model_index.json").is_file())
        if name not in known:
            raise UserError(f"{source}: no such built-in teacher; known: {', '.join(_PREFIX + n for n in known)}")
        return BUILTIN / name, None
    path = Path(source).expanduser()
    if path.is_dir():
        return path, None
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such folder; wanted a pipeline folder, a Hub id or builtin:digits")
    try:
        local = Path(snapshot_download(source, revision=revision, allow_patterns=_TRAVELS))
    except HFValidationError as error:
        raise UserError(f"{source}: neither a folder nor a Hub id; wanted owner/name or an existing path") from error
    except OSError as error:
        raise UserError(
            f"{source}: no such folder here, and the Hub gave nothing ({_first_line(error)}); "
            "check the name, the network and your token"
        ) from error
    return local, local.name


def _licence(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        licence: str | None = ModelCard.load(card).data.license
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{card}: the model card's metadata can't be read ({_first_line(error)}); mend it") from error
    return licence


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
