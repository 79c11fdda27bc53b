"""The JSON of a stage, complete after every row; the next call on the same code resumes it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Record", "read", "write_atomically"]

# Results of other code, of another device or of another torch are not resumed.
IDENTITY = ("stage", "sources", "device", "torch", "tiny")


def write_atomically(path: Path, text: str) -> None:
    """Write a file that exists completely or not at all, even if the process is killed."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Return the JSON of a file; empty without the file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


class Record:
    """Rows of a stage, written after each.

    Args:
        about: machine, code and options. A file with the same ones is resumed, another one is renamed.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        known = read(path)
        self.found: dict[str, Any] = known or {"about": about, "rows": {}}
        if any(self.found["about"].get(name) != about.get(name) for name in IDENTITY):
            self.restart()
        self.found["about"] = about
        self.write()

    def restart(self) -> None:
        """Start without rows; existing rows stay in a renamed file."""
        if self.found["rows"]:
            self.path.replace(self.path.with_suffix(".previous.json"))
        self.found = {"about": self.found["about"], "rows": {}}

    def has(self, name: str) -> bool:
        """Return whether a row is measured. A row that was skipped, cut or failed is tried again."""
        return self.found["rows"].get(name, {}).get("status") == "measured"

    def seconds_of(self, kind: str) -> list[float]:
        """Return how long the measured rows of a kind took."""
        rows = self.found["rows"].values()
        return [row["seconds"] for row in rows if row["status"] == "measured" and row.get("kind") == kind]

    def add(self, name: str, status: str, **values: Any) -> None:
        """Write a row.

        Args:
            status: measured, skipped, failed or cut.
        """
        self.found["rows"][name] = {"status": status} | values
        self.write()

    def set(self, **values: Any) -> None:
        """Write further entries next to the rows."""
        self.found |= values
        self.write()

    def write(self) -> None:
        """Write the JSON."""
        write_atomically(self.path, json.dumps(self.found, indent=1) + "\n")
