"""The sections of a model card on the adapters of a student, and on pipelines whose jumps are not equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fmm_distill.io.reading import read_mapping

if TYPE_CHECKING:
    from pathlib import Path

    from fmm_distill.export.manifest import StudentManifest

__all__ = ["HERE", "Location", "adapters", "unequal_jumps"]

HERE = "<this folder>"
_EMBEDDED = """`lora/` holds the trained adapters, as `load_lora_weights` reads them, and the embedding of the jump's
length, for which stock diffusers has no input. The pipelines here have both merged into their weights."""


@dataclass(frozen=True)
class Location:
    """A repository of the Hub with a branch, or the folder of the card."""

    repo: str | None
    branch: str | None

    @property
    def revision(self) -> str:
        """The argument of the branch, for a call."""
        return "" if self.repo is None or self.branch is None else f', revision="{self.branch}"'


def _report(folder: Path) -> dict[str, Any]:
    file = folder / "verification.json"
    return read_mapping(file, todo="export the student again") if file.is_file() else {}


def unequal_jumps(folder: Path) -> list[str]:
    """Return the list of the pipelines of fixed numbers of steps whose jumps are not equal; empty: there are none."""
    pipelines = _report(folder).get("pipelines", {})
    found = {key.removeprefix("folded-"): one for key, one in pipelines.items() if "samples_difference" in one}
    if not found:
        return []
    lines = [
        f"- `steps-{n}/`: strength {one['strength']:.4g}; its samples differ from those of the any-step pipeline by "
        f"{one['samples_difference']:.2%}"
        for n, one in found.items()
    ]
    return ["\n".join(["The jumps of these pipelines are not equal, and they have one strength for all:", "", *lines])]


def adapters(folder: Path, manifest: StudentManifest, location: Location) -> list[str]:
    """Return the section on ``lora/``; empty: there are no adapters."""
    if not manifest.lora:
        return []
    if manifest.kind != "scaled":
        return [_EMBEDDED]
    parts = ["## LoRA", *_extracted(folder)]
    if manifest.lora_code is None:
        parts.append(
            f"`lora/` holds the change of the weights, and no stock pipeline takes it: {manifest.no_lora_code}. The "
            "pipelines above have it in their weights."
        )
        return parts
    revision = f', revision="{manifest.revision}"' if manifest.revision else ""
    code = manifest.lora_code.replace("{teacher}", f'"{manifest.teacher}"{revision}')
    code = code.replace("{student}", f'"{location.repo or HERE}"').replace("{revision}", location.revision)
    parts.append("The change of the weights as an adapter of the teacher's pipeline, whose strength is 1 / steps:")
    if any(abs(strength * int(n) - 1) > _ROUNDING for n, strength in manifest.strengths.items()):
        parts[-1] = "The change of the weights as an adapter of the teacher's pipeline:"
    parts.append(f"```python\n{code}\n```")
    if "lora/guidance.safetensors" in code:
        parts.append(
            "`guidance` is a change that every step has at the strength 1. `lora/steps-N.safetensors` has both for N "
            "steps, at the strength 1."
        )
    return parts


# Of the float32 levels of a scheduler.
_ROUNDING = 1e-4


def _extracted(folder: Path) -> list[str]:
    """Return a paragraph on what adapters lose that were extracted from a student of full rank."""
    found = _report(folder).get("lora")
    if found is None:
        return []
    weights = ", ".join(f"{value:.1%} of `{name}`" for name, value in found["weights"].items())
    samples = ", ".join(f"{value:.2%} at {n} steps" for n, value in found["samples"].items())
    return [
        f"The adapters have rank {found['rank']} and were extracted from changes of full rank. They lose {weights} "
        f"(Frobenius norm) and all changes of biases. Their samples differ from the student's by {samples}."
    ]
