"""The index of a pipeline: its class, its components and their configurations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from fmm_distill.teachers.hub.download import Snapshot
    from fmm_distill.teachers.ip_adapter import IpAdapter

__all__ = ["PipelineIndex"]


@dataclass
class PipelineIndex:
    """The index of a pipeline, ``model_index.json``, before any weight is loaded.

    Attributes:
        source: the id or folder that the user gave.
        folder: on this disk.
        revision: the commit, if it is on the Hub.
        license: ``license``, ``license_name`` and ``license_link`` of the model card, those that it has.
        pipeline: the name of the pipeline class by which it is opened.
        components: name to (library, class) of every component that is not empty.
        snapshot: the commit on the Hub, of which only the index may be on this disk; None: a local folder.
        ip_adapter: the IP-Adapter whose files are in the folder; None: there is none.
        task: the class that the repository names, if it is opened by the base of that; see ``tasks``.
        task_settings: settings of that class which its base does not have.
        call: keywords of the base's call in place of these settings.
    """

    source: str
    folder: Path
    revision: str | None = None
    license: dict[str, Any] = field(default_factory=dict)
    pipeline: str = ""
    components: dict[str, tuple[str, str]] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    ip_adapter: IpAdapter | None = None
    task: str | None = None
    task_settings: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def component_folder(self, name: str) -> Path:
        """Return the folder of a component's files: its own, or the root in the oldest repositories."""
        own = self.folder / name
        return own if own.is_dir() else self.folder

    def config(self, name: str) -> dict[str, Any]:
        """Return the configuration of a component that is not opened yet; empty if it has none.

        Raises:
            UserError: if it is not a dictionary in JSON.
        """
        file = self.component_folder(name) / "config.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.source}: {name}/config.json can't be read ({error}); try to download it again"
            ) from error
        if not isinstance(values, dict):
            raise UserError(
                f"{self.source}: {name}/config.json: expected a dictionary, got {type(values).__name__}; try to "
                "download it again"
            )
        return values
