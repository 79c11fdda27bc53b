"""Class names of older repositories, as stock diffusers opens them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
from diffusers.models.model_loading_utils import _CLASS_REMAPPING_DICT, _fetch_remapped_cls_from_config

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["current_classes"]


def current_classes(
    components: dict[str, tuple[str, str]], config_of: Callable[[str], dict[str, Any]]
) -> dict[str, tuple[str, str]]:
    """The components with the classes that stock diffusers opens them as.

    A repository keeps the names of the day of its publication: DiT and PixArt are ``Transformer2DModel`` there, which
    diffusers maps to their own classes by an entry of the configuration.

    Args:
        config_of: the configuration of a component.
    """
    found = dict(components)
    for name, (library, kind) in components.items():
        if library == "diffusers" and kind in _CLASS_REMAPPING_DICT:
            config = {"norm_type": None} | config_of(name)
            found[name] = (library, _fetch_remapped_cls_from_config(config, getattr(diffusers, kind)).__name__)
    return found
