"""Features of the reference images, computed once and cached next to the Hub's cache, with a checksum."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fmm_distill.errors import UserError
from fmm_distill.io.cache import cache_key, cache_path
from fmm_distill.io.files import atomic_folder, writing
from fmm_distill.io.hashes import sha256_of_file, sha256_of_text

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
    digest = sha256_of_text(images.fingerprint)
    folder = cache_path(f"reference-{cache_key([digest, len(images), network.digest])}")
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
        if sha256_of_file(folder / _FILE) != manifest["sha256"]:
            raise ValueError("its sha256 differs from the manifest's")
        features = load_file(folder / _FILE)["features"]
        if tuple(features.shape) != shape:
            raise ValueError(f"expected shape {shape}, got {tuple(features.shape)}")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        logger.warning(f"{folder} is damaged ({error}); its features are computed again")
        # Removed, because an atomic folder does not replace one that exists.
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return features


def _write(folder: Path, features: Tensor, manifest: dict[str, Any]) -> None:
    """Write features and manifest; the folder gets its name once both are on the disk."""
    with writing(folder), atomic_folder(folder) as partial:
        save_file({"features": features.contiguous()}, partial / _FILE)
        manifest |= {"sha256": sha256_of_file(partial / _FILE)}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
