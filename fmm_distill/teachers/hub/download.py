"""A pipeline of the Hub in the cache: its index first, its weights when it is known that they can be used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import diffusers
from huggingface_hub import _CACHED_NO_EXIST, HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)

from fmm_distill.errors import UserError
from fmm_distill.teachers.hub.errors import HUB_ERRORS, hub_reason, is_unreachable

__all__ = ["Snapshot", "find_on_hub"]

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
_VARIANT = re.compile(r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository.

    Attributes:
        cached: the Hub is not asked.
    """

    source: str
    commit: str
    cached: bool

    @property
    def folder(self) -> Path:
        """Where its files are, or will be."""
        return Path(
            hf_hub_download(self.source, "model_index.json", revision=self.commit, local_files_only=True)
        ).parent

    def fetch_config(self, component: str) -> None:
        """Get a component's configuration into the cache.

        Raises:
            UserError: if it can't be had.
        """
        try:
            name = f"{component}/config.json"
            hf_hub_download(self.source, name, revision=self.commit, local_files_only=self.cached)
        except (*HUB_ERRORS, ValueError) as error:
            raise UserError(f"{self.source}: {component}/config.json: {hub_reason(error)}") from error

    def fetch(self, variant: str | None) -> Path:
        """All that stock diffusers takes of it, in the cache and checked; whole files that came before stay.

        Raises:
            UserError: if it can't be had, or if what came is not what the Hub has.
        """
        try:
            try:
                folder = self._download(variant, cached=self.cached)
            except HUB_ERRORS as error:
                if self.cached or not is_unreachable(error):
                    raise
                # A commit that is in the cache needs no Hub.
                folder = self._download(variant, cached=True)
            self._fetch_card()
        except (*HUB_ERRORS, ValueError, RuntimeError) as error:
            raise UserError(f"{self.source}: {_why_not(error)}") from error
        _check_digests(self.source, folder)
        return folder

    def _download(self, variant: str | None, *, cached: bool) -> Path:
        return Path(
            diffusers.DiffusionPipeline.download(
                self.source, revision=self.commit, variant=variant, use_safetensors=True, local_files_only=cached
            )
        )

    def _fetch_card(self) -> None:
        """The license stands in the card, which stock diffusers leaves; a model may have none."""
        try:
            hf_hub_download(self.source, "README.md", revision=self.commit, local_files_only=self.cached)
        except RemoteEntryNotFoundError:
            return
        except EntryNotFoundError as error:
            if try_to_load_from_cache(self.source, "README.md", revision=self.commit) is _CACHED_NO_EXIST:
                return
            logger.warning(f"{self.source}: its card, with its license, is not to be had ({hub_reason(error)})")


def find_on_hub(source: str, revision: str | None) -> Snapshot:
    """The commit that a name and a revision stand for; its ``model_index.json`` is in the cache then.

    Without the network, or with ``HF_HUB_OFFLINE=1``, the one in the cache.

    Raises:
        UserError: if there is none.
    """
    if revision is not None and _COMMIT.fullmatch(revision) and _index(source, revision, cached=True) is not None:
        return Snapshot(source, revision, cached=constants.HF_HUB_OFFLINE)
    cached = False
    try:
        # The client's own way to a file takes what is in the cache, whatever the Hub says.
        HfApi().model_info(source, revision=revision)
    except HFValidationError as error:
        raise UserError(f"{source}: neither a folder nor a Hub id; wanted owner/name or an existing path") from error
    except HUB_ERRORS as error:
        cached = is_unreachable(error) and _index(source, revision, cached=True) is not None
        if not cached:
            at = "" if revision is None else f" at {revision}"
            raise UserError(f"{source}{at}: no such folder here, and of the Hub: {hub_reason(error)}") from error
        logger.warning(f"{source}: {hub_reason(error)}; what is in the cache is taken")
    # By its name, not by its commit: so the cache keeps which commit the name stood for.
    folder = _index(source, revision, cached=cached)
    if folder is None:
        raise UserError(f"{source}: no model_index.json in it; wanted a whole diffusers pipeline (save_pretrained)")
    return Snapshot(source, folder.name, cached)


def _index(source: str, revision: str | None, *, cached: bool) -> Path | None:
    """The folder of the snapshot's index; None: it has none."""
    try:
        return Path(hf_hub_download(source, "model_index.json", revision=revision, local_files_only=cached)).parent
    except LocalEntryNotFoundError as error:
        if cached:
            return None
        raise UserError(f"{source}: {hub_reason(error)}") from error
    except EntryNotFoundError:
        return None
    except HUB_ERRORS as error:
        raise UserError(f"{source}: {hub_reason(error)}") from error


def _why_not(error: Exception) -> str:
    """Stock diffusers says in a ValueError or an EnvironmentError of its own that it will not take a repository."""
    text = str(error)
    if "Could not find the necessary `safetensors`" in text:
        if named := sorted(set(_VARIANT.findall(text))):
            return f"its weights come as variants alone ({', '.join(named)}): take --set variant={named[0]}"
        return (
            "it has weights without a .safetensors file; pickled weights are not opened: save the pipeline again with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    return hub_reason(error)


def _check_digests(source: str, folder: Path) -> None:
    """Compare what was fetched with the digests that the cache names it by: the client looks at sizes alone.

    What was compared before is not read again.
    """
    seen_in = Path(constants.HF_HOME) / "fmm_distill" / "fetched" / f"{folder.name}.json"
    seen = set(json.loads(seen_in.read_text(encoding="utf-8"))) if seen_in.is_file() else set()
    # The link's own target is named by the digest; behind it there may be a store that all repositories share.
    links = {path: path.parent / path.readlink() for path in folder.rglob("*") if path.is_symlink()}
    new = {path: blob for path, blob in links.items() if _DIGEST.fullmatch(blob.name) and blob.name not in seen}
    for path, blob in new.items():
        if _digest(blob) == blob.name:
            continue
        content = path.resolve()
        for wrong in (path, blob, content):
            wrong.unlink(missing_ok=True)
        raise UserError(
            f"{source}: {path.relative_to(folder)} came with other bytes than the Hub has; it was removed from the "
            "cache: run the same command again"
        )
    if not new:
        return
    # Several processes may be here at once.
    partial = seen_in.with_suffix(f".{os.getpid()}")
    try:
        seen_in.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(sorted(seen | {blob.name for blob in new.values()})), encoding="utf-8")
        partial.replace(seen_in)
    except OSError as error:
        raise UserError(f"{seen_in} could not be written ({error}); set HF_HOME to a folder with room") from error


def _digest(blob: Path) -> str:
    """Of a file as its name in the cache has it: SHA-1 as git takes it of a small one, SHA-256 of a large one."""
    if len(blob.name) == 40:
        content = blob.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    with blob.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
