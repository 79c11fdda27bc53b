"""What a network is told of many prompts: embedded in parts, once, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from fmm_distill.teachers.components import PipelineIndex

__all__ = ["EACH", "LENGTHS", "cache_file", "embed_all", "split_arguments"]

# Of a ragged argument's rows, and of what stands once for every sample.
LENGTHS = "lengths of"
EACH = " of each"
CHUNK = 64


def split_arguments(given: dict[str, Any], own: tuple[str, str], count: int, single: dict[str, Any]) -> Conditioning:
    """The arguments besides sample and time, parted into rows and what all samples share.

    Args:
        own: names of the sample and the time.

    A tensor is of rows if its length follows the number of samples: ``single`` is the same call with one.
    """
    inputs: dict[str, Tensor] = {}
    shared: dict[str, Any] = {}
    for name, value in given.items():
        if name in (*own, "return_dict"):
            continue
        one = single.get(name)
        if isinstance(value, dict):
            shared[name] = {}
            for key, item in value.items():
                if _is_rows(item, one[key] if one else None, count):
                    inputs[f"{name}.{key}"] = item
                else:
                    shared[name][key] = item
        elif _is_rows(value, one, count):
            inputs[name] = value
        elif isinstance(value, list) and len(value) == count and isinstance(one, list) and len(one) == 1:
            if all(isinstance(row, torch.Tensor) for row in value):
                inputs[name] = torch.nn.utils.rnn.pad_sequence(value, batch_first=True)
                inputs[f"{LENGTHS}.{name}"] = torch.tensor([len(row) for row in value])
            else:
                shared[name + EACH] = value[0]
        else:
            shared[name] = value
    return Conditioning(inputs, shared | {"return_dict": False})


def _is_rows(value: Any, one: Any, count: int) -> bool:  # noqa: ANN401 whatever a network takes
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != count:
        return False
    # A mask may come with several prompts only, where shorter ones are padded.
    return not isinstance(one, torch.Tensor) or len(one) == 1


def cache_file(found: PipelineIndex, prompts: Sequence[str], call: dict[str, str]) -> Path:
    """Where the embeddings of these prompts are kept: beside the Hub's cache, under a digest of all they depend on."""
    folders = [
        found.folder / name for name in found.components if name.startswith(("text_", "tokenizer", "projection"))
    ]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    marks = [(str(path.relative_to(found.folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    about = [str(found.folder.resolve()), found.revision, found.pipeline, marks, list(prompts), call]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return Path(constants.HF_HOME) / "fmm_distill" / f"{digest[:32]}.safetensors"


def embed_all(embed: Callable[[Sequence[str]], Conditioning], prompts: tuple[str, ...], place: Path) -> Conditioning:
    """Rows for every prompt, from ``place`` where they were embedded before; read from disk as they are needed.

    Args:
        embed: embeds two prompts or more in one call.

    Raises:
        UserError: if the pipeline gives the parts of the prompts embeddings of different shapes.
    """
    if not place.is_file():
        longest, rows = _embed_in_parts(embed, prompts)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.{os.getpid()}")
        save_file(rows, partial, metadata={"longest": longest})
        partial.replace(place)
    with safe_open(place, "pt") as file:
        longest = file.metadata()["longest"]
    # What all samples share is no tensor of rows and is looked up again; it may depend on the longest prompt.
    few = prompts if 1 < len(prompts) <= CHUNK else (prompts[0], longest)
    return Conditioning(load_file(place), embed(few).shared)


def _embed_in_parts(
    embed: Callable[[Sequence[str]], Conditioning], prompts: tuple[str, ...]
) -> tuple[str, dict[str, Tensor]]:
    """The prompt that sets the length, and the rows of all. A pipeline may pad to the longest of a call."""
    parts = [prompts[i : i + CHUNK] for i in range(0, len(prompts), CHUNK)]
    # One prompt is embedded twice: rows are told from what is shared by how many there are.
    told = [embed(part if len(part) > 1 else part * 2).inputs for part in parts]
    sizes = [sum(rows[0].numel() for rows in inputs.values()) for inputs in told]
    longest = prompts[0]
    if len(set(sizes)) > 1:
        among = parts[sizes.index(max(sizes))]
        alone = [sum(rows[0].numel() for rows in embed((prompt, prompt)).inputs.values()) for prompt in among]
        longest = among[alone.index(max(alone))]
        told = [embed((*part, longest)).inputs for part in parts]
    names, shapes = told[0].keys(), {name: rows.shape[1:] for name, rows in told[0].items()}
    for inputs in told:
        if inputs.keys() != names or any(rows.shape[1:] != shapes[name] for name, rows in inputs.items()):
            raise UserError("prompts: the pipeline embeds them to different shapes; give at most 64, or of one length")
    counted = list(zip(told, parts, strict=True))
    return longest, {name: torch.cat([inputs[name][: len(part)] for inputs, part in counted]) for name in names}
