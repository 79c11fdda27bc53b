"""The cache of this package: folders next to the Hub's cache, under ``$HF_HOME/fmm_distill``."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants

from fmm_distill.io.hashes import sha256_of_json

__all__ = ["cache_key", "cache_path"]


def cache_path(*parts: str) -> Path:
    """Return a path in the cache; nothing is created."""
    return Path(constants.HF_HOME, "fmm_distill", *parts)


def cache_key(content: object) -> str:
    """Return the name of an entry: a digest, in 32 letters, of everything that its content depends on.

    Args:
        content: a JSON value.
    """
    # Half of the digest: 128 bits make collisions as unlikely as needed, and keep paths short.
    return sha256_of_json(content)[:32]
