"""The IP-Adapter of an export in its model card: the lines of Python that load it, and where it is from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fmm_distill.teachers.ip_adapter import FOLDER, IpAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fmm_distill.teachers.base import Teacher

__all__ = ["adapter_facts", "adapter_lines", "describe_adapter", "ip_adapter_of", "own_adapter"]


def ip_adapter_of(teacher: Teacher) -> IpAdapter | None:
    """Return the IP-Adapter of a teacher; None: it has none."""
    return None if teacher.pipeline is None else teacher.pipeline.ip_adapter


def adapter_facts(teacher: Teacher) -> dict[str, Any] | None:
    """Return the facts on a teacher's adapter for the manifest; None: it has none."""
    adapter = ip_adapter_of(teacher)
    names = ("source", "revision", "license", "weight_name", "scale")
    return None if adapter is None else {name: getattr(adapter, name) for name in names}


def own_adapter(folder: str, facts: Mapping[str, Any]) -> IpAdapter:
    """Return the adapter that an export has a copy of.

    Args:
        facts: those of its manifest.
    """
    # By the slash, the image encoder is next to the folder of the adapter.
    return IpAdapter(
        folder, facts["weight_name"], FOLDER, "./image_encoder", scale=facts["scale"], license=facts["license"]
    )


def adapter_lines(facts: Mapping[str, Any] | None, place: str, more: str = "") -> list[str]:
    """Return the lines that load an adapter into the pipeline of an export; none without an adapter.

    Args:
        place: an expression for the folder or repository that has the weights.
        more: further arguments, each with a comma before it.
    """
    if facts is None:
        return []
    given = f'{place}, subfolder="{FOLDER}", weight_name="{facts["weight_name"]}"{more}'
    return [f"pipeline.load_ip_adapter({given})", f"pipeline.set_ip_adapter_scale({facts['scale']:g})"]


def describe_adapter(facts: Mapping[str, Any] | None) -> list[str]:
    """Return the paragraph on the origin and the license of the copied files; none without an adapter."""
    if facts is None:
        return []
    revision = f" (revision {facts['revision']})" if facts["revision"] else ""
    license = f"license: {facts['license']}" if facts["license"] else "whose license is not stated"
    return [
        f"The IP-Adapter, {facts['weight_name']} in `{FOLDER}/`, and its image encoder are copies from "
        f"{facts['source']}{revision}, {license}. They were not trained. The student was trained with the adapter at "
        f"the scale {facts['scale']:g}: load it, as above, before a call with an image."
    ]
