"""SHA-256 digests of files, texts, JSON values and tensors, as hexadecimal text."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["sha256_of_file", "sha256_of_json", "sha256_of_tensors", "sha256_of_text"]


def sha256_of_file(path: Path) -> str:
    """Return the digest of a file's content, which is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_text(text: str) -> str:
    """Return the digest of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_json(value: Any) -> str:  # noqa: ANN401 any JSON
    """Return the digest of a value as ``json.dumps`` writes it; a mapping's digest depends on the order of its keys."""
    return sha256_of_text(json.dumps(value))


def sha256_of_tensors(tensors: Mapping[str, Tensor], prefix: str = "") -> str:
    """Return the digest of tensors with their names, types and shapes, in the order of the names.

    Args:
        prefix: other text that the digest depends on.
    """
    # Checkpoints are listed without torch.
    import torch

    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # NumPy has no bfloat16, hence the view as bytes.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
