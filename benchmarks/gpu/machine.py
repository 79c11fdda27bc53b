"""The measured machine and code, and missing packages."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["ROOT", "about_code", "about_machine", "install", "missing", "sources"]

ROOT = Path(__file__).parents[2]
# Modules with another name than their distribution.
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "huggingface_hub": "huggingface-hub"}


def missing(modules: Iterable[str]) -> list[str]:
    """Return the distributions of modules that can't be imported."""
    return [DISTRIBUTIONS.get(name, name) for name in modules if importlib.util.find_spec(name) is None]


def install(wheels: Path, site: Path) -> list[str]:
    """Install missing distributions into ``site``, from a folder of wheels alone.

    Dependencies are not resolved: the folder has all packages, and pip would replace the machine's torch.
    """
    names = {file.name.split("-")[0] for file in wheels.glob("*.whl")}
    absent = sorted(name for name in names if not _is_installed(name))
    if absent:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--find-links", str(wheels), "--target", str(site)]
        subprocess.run([*command, *absent], check=True)
    return absent


def use(site: Path) -> None:
    """Add ``site`` to the import path of this process and its children, after the machine's own packages."""
    sys.path.append(str(site))
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(site)]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    importlib.invalidate_caches()


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def sources(patterns: Iterable[str]) -> dict[str, str]:
    """Return digests of the files that a stage measures, by their paths in the repository."""
    files = sorted({file for pattern in patterns for file in ROOT.glob(pattern) if "__pycache__" not in file.parts})
    return {
        file.relative_to(ROOT).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        for file in files
        if file.is_file()
    }


def git(*arguments: str) -> str | None:
    """Return the output of git in this checkout; None without git or a repository, as in a copy of the files."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.rstrip()


def about_code(patterns: Iterable[str], commit: str | None) -> dict[str, Any]:
    """Return the commit and the digests of the measured files.

    Args:
        commit: of a copy without this history; it replaces the commit of the history.
    """
    found = git("rev-parse", "HEAD")
    # A line's first two characters are the state of a file, the third is blank.
    changed = [line[3:] for line in (git("status", "--porcelain", "--untracked-files=no") or "").splitlines()]
    own = found if commit is None else None
    return {"commit": own or commit, "changed": changed if own else [], "sources": sources(patterns)}


def about_machine(device: str) -> dict[str, Any]:
    """Return device, versions and date."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} processor"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for distribution in ("diffusers", "accelerate"):
        versions[distribution] = importlib.metadata.version(distribution)
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"device": name, "device_bytes": memory, "cores": os.cpu_count(), "date": moment} | versions


def is_commit(text: str) -> bool:
    """Return whether a text is a commit's hash."""
    return re.fullmatch(r"[0-9a-f]{7,40}", text) is not None
