"""A pipeline's components, opened from their folders and checked."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fmm_distill.teachers.download import Snapshot

__all__ = ["FAULTS", "Found", "check_weights", "open_component", "open_network", "open_pipeline", "open_scheduler"]


# What a stock pipeline raises on files or keywords that it can't use.
FAULTS = (
    ArithmeticError,
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
class Found:
    """A pipeline folder on this disk, before any weight is loaded.

    Attributes:
        pipeline: its class.
        components: name to (library, class) of every component that is not empty.
        snapshot: what it is on the Hub, if it is there; its index alone may be on this disk.
    """

    source: str
    folder: Path
    revision: str | None = None
    licence: dict[str, Any] = field(default_factory=dict)
    pipeline: str = ""
    components: dict[str, tuple[str, str]] = field(default_factory=dict)
    snapshot: Snapshot | None = None

    def component_folder(self, name: str) -> Path:
        """Where a component's files stand: its own folder, or the root, as the oldest repositories have it."""
        own = self.folder / name
        return own if own.is_dir() else self.folder


def open_component(found: Found, component: str, **options: object) -> Any:  # noqa: ANN401 a diffusers class
    """A component from its folder; whatever diffusers finds wrong with the files is the user's to mend."""
    name = found.components[component][1]
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UserError(f"{found.source}: this diffusers ({diffusers.__version__}) has no {name}; install a newer one")
    try:
        return kind.from_pretrained(found.component_folder(component), **options)
    except (OSError, ValueError, RuntimeError, NotImplementedError, TypeError, KeyError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{found.source}: its {component} does not open ({type(error).__name__}: {lines[0]}); wanted a whole "
            "pipeline as save_pretrained writes it: fetch or save it again"
        ) from error


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
    """A stock pipeline in float32 from a folder on this disk, safetensors alone, no code but diffusers' own."""
    with quiet():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, **given, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    # It can decode in tiles alone, and is opened with them off.
    if isinstance(vae := getattr(pipeline, "vae", None), diffusers.AutoencoderKLAllegro):
        vae.enable_tiling()
    return pipeline


def open_scheduler(found: Found) -> Any:  # noqa: ANN401 a diffusers class
    """The pipeline's scheduler."""
    return open_component(found, "scheduler")


def open_network(found: Found, component: str, **missing: object) -> Any:  # noqa: ANN401 a diffusers class
    """A network from safetensors, in float32, checked to be whole and finite; frozen, in evaluation mode.

    Args:
        missing: entries that its configuration has not.
    """
    folder = found.component_folder(component)
    if not folder.is_dir() or (folder == found.folder and component not in ("unet", "scheduler")):
        raise UserError(f"{found.source}: its {component} is missing (no folder of that name): fetch it again")
    if not list(folder.glob("diffusion_pytorch_model*.safetensors")):
        others = sorted(path.name for path in folder.glob("*.bin")) or ["no weights"]
        raise UserError(
            f"{found.source}: {folder.name} has {', '.join(others)} and no diffusion_pytorch_model.safetensors; "
            "pickled weights are not opened: save the pipeline again with save_pretrained(folder, "
            "safe_serialization=True)"
        )
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
