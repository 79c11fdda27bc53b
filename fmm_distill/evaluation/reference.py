"""The images that samples are compared with, as features: computed once, kept beside the Hub's cache, verified."""

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
    from fmm_distill.evaluation.features import Features

__all__ = ["Reference", "reference_of"]

logger = logging.getLogger(__name__)

_FILE = "features.safetensors"


@dataclass(frozen=True)
class Reference:
    """Features of all images of a set, in its order.

    Attributes:
        digest: of the images' content.
    """

    features: Float[Tensor, "count d"]
    digest: str

    def __len__(self) -> int:
        return len(self.features)


def reference_of(images: Images, features: Features, batch: int, device: torch.device) -> Reference:
    """The features of a set of images, from the disk if they were computed before.

    Raises:
        UserError: if there are fewer than four images, or the disk does not take their features.
    """
    if len(images) < 4:
        raise UserError(f"{images.source}: {len(images)} images to compare with; wanted at least 4")
    digest = hashlib.sha256(images.fingerprint.encode()).hexdigest()
    key = hashlib.sha256(json.dumps([digest, len(images), features.digest]).encode()).hexdigest()
    folder = Path(constants.HF_HOME) / "fmm_distill" / f"reference-{key[:32]}"
    shape = (len(images), features.count)
    kept = _read(folder, shape)
    if kept is None:
        features.to(device)
        seen = [features(part.to(device)).features.float().cpu() for part in images.batches(batch)]
        kept = torch.cat(seen)
        _write(folder, kept, {"source": images.source, "images": digest, "features": features.about})
    return Reference(kept, digest)


def _read(folder: Path, shape: tuple[int, int]) -> Tensor | None:
    """What was written, if it is there and whole."""
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        with (folder / _FILE).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest["sha256"]:
                raise ValueError("its sha256 is not the one that was written")
        kept = load_file(folder / _FILE)["features"]
        if tuple(kept.shape) != shape:
            raise ValueError(f"shape {tuple(kept.shape)}")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        logger.warning(f"{folder} is damaged ({error}); its features are computed again")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return kept


def _write(folder: Path, features: Tensor, about: dict[str, Any]) -> None:
    """The folder gets its name when all of it is on the disk."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            save_file({"features": features.contiguous()}, partial / _FILE)
            with (partial / _FILE).open("rb") as file:
                about |= {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            (partial / "manifest.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            try:
                partial.rename(folder)
            except OSError:
                # Another process was first; what it made is the same.
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
