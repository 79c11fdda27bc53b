"""The components of a pipeline, opened from their folders and checked."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from fmm_distill.errors import UserError, named
from fmm_distill.teachers.safety import without_checkers
from fmm_distill.teachers.weight_files import list_names, model_class

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from fmm_distill.teachers.index import PipelineIndex

__all__ = [
    "STOCK_ERRORS",
    "check_weights",
    "open_component",
    "open_network",
    "open_pipeline",
    "open_scheduler",
]


# Errors of stock classes on files, keywords or configurations that they can't use: the user's to fix, not ours.
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


def open_component(index: PipelineIndex, component: str, **options: object) -> Any:  # noqa: ANN401 a diffusers class
    """Open a component from its folder.

    Args:
        options: keywords of ``from_pretrained``.

    Raises:
        UserError: if diffusers can't open it, or if weights are missing.
    """
    name = index.components[component][1]
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UserError(
            f"{index.source}: expected the class {name} in diffusers {diffusers.__version__}, got none; try a newer "
            "diffusers"
        )
    try:
        if model_class("diffusers", name) is None:
            return kind.from_pretrained(index.component_folder(component), **options)
        model, keys = kind.from_pretrained(index.component_folder(component), output_loading_info=True, **options)
    except STOCK_ERRORS as error:
        raise UserError(
            f"{index.source}: its {component} does not open ({named(error)}); expected a complete pipeline as "
            "save_pretrained writes it; try to download or save it again"
        ) from error
    _check_keys(index.source, component, keys)
    return model


def _check_keys(source: str, component: str, keys: Mapping[str, Iterable[str]]) -> None:
    """Check that a file has exactly the weights of its model.

    Stock classes initialize missing weights at random and only warn. Additional weights of a network mean that another
    network was trained than the one that opens.

    Args:
        keys: ``missing_keys`` and ``unexpected_keys`` from ``from_pretrained``.

    Raises:
        UserError: otherwise.
    """
    missing, more = (sorted(keys.get(name, ())) for name in ("missing_keys", "unexpected_keys"))
    if missing:
        raise UserError(
            f"{source}: {len(missing)} weights of its {component} are missing in its file ({list_names(missing)}); "
            "expected all weights of the network; try to download or save it again"
        )
    # An exported student has weights in addition to those of the stock class.
    more = [key for key in more if not _depends_on_jump(key)]
    if more and component in ("unet", "transformer"):
        raise UserError(
            f"{source}: the file of its {component} has {len(more)} weights that its class does not have "
            f"({list_names(more)}); expected the configuration that belongs to them; try to download or save it again"
        )


def _depends_on_jump(key: str) -> bool:
    """Return whether a weight is a student's own, in a name that ``student.student.is_new`` accepts too."""
    return key.startswith("jump_embedding.") or key.rpartition(".")[2].startswith(("jump_", "diagonal_"))


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers, one for every component that they load."""
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
    """Open a stock pipeline in float32 from a folder on this disk, from safetensors, without code of the repository.

    It has no safety checker and no watermark: metrics of images that a checker has replaced by black ones are
    meaningless.

    Args:
        given: components that are open already, by name.

    Raises:
        UserError: if weights of a component are missing.
    """
    entries: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = {name: value for name, value in entries.items() if _is_component(value)}
    # A component of the caller wins over the removal of a checker.
    given = without_checkers(entries["_class_name"], parts) | given
    with without_progress_bars():
        for name, (library, kind) in parts.items():
            if name not in given and not name.startswith("_") and (folder / name).is_dir():
                given |= _open_part(folder, name, model_class(library, kind))
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, **given, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    # This autoencoder can decode only in tiles, and tiles are off by default.
    if isinstance(vae := getattr(pipeline, "vae", None), diffusers.AutoencoderKLAllegro):
        vae.enable_tiling()
    return pipeline


def _is_component(value: object) -> bool:
    """Return whether an entry of an index is a component that is not empty: other lists are settings."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value)


def _open_part(folder: Path, name: str, kind: Any | None) -> dict[str, Any]:  # noqa: ANN401 a class of a model
    """Open a component with weights; return an empty dictionary for one without, or for one of several folders.

    Several ControlNets in one component have a folder each, which the pipeline opens itself.
    """
    if kind is None or _is_of_several(folder / name, kind):
        return {}
    model, keys = kind.from_pretrained(
        folder / name, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    _check_keys(str(folder), name, keys)
    return {name: model}


def _is_of_several(folder: Path, kind: Any) -> bool:  # noqa: ANN401 a class of diffusers or transformers
    """Return whether a class opens its own folders, of which this first one is of another class."""
    file = folder / "config.json"
    if "from_pretrained" not in vars(kind) or not file.is_file():
        return False
    return json.loads(file.read_text(encoding="utf-8")).get("_class_name", kind.__name__) != kind.__name__


def open_scheduler(index: PipelineIndex) -> Any:  # noqa: ANN401 a diffusers class
    """Open the scheduler of a pipeline."""
    return open_component(index, "scheduler")


def open_network(index: PipelineIndex, component: str, **missing: object) -> Any:  # noqa: ANN401 a diffusers class
    """Open a network from safetensors, in float32, frozen and in evaluation mode.

    Args:
        missing: entries that its configuration lacks.

    Raises:
        UserError: if weights are missing or not finite.
    """
    folder = index.component_folder(component)
    if not folder.is_dir() or (folder == index.folder and component not in ("unet", "scheduler")):
        raise UserError(
            f"{index.source}: its {component} is missing (no folder of that name); try to download or save it again"
        )
    # float32 also from half-precision files, since the student is trained from these weights.
    network = open_component(index, component, use_safetensors=True, torch_dtype=torch.float32, **missing)
    check_weights(network, index.source)
    return network.eval().requires_grad_(False)


def check_weights(network: torch.nn.Module, source: str) -> None:
    """Check that all weights of a network are there and finite.

    Raises:
        UserError: otherwise.
    """
    for key, tensor in network.state_dict().items():
        if tensor.is_meta:
            raise UserError(
                f"{source}: {key} is missing in the weights; expected all weights; try to download it again"
            )
        if not tensor.isfinite().all():
            raise UserError(
                f"{source}: {key} has NaN or infinite numbers; expected finite weights; try to download it again"
            )
