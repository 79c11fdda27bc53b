"""The stock pipeline that a teacher's network belongs to."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import diffusers

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fmm_distill.teachers.ip_adapter import IpAdapter

__all__ = ["StockPipeline"]


@cache
def _code_of(name: str) -> str:
    # Cached: diffusers' modules are large, and an export reads it several times.
    return inspect.getsource(getattr(diffusers, name))


@dataclass(frozen=True)
class StockPipeline:
    """A pipeline of diffusers into copies of which students are exported, and the keywords of its call.

    Attributes:
        folder: the folder of the pipeline, as ``save_pretrained`` writes it.
        component: the name of the network in the pipeline.
        call: keywords of the call other than the condition, the guidance and the number of steps.
        condition: the keyword of the condition, ``prompt`` or ``class_labels``; None: the pipeline takes none.
        guidance: the keyword of the pipeline's own classifier-free guidance; None: it has none.
        first_guidance: the keyword of its scale at the first frame of a video, if ``guidance`` is that at the last.
        guidance_off: the value of that keyword that turns the guidance off.
        image_guidance: the keyword of the pipeline's second guidance, by its image; None: it has none.
        network_guidance: the ``guidance_scale`` that the network takes as an input; None: it has no such input.
        one_prompt: its call takes one prompt, no list.
        positions: of a sample's numbers among those of the scheduler's; see ``find_positions``.
        ip_adapter: the IP-Adapter whose files are in the folder; None: there is none.
        task: the class that the teacher's repository names, if this is the base of it; see ``tasks``.
        task_settings: settings of that class which this one does not have.
        second: the name of the network of low noise levels, where ``component`` is that of high ones; None: there is
            one network.
    """

    folder: Path
    component: str
    call: dict[str, Any] = field(default_factory=dict)
    condition: str | None = None
    guidance: str | None = None
    guidance_off: float = 1.0
    image_guidance: str | None = None
    first_guidance: str | None = None
    network_guidance: float | None = None
    one_prompt: bool = False
    positions: Tensor | None = None
    ip_adapter: IpAdapter | None = None
    task: str | None = None
    task_settings: dict[str, Any] = field(default_factory=dict)
    second: str | None = None

    @property
    def index(self) -> dict[str, Any]:
        """The contents of ``model_index.json``."""
        index: dict[str, Any] = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        return index

    @property
    def class_name(self) -> str:
        """The name of the pipeline's class in diffusers."""
        return str(self.index["_class_name"])

    @property
    def code(self) -> str:
        """The source of the pipeline's class in diffusers."""
        return _code_of(self.class_name)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the components other than the networks and the scheduler."""
        own = (self.component, self.second, "scheduler")
        return tuple(
            name
            for name, value in self.index.items()
            if not name.startswith("_") and isinstance(value, list) and name not in own
        )

    def guided(self, scale: float, image_scale: float = 1.0) -> dict[str, Any]:
        """Return the keywords of a call with the pipeline's own guidance at these scales; 1 turns it off."""
        given = {} if self.network_guidance is None else {"guidance_scale": self.network_guidance}
        given |= {} if self.image_guidance is None else {self.image_guidance: image_scale}
        # Where the keyword counts from 0, the network's guided output is c + scale (c - u).
        own = (self.guidance, self.first_guidance)
        return given | {name: self.guidance_off + (scale - 1) for name in own if name is not None}

    def unguided(self) -> dict[str, Any]:
        """Return the keywords of a call with the pipeline's own guidance turned off."""
        return self.guided(1.0)
