"""Checks of a pipeline's weight files before they are loaded: complete, in safetensors, and plain floats."""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from fmm_distill.errors import UserError
from fmm_distill.teachers.safety import CHECKERS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fmm_distill.teachers.index import PipelineIndex

__all__ = ["check_weight_files", "list_names", "model_class"]

logger = logging.getLogger(__name__)

# File names of default weights, without the extension.
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
# Names that peft, diffusers and LyCORIS give to the weights of adapters that are not fused.
_ADAPTERS = re.compile(r"(^|[._])(base_layer|lora|lora_[A-Za-z]+|hada_w\d\w*|lokr_w\d\w*)(\.|$)")
# Names that bitsandbytes, quanto, GPTQ and scaled float8 give to the scales of quantized weights.
_SCALES = re.compile(
    r"\.(absmax|quant_map|quant_state\.\w+|SCB|weight\._data|weight\._scale|qweight|qzeros|scales|weight_scale|"
    r"scale_weight|input_scale)$"
)
_INTEGERS = ("U8", "I8", "I16", "U16", "I32", "U32")
# Names in a message: the rest is counted.
_SHOWN = 3


def model_class(library: str, name: str) -> Any | None:  # noqa: ANN401 a class of diffusers or transformers
    """Return the class of a component with weights; None: it has none, or its class is of another library."""
    if library == "diffusers":
        kind = getattr(diffusers, name, None)
        return kind if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin) else None
    if library == "transformers":
        # An optional dependency, and slow to import.
        import transformers

        kind = getattr(transformers, name, None)
        return kind if isinstance(kind, type) and issubclass(kind, torch.nn.Module) else None
    return None


def check_weight_files(index: PipelineIndex) -> None:
    """Check weights by their configurations and file headers.

    Raises:
        UserError: if weights are missing, pickled, quantized or unfused.
    """
    for name, (library, kind) in index.components.items():
        folder = index.component_folder(name)
        # In the root folder of the oldest repositories there is the network alone.
        own_folder = folder != index.folder or name == "unet"
        if name in CHECKERS or not folder.is_dir() or not own_folder or _no_model(library, kind):
            continue
        _check_quantization(index, name, folder)
        types: set[str] = set()
        for file in _files(index.source, name, folder, _STEMS[library]):
            types |= _check_header(index.source, name, file)
        if few := sorted(kind for kind in types if kind.startswith("F8_")):
            logger.warning(f"{index.source}: its {name} is stored in {few[0]} without scales; it is opened in float32")


def _no_model(library: str, name: str) -> bool:
    # Without transformers, the adapter raises an error with the package to install.
    try:
        return model_class(library, name) is None
    except ImportError:
        return True


def _check_quantization(index: PipelineIndex, name: str, folder: Path) -> None:
    settings = index.config(name).get("quantization_config")
    packed = sorted(path.name for path in folder.glob("*.gguf"))
    if settings or packed:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        _refuse_quantized(index.source, name, str(method or (packed[0] if packed else "quantization_config")))


def _refuse_quantized(source: str, name: str, how: str) -> None:
    raise UserError(
        f"{source}: expected float weights, got quantized ones in its {name} ({how}); try the pipeline before "
        f"quantization, or save it after pipeline.{name}.dequantize()"
    )


def _files(source: str, name: str, folder: Path, stem: str) -> list[Path]:
    """Return the safetensors files of a component."""
    shard_index = folder / f"{stem}.safetensors.index.json"
    if (single := folder / f"{stem}.safetensors").is_file():
        return [single]
    if not shard_index.is_file():
        _refuse_files(source, name, folder, stem)
    try:
        shards = sorted(set(json.loads(shard_index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{source}: {name}/{shard_index.name} can't be read ({error}); try to download it again"
        ) from error
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise UserError(
            f"{source}: {len(absent)} of the {len(shards)} shards that {name}/{shard_index.name} names are missing "
            f"({list_names(absent)}); try to download them again"
        )
    return [folder / shard for shard in shards]


def _refuse_files(source: str, name: str, folder: Path, stem: str) -> None:
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    # model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
    pattern = re.compile(rf"{stem}\.(\w+)(-\d+-of-\d+)?\.safetensors")
    variants = sorted({match[1] for file in there if (match := pattern.fullmatch(file))})
    if variants:
        raise UserError(
            f"{source}: expected default weights of its {name}, got variants ({', '.join(variants)}); try --set "
            f"variant={variants[0]}"
        )
    files = [file for file in there if file.endswith((".bin", ".safetensors", ".ckpt", ".pt", ".pth", ".msgpack"))]
    if any(re.fullmatch(rf"{stem}-\d+-of-\d+\.safetensors", file) for file in files):
        raise UserError(f"{source}: {name} has shards and no {stem}.safetensors.index.json; try to download it again")
    raise UserError(
        f"{source}: expected {stem}.safetensors in {name}, got {list_names(files) or 'no weights'}; pickled weights "
        "are not opened; try to save the pipeline again with save_pretrained(folder, safe_serialization=True)"
    )


def _check_header(source: str, name: str, file: Path) -> set[str]:
    """Return the dtypes of a file's tensors.

    Raises:
        UserError: if the file can't be read, or has adapters or quantized weights.
    """
    try:
        with safe_open(file, "pt") as content:
            types = {key: str(content.get_slice(key).get_dtype()) for key in content.keys()}  # noqa: SIM118 not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{source}: {name}/{file.name} can't be read ({error}); try to download it again") from error
    if adapters := [key for key in types if _ADAPTERS.search(key)]:
        raise UserError(
            f"{source}: expected fused weights, got adapters in {name}/{file.name} ({list_names(adapters)}), which "
            "stock diffusers ignores; try pipeline.fuse_lora() and pipeline.unload_lora_weights(), and save it again"
        )
    integers = [key for key, kind in types.items() if key.endswith("weight") and kind in _INTEGERS]
    if scales := [key for key in types if _SCALES.search(key)] + integers:
        _refuse_quantized(source, name, list_names(scales))
    return set(types.values())


def list_names(names: Iterable[str]) -> str:
    """Return the first names as text, and the number of the others."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
