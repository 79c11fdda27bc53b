"""Features of the reference images, computed once and cached next to the Hub's cache, with a checksum."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fmm_distill.errors import UserError
from fmm_distill.io.files import writing

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.data.samples import Images
    from fmm_distill.evaluation.features import FeatureNetwork

__all__ = ["MIN_IMAGES", "Reference", "compute_reference"]

# Fewer samples have no covariance to speak of, nor the third neighbor of precision and recall.
MIN_IMAGES = 4

logger = logging.getLogger(__name__)

_FILE = "features.safetensors"


@dataclass(frozen=True)
class Reference:
    """Reference images with their features.

    Attributes:
        network: computes the features.
        features: of all images in their order, shape ``[images, d]``.
        digest: of the content of the images.
    """

    images: Images
    network: FeatureNetwork
    features: Float[Tensor, "images d"]
    digest: str

    def __len__(self) -> int:
        return len(self.features)


def compute_reference(images: Images, network: FeatureNetwork, batch: int, device: torch.device) -> Reference:
    """Return the reference of a set of images, from the cache if its features were computed before.

    Args:
        batch: images per network call.

    Raises:
        UserError: if there are too few images, or their features can't be written.
    """
    if len(images) < MIN_IMAGES:
        raise UserError(f"{images.source}: expected at least {MIN_IMAGES} reference images, got {len(images)}")
    digest = hashlib.sha256(images.fingerprint.encode()).hexdigest()
    key = hashlib.sha256(json.dumps([digest, len(images), network.digest]).encode()).hexdigest()
    folder = Path(constants.HF_HOME) / "fmm_distill" / f"reference-{key[:32]}"
    shape = (len(images), network.width)
    features = _read(folder, shape)
    if features is None:
        network.to(device)
        parts = [network(part.to(device)).features.float().cpu() for part in images.batches(batch)]
        features = torch.cat(parts)
        _write(folder, features, {"source": images.source, "images": digest, "features": network.description})
    return Reference(images, network, features, digest)


def _read(folder: Path, shape: tuple[int, int]) -> Tensor | None:
    """Return the cached features; None if there are none or they are damaged."""
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        with (folder / _FILE).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest["sha256"]:
                raise ValueError("its sha256 differs from the manifest's")
        features = load_file(folder / _FILE)["features"]
        if tuple(features.shape) != shape:
            raise ValueError(f"expected shape {shape}, got {tuple(features.shape)}")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        logger.warning(f"{folder} is damaged ({error}); its features are computed again")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return features


def _write(folder: Path, features: Tensor, manifest: dict[str, Any]) -> None:
    """Write features and manifest; the folder gets its name once both are on the disk."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            save_file({"features": features.contiguous()}, partial / _FILE)
            with (partial / _FILE).open("rb") as file:
                manifest |= {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            try:
                partial.rename(folder)
            except OSError:
                # Another process was first; its features are the same.
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
