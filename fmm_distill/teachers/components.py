"""A pipeline's components, opened from their folders and checked."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from fmm_distill.errors import UserError, named
from fmm_distill.teachers.safety import without_checkers
from fmm_distill.teachers.weight_files import model_class, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from fmm_distill.teachers.hub.download import Snapshot

__all__ = [
    "STOCK_ERRORS",
    "PipelineIndex",
    "_check_keys",
    "check_weights",
    "open_component",
    "open_network",
    "open_pipeline",
    "open_scheduler",
]


# What a stock pipeline raises on files or keywords that it can't use.
STOCK_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass
class PipelineIndex:
    """A pipeline folder on this disk, before any weight is loaded.

    Attributes:
        pipeline: its class.
        components: name to (library, class) of every component that is not empty.
        snapshot: what it is on the Hub, if it is there; its index alone may be on this disk.
    """

    source: str
    folder: Path
    revision: str | None = None
    license: dict[str, Any] = field(default_factory=dict)
    pipeline: str = ""
    components: dict[str, tuple[str, str]] = field(default_factory=dict)
    snapshot: Snapshot | None = None

    def component_folder(self, name: str) -> Path:
        """Where a component's files stand: its own folder, or the root, as the oldest repositories have it."""
        own = self.folder / name
        return own if own.is_dir() else self.folder

    def config(self, name: str) -> dict[str, Any]:
        """A component's configuration, before it is opened; empty where it has none.

        Raises:
            UserError: if it is no dictionary in JSON.
        """
        file = self.component_folder(name) / "config.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except (OSError, ValueError) as error:
            raise UserError(f"{self.source}: {name}/config.json can't be read ({error}); fetch it again") from error
        if not isinstance(values, dict):
            raise UserError(f"{self.source}: {name}/config.json holds no settings; fetch it again")
        return values


def open_component(found: PipelineIndex, component: str, **options: object) -> Any:  # noqa: ANN401 a diffusers class
    """A component from its folder; whatever diffusers finds wrong with the files is the user's to mend."""
    name = found.components[component][1]
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UserError(f"{found.source}: this diffusers ({diffusers.__version__}) has no {name}; install a newer one")
    try:
        if model_class("diffusers", name) is None:
            return kind.from_pretrained(found.component_folder(component), **options)
        model, keys = kind.from_pretrained(found.component_folder(component), output_loading_info=True, **options)
    except STOCK_ERRORS as error:
        raise UserError(
            f"{found.source}: its {component} does not open ({named(error)}); wanted a complete "
            "pipeline as save_pretrained writes it: fetch or save it again"
        ) from error
    _check_keys(found.source, component, keys)
    return model


def _check_keys(source: str, component: str, keys: Mapping[str, Iterable[str]]) -> None:
    """Refuse a model whose file lacks weights: stock classes draw those at random and only warn.

    A network's file may not hold more than its class has either: another network was trained than the one that opens.

    Args:
        keys: ``missing_keys`` and ``unexpected_keys`` of the loading.
    """
    missing, more = (sorted(keys.get(name, ())) for name in ("missing_keys", "unexpected_keys"))
    if missing:
        raise UserError(
            f"{source}: {len(missing)} weights of its {component} are missing in its file ({some(missing)}); wanted "
            "the weights of this network: fetch or save it again"
        )
    # An exported student has its own beside those of the stock class.
    more = [key for key in more if not key.startswith("jump_embedding.")]
    if more and component in ("unet", "transformer"):
        raise UserError(
            f"{source}: the file of its {component} holds {len(more)} weights that its class and configuration have no "
            f"place for ({some(more)}); wanted the configuration that belongs to them: fetch or save it again"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """No bar for every component that diffusers and transformers load."""
    loggings = [diffusers.utils.logging]
    if (transformers := sys.modules.get("transformers")) is not None:
        loggings.append(transformers.utils.logging)
    shown = [logging for logging in loggings if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()


def open_pipeline(folder: Path, **given: object) -> Any:  # noqa: ANN401 a diffusers class
    """A stock pipeline in float32 from a folder on this disk, safetensors alone, no code but diffusers' own.

    It has no safety checker and no watermark: a checked image is black, and measures of it mean nothing.

    Raises:
        UserError: if weights of a component are missing.
    """
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = {name: value for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    given = without_checkers(index["_class_name"], parts) | given
    with quiet():
        for name, (library, kind) in parts.items():
            if name not in given and not name.startswith("_") and (folder / name).is_dir():
                given |= _open_part(folder, name, model_class(library, kind))
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, **given, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    # It can decode in tiles alone, and is opened with them off.
    if isinstance(vae := getattr(pipeline, "vae", None), diffusers.AutoencoderKLAllegro):
        vae.enable_tiling()
    return pipeline


def _open_part(folder: Path, name: str, kind: Any | None) -> dict[str, Any]:  # noqa: ANN401 a class of a model
    """A model of a pipeline, checked to be complete; nothing of what is no model."""
    if kind is None:
        return {}
    model, keys = kind.from_pretrained(
        folder / name, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    _check_keys(str(folder), name, keys)
    return {name: model}


def open_scheduler(found: PipelineIndex) -> Any:  # noqa: ANN401 a diffusers class
    """The pipeline's scheduler."""
    return open_component(found, "scheduler")


def open_network(found: PipelineIndex, component: str, **missing: object) -> Any:  # noqa: ANN401 a diffusers class
    """A network from safetensors, in float32, checked to be whole and finite; frozen, in evaluation mode.

    Args:
        missing: entries that its configuration has not.
    """
    folder = found.component_folder(component)
    if not folder.is_dir() or (folder == found.folder and component not in ("unet", "scheduler")):
        raise UserError(f"{found.source}: its {component} is missing (no folder of that name): fetch it again")
    network = open_component(found, component, use_safetensors=True, torch_dtype=torch.float32, **missing)
    check_weights(network, found.source)
    return network.eval().requires_grad_(False)


def check_weights(network: torch.nn.Module, source: str) -> None:
    """Refuse a network with weights missing or not finite."""
    for key, tensor in network.state_dict().items():
        if tensor.is_meta:
            raise UserError(f"{source}: {key} is missing in the weights; wanted a whole network: fetch it again")
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {key} holds NaN or infinite numbers; wanted a trained network: fetch it again")
