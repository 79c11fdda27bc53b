"""IP-Adapters of a teacher: their files, their checks, and their place in a stock pipeline.

The files of an adapter join those of the pipeline in a folder of links, so that all that opens or copies the pipeline
finds them there: the weights in ``ip_adapter/``, and the image encoder as a component. Stock diffusers loads them.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import diffusers
from safetensors import SafetensorError, safe_open

from fmm_distill.errors import UserError, named
from fmm_distill.teachers.components import STOCK_ERRORS
from fmm_distill.teachers.frozen_adapter import take_adapter
from fmm_distill.teachers.hub.adapter_files import find_adapter_files
from fmm_distill.teachers.hub.links import linked_folder
from fmm_distill.teachers.ip_adapter import FOLDER, IMAGE
from fmm_distill.teachers.requirements import call_parameters, pipeline_class

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fmm_distill.teachers.frozen_adapter import FrozenAdapter
    from fmm_distill.teachers.hub.adapter_files import AdapterFiles
    from fmm_distill.teachers.index import PipelineIndex
    from fmm_distill.teachers.ip_adapter import IpAdapter

__all__ = ["check_ip_adapter", "find_ip_adapter", "link_ip_adapter", "load_into", "open_frozen"]

logger = logging.getLogger(__name__)

# The size that stock diffusers takes where an image encoder names none.
_SIZE = 224
# Of the networks whose adapters can be taken out of their modules.
_NETWORKS = ("UNet2DConditionModel",)


def check_ip_adapter(index: PipelineIndex, adapter: IpAdapter | None, images: Mapping[str, Sequence[Any]]) -> None:
    """Check before any download that pipeline, adapter and images go together.

    Args:
        images: what the pipeline is called with, by keyword, one per sample.

    Raises:
        UserError: otherwise.
    """
    if adapter is None:
        if IMAGE in images:
            raise UserError(
                f"prompts.images.{IMAGE}: expected ip_adapter.source with it, got none; try --set "
                "ip_adapter.source=h94/IP-Adapter and ip_adapter.weight_name, or leave the images out"
            )
        return
    if IMAGE not in images:
        raise UserError(
            f"ip_adapter.source {adapter.source}: expected its images in prompts.images.{IMAGE}, got none; try --set "
            f"prompts.images.{IMAGE}=COLUMN (docs/image-conditions.md)"
        )
    if several := [image for image in images[IMAGE] if isinstance(image, list | tuple)]:
        raise UserError(
            f"prompts.images.{IMAGE}: expected one image per row, got a list of {len(several[0])}; give each image a "
            "row of its own"
        )
    kind = pipeline_class(index.pipeline)
    network = index.components.get("unet", ("", ""))[1]
    takes = kind is not None and hasattr(kind, "load_ip_adapter") and IMAGE in call_parameters(kind)
    if not takes or network not in _NETWORKS:
        raise UserError(
            f"ip_adapter.source: expected a pipeline with a {_NETWORKS[0]} that takes IP-Adapters, such as "
            f"StableDiffusionPipeline and StableDiffusionXLPipeline, got {index.pipeline}; leave ip_adapter out"
        )


def find_ip_adapter(index: PipelineIndex, adapter: IpAdapter) -> AdapterFiles:
    """Find the files of an adapter, and check that they fit a pipeline of which only the index may be on this disk.

    Raises:
        UserError: if they can't be found or read, or are for another network.
    """
    files = find_adapter_files(adapter, needs_encoder="image_encoder" not in index.components)
    if index.snapshot is not None:
        for name in ("unet", *(["image_encoder"] if files.encoder is None else [])):
            index.snapshot.fetch_config(name)
    _check_shapes(index, adapter, files)
    return files


def link_ip_adapter(index: PipelineIndex, adapter: IpAdapter, files: AdapterFiles) -> PipelineIndex:
    """Return the index of a folder of links to the files of the pipeline and of the adapter."""
    added = {}
    if files.encoder is not None:
        added["image_encoder"] = ("transformers", "CLIPVisionModelWithProjection")
    if "feature_extractor" not in index.components:
        added["feature_extractor"] = ("transformers", "CLIPImageProcessor")

    def fill(target: Path) -> None:
        for path in index.folder.iterdir():
            if path.name not in ("model_index.json", FOLDER, *added):
                (target / path.name).symlink_to(path.resolve())
        entries = json.loads((index.folder / "model_index.json").read_text(encoding="utf-8"))
        entries |= {name: list(value) for name, value in added.items()}
        (target / "model_index.json").write_text(json.dumps(entries, indent=2), encoding="utf-8")
        (target / FOLDER).mkdir()
        (target / FOLDER / adapter.weight_name).symlink_to(files.weights.resolve())
        if files.encoder is not None:
            (target / "image_encoder").symlink_to(files.encoder.resolve())
        if "feature_extractor" in added:
            _write_extractor(target / "feature_extractor", _encoder_config(index, files).get("image_size", _SIZE))

    folder = linked_folder("ip-adapters", index.folder, [files.marks(), adapter.weight_name, sorted(added)], fill)
    logger.info(
        f"ip_adapter: {adapter.source} stays as it is, at the scale {adapter.scale:g}; its weights and its image "
        "encoder are copied into exports, which then need no other repository"
    )
    # Its card is next to the files of a repository, not in the folders that load_student links.
    found = replace(adapter, revision=files.commit, license=adapter.license or files.license)
    return replace(index, folder=folder, components=index.components | added, ip_adapter=found)


def load_into(pipeline: Any, folder: Path, adapter: IpAdapter) -> None:  # noqa: ANN401 a diffusers class
    """Load an adapter into a stock pipeline, as a user does.

    Args:
        folder: has its weights in ``ip_adapter/``.

    Raises:
        UserError: if it is not of this network.
    """
    layers = [name for name in pipeline.unet.attn_processors if "attn2" in name]
    logging = diffusers.utils.logging
    before = logging.get_verbosity()
    # Every load warns of a network in float32.
    logging.set_verbosity_error()
    try:
        pipeline.load_ip_adapter(
            folder,
            subfolder=FOLDER,
            weight_name=adapter.weight_name,
            # Next to the folder of the weights, by the slash.
            image_encoder_folder="./image_encoder",
            low_cpu_mem_usage=False,
            local_files_only=True,
        )
        pipeline.set_ip_adapter_scale(adapter.scale)
    except STOCK_ERRORS as error:
        raise UserError(_refused(adapter, f"got one that does not load ({named(error)})")) from error
    finally:
        logging.set_verbosity(before)
    with safe_open(folder / FOLDER / adapter.weight_name, "pt") as file:
        own = sum(key.endswith("to_k_ip.weight") for key in file.keys())  # noqa: SIM118 not a dictionary
    if own != len(layers):
        raise UserError(_refused(adapter, f"got one of {own} attention layers, where the network has {len(layers)}"))


def open_frozen(pipeline: Any, folder: Path, adapter: IpAdapter) -> FrozenAdapter:  # noqa: ANN401 a diffusers class
    """Load an adapter into a pipeline, and take its weights out of those of the network."""
    load_into(pipeline, folder, adapter)
    return take_adapter(pipeline.unet)


def _refused(adapter: IpAdapter, got: str) -> str:
    return (
        f"ip_adapter.weight_name {adapter.weight_name}: expected an IP-Adapter for this teacher's network, {got}; try "
        "the file for its family"
    )


def _check_shapes(index: PipelineIndex, adapter: IpAdapter, files: AdapterFiles) -> None:
    """Check the widths of an adapter against the configurations of the network and of the image encoder."""
    shapes = _shapes(adapter, files.weights)
    keys = sorted(key for key in shapes if key.endswith("to_k_ip.weight"))
    if not keys or not any(key.startswith("image_proj.") for key in shapes):
        raise UserError(_refused(adapter, f"got a file without {'image_proj' if keys else 'to_k_ip'}"))
    if any("_lora." in key for key in shapes):
        raise UserError(
            f"ip_adapter.weight_name {adapter.weight_name}: expected an adapter of images, got one of faces "
            "(FaceID), whose embeddings another network makes; try one of the adapters of images"
        )
    width, own = index.config("unet").get("cross_attention_dim"), shapes[keys[0]][1]
    if isinstance(width, int) and width != own:
        raise UserError(_refused(adapter, f"got one for texts of {own} features, where the network has {width}"))
    config = _encoder_config(index, files)
    for key, name in (("proj.weight", "projection_dim"), ("proj_in.weight", "hidden_size")):
        shape, size = shapes.get(f"image_proj.{key}"), config.get(name)
        if shape is not None and size is not None and shape[1] != size:
            raise UserError(
                f"ip_adapter.image_encoder_folder: expected an image encoder with {name} {shape[1]} for "
                f"{adapter.weight_name}, got {size}; try another one, such as models/image_encoder of h94/IP-Adapter"
            )


def _shapes(adapter: IpAdapter, file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 not a dictionary
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"ip_adapter.weight_name {adapter.weight_name}: can't be read ({named(error)}); try to download it again"
        ) from error


def _encoder_config(index: PipelineIndex, files: AdapterFiles) -> dict[str, Any]:
    """Return the configuration of the image encoder, the pipeline's own or the adapter's."""
    if files.encoder is None:
        return index.config("image_encoder")
    found = json.loads((files.encoder / "config.json").read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _write_extractor(folder: Path, size: int) -> None:
    """Write the image processor that stock diffusers makes where a pipeline has none."""
    from transformers import CLIPImageProcessor

    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
