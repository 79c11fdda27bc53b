"""The files of an IP-Adapter: in a folder, or in the Hub's cache at one commit."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from fmm_distill.errors import UserError
from fmm_distill.teachers.hub.download import check_digests
from fmm_distill.teachers.hub.errors import HUB_ERRORS, hub_reason, is_unreachable
from fmm_distill.teachers.hub.model_card import license_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from fmm_distill.teachers.ip_adapter import IpAdapter

__all__ = ["AdapterFiles", "find_adapter_files"]

logger = logging.getLogger(__name__)

# Of the files in a message the first ones.
_SHOWN = 8


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter on this disk.

    Attributes:
        weights: the file of its weights.
        encoder: the folder of its image encoder; None: the pipeline has one.
        commit: on the Hub; None: it is a local folder.
        license: of its model card; None: not stated.
    """

    weights: Path
    encoder: Path | None
    commit: str | None
    license: str | None

    def marks(self) -> list[Any]:
        """Return what changes with the files: names, sizes and times of change."""
        encoder = [] if self.encoder is None else sorted(self.encoder.iterdir())
        files = [self.weights, *(path for path in encoder if path.is_file())]
        return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def find_adapter_files(adapter: IpAdapter, *, needs_encoder: bool) -> AdapterFiles:
    """Find the files of an adapter, from the Hub if there is no such folder.

    Args:
        needs_encoder: the pipeline has no image encoder.

    Raises:
        UserError: if one is missing, pickled, or can't be downloaded.
    """
    if not adapter.weight_name.endswith(".safetensors"):
        raise UserError(
            f"ip_adapter.weight_name: expected a file in .safetensors, got {adapter.weight_name}; pickled weights are "
            "not opened"
        )
    weights = str(PurePosixPath(adapter.subfolder, adapter.weight_name))
    # The rule of stock diffusers.
    nested = "/" not in adapter.image_encoder_folder
    encoder = str(PurePosixPath(adapter.subfolder if nested else "", adapter.image_encoder_folder))
    folder, commit = _locate(adapter, weights, encoder if needs_encoder else None)
    if not (folder / weights).is_file():
        there = [path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")]
        raise UserError(_no_file(adapter, weights, there))
    parts = [path.name for path in sorted((folder / encoder).glob("*"))] if needs_encoder else []
    if needs_encoder and not ("config.json" in parts and any(name.endswith(".safetensors") for name in parts)):
        raise UserError(
            f"ip_adapter.image_encoder_folder: expected the image encoder of {adapter.source} in {encoder}, with "
            f"config.json and weights in .safetensors, got {', '.join(parts) or 'none'}; try another folder"
        )
    return AdapterFiles(folder / weights, folder / encoder if needs_encoder else None, commit, _license(folder))


def _no_file(adapter: IpAdapter, weights: str, there: Collection[str]) -> str:
    known = sorted(name for name in there if "image_encoder/" not in name)
    shown = ", ".join(known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
    return (
        f"ip_adapter.weight_name: no file {weights} in {adapter.source}; expected one of its files in .safetensors "
        f"({shown or 'there are none'}), with ip_adapter.subfolder for the folder"
    )


def _locate(adapter: IpAdapter, weights: str, encoder: str | None) -> tuple[Path, str | None]:
    """Return the folder of the files, and the commit on the Hub."""
    source, revision = adapter.source, adapter.revision
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError(f"ip_adapter.revision: expected none for the folder {source}, got {revision}; leave it out")
        return path, None
    if path.is_file():
        raise UserError(
            f"ip_adapter.source: expected a folder or a Hub id, got the file {source}; try "
            f"ip_adapter.source={path.parent} and ip_adapter.weight_name={path.name}"
        )
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"ip_adapter.source {source}: no such folder; expected a folder or a Hub id")
    patterns = [weights, "README.md", *([] if encoder is None else [f"{encoder}/*.json", f"{encoder}/*.safetensors*"])]
    folder = _fetch(adapter, weights, patterns)
    return folder, folder.name


def _fetch(adapter: IpAdapter, weights: str, patterns: list[str]) -> Path:
    """Return the folder of a commit in the Hub's cache, with the files of these names.

    Without network access, or with ``HF_HUB_OFFLINE=1``, it is the commit in the cache.
    """
    source, revision, unreachable = adapter.source, adapter.revision, None
    try:
        info = HfApi().model_info(source, revision=revision)
        names = [each.rfilename for each in info.siblings or ()]
        if weights not in names:
            raise UserError(_no_file(adapter, weights, [name for name in names if name.endswith(".safetensors")]))
        revision = info.sha
    except HFValidationError as error:
        raise UserError(f"ip_adapter.source {source}: neither a folder nor a Hub id; expected owner/name") from error
    except HUB_ERRORS as error:
        if not is_unreachable(error):
            raise UserError(f"ip_adapter.source {source}: {hub_reason(error)}") from error
        unreachable = hub_reason(error)
    try:
        cached = unreachable is not None
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=cached))
        if cached and not (folder / weights).is_file():
            raise LocalEntryNotFoundError(f"{weights} is not in the cache")
    except (*HUB_ERRORS, ValueError, RuntimeError) as error:
        raise UserError(
            f"ip_adapter.source {source}: no such folder here, and on the Hub: {hub_reason(error)}"
        ) from error
    if unreachable is not None:
        logger.warning(f"ip_adapter.source {source}: {unreachable}; the cache is used")
    check_digests(source, folder)
    return folder


def _license(folder: Path) -> str | None:
    found = license_of(folder)
    name = found.get("license_name") or found.get("license")
    return None if name is None else str(name)
