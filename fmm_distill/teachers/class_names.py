"""Current class names for the components of older repositories."""

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
    """Return the components with the classes that stock diffusers opens them with.

    A repository has the class names of its date of publication. DiT and PixArt were ``Transformer2DModel``, which
    diffusers maps to their present classes by the configuration.

    Args:
        components: name to (library, class).
        config_of: returns the configuration of a component.
    """
    current = dict(components)
    for name, (library, kind) in components.items():
        if library == "diffusers" and kind in _CLASS_REMAPPING_DICT:
            # diffusers reads the entry without a default.
            config = {"norm_type": None} | config_of(name)
            current[name] = (library, _fetch_remapped_cls_from_config(config, getattr(diffusers, kind)).__name__)
    return current
