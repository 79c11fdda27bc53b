"""Embeddings of many prompts: computed once, in parts, and stored on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.errors import UserError
from fmm_distill.io.cache import cache_key, cache_path
from fmm_distill.io.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from fmm_distill.teachers.index import PipelineIndex
    from fmm_distill.teachers.prompts import Prompts

__all__ = ["CHUNK", "IMAGES", "cache_file", "embed_all"]

# Prompts per call of the text encoders: the memory of their activations must not grow with the number of prompts.
CHUNK = 64
# Prompts with images per call: autoencoders need more memory than text encoders.
IMAGES = 4
# Components on which embeddings don't depend. A text encoder may have any name.
_NO_ENCODERS = ("unet", "transformer", "scheduler", "safety_checker", "watermarker", "guider")
# They encode images alone.
_AUTOENCODERS = ("vae", "vq", "movq")
# Changes where rows of the same prompts are stored otherwise: files of another number are not read.
_FORMAT = 3


def cache_file(index: PipelineIndex, prompts: Prompts, call: dict[str, str]) -> Path:
    """Return the file for the embeddings of these prompts, in a folder next to the Hub's cache.

    Its name is a digest of all that the embeddings depend on: the pipeline, the files of its encoders, the prompts and
    the keywords of the call.
    """
    others = _NO_ENCODERS if prompts.images else _NO_ENCODERS + _AUTOENCODERS
    folders = [index.folder / name for name in index.components if not name.startswith(others)]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    # Size and time of change instead of the content, which may be tens of gigabytes.
    marks = [(str(path.relative_to(index.folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    given = list(prompts.texts), prompts.digests()
    content = [_FORMAT, str(index.folder.resolve()), index.revision, index.pipeline, marks, *given, call]
    return cache_path(f"{cache_key(content)}.safetensors")


def embed_all(embed: Callable[[Prompts], Conditioning], prompts: Prompts, path: Path) -> Conditioning:
    """Return one row per prompt, from the file ``path`` if it exists; rows are read from disk when they are used.

    Args:
        embed: embeds two or more prompts in one call.

    Raises:
        UserError: if parts of the prompts have embeddings of different shapes.
    """
    if not path.is_file():
        longest, rows = _embed_in_parts(embed, prompts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, shared=True) as partial:
            save_file(rows, partial, metadata={"longest": str(longest)})
    with safe_open(path, "pt") as file:
        longest = int(file.metadata()["longest"])
    # Shared values are not tensors of rows, so that they are computed again. They may depend on the longest prompt.
    few = range(len(prompts)) if 1 < len(prompts) <= _chunk(prompts) else (0, longest)
    return Conditioning(load_file(path), embed(prompts.some(few)).shared)


def _chunk(prompts: Prompts) -> int:
    return IMAGES if prompts.images else CHUNK


def _embed_in_parts(embed: Callable[[Prompts], Conditioning], prompts: Prompts) -> tuple[int, dict[str, Tensor]]:
    """Return the number of the longest prompt and the rows of all: a pipeline may pad to the longest of a call."""

    def inputs_of(numbers: Sequence[int]) -> Mapping[str, Tensor]:
        return embed(prompts.some(numbers)).inputs

    numbers = range(len(prompts))
    parts = [numbers[i : i + _chunk(prompts)] for i in range(0, len(prompts), _chunk(prompts))]
    # A single prompt is embedded twice: rows differ from shared values only where there are several samples.
    embedded = [inputs_of(part if len(part) > 1 else [*part] * 2) for part in parts]
    sizes = [sum(rows[0].numel() for rows in inputs.values()) for inputs in embedded]
    longest = 0
    if len(set(sizes)) > 1:
        candidates = parts[sizes.index(max(sizes))]
        alone = [sum(rows[0].numel() for rows in inputs_of((i, i)).values()) for i in candidates]
        longest = candidates[alone.index(max(alone))]
        embedded = [inputs_of((*part, longest)) for part in parts]
    names, shapes = embedded[0].keys(), {name: rows.shape[1:] for name, rows in embedded[0].items()}
    for inputs in embedded:
        if inputs.keys() != names or any(rows.shape[1:] != shapes[name] for name, rows in inputs.items()):
            raise UserError(
                "prompts: expected embeddings of one shape, got several from this pipeline; try at most "
                f"{_chunk(prompts)} prompts, or prompts of one length"
            )
    counted = list(zip(embedded, parts, strict=True))
    rows = {name: torch.cat([inputs[name][: len(part)] for inputs, part in counted]) for name in names}
    return longest, {name: value.contiguous() for name, value in rows.items()}
