"""The license in a model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard

from fmm_distill.errors import UserError, named

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["license_of"]


def license_of(folder: Path) -> dict[str, Any]:
    """Return the license entries of a folder's model card; empty if it has none."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        # Errors in other entries of the metadata do not concern the license.
        metadata = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{card}: the model card's metadata can't be read ({named(error)}); try to repair it"
        ) from error
    return {key: metadata[key] for key in ("license", "license_name", "license_link") if metadata.get(key)}
