"""Download a pipeline from the Hub into the cache: its index first, its weights once an adapter is found."""

from __future__ import annotations

import hashlib
import json
import logging
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
from fmm_distill.io.cache import cache_path
from fmm_distill.io.files import atomic_file
from fmm_distill.io.hashes import sha256_of_file
from fmm_distill.teachers.hub.errors import HUB_ERRORS, hub_reason, is_unreachable

__all__ = ["Snapshot", "check_digests", "find_on_hub"]

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
_VARIANT = re.compile(r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository on the Hub.

    Attributes:
        source: the repository's id.
        cached: only the cache is used, not the Hub.
    """

    source: str
    commit: str
    cached: bool

    @property
    def folder(self) -> Path:
        """The folder of its files in the cache."""
        return Path(
            hf_hub_download(self.source, "model_index.json", revision=self.commit, local_files_only=True)
        ).parent

    def fetch_config(self, component: str) -> None:
        """Download the configuration of a component into the cache.

        Raises:
            UserError: if the download fails.
        """
        try:
            name = f"{component}/config.json"
            hf_hub_download(self.source, name, revision=self.commit, local_files_only=self.cached)
        except (*HUB_ERRORS, ValueError) as error:
            raise UserError(f"{self.source}: {component}/config.json: {hub_reason(error)}") from error

    def fetch(self, variant: str | None) -> Path:
        """Download the files that stock diffusers uses, check them and return their folder.

        Complete files in the cache are not downloaded again.

        Raises:
            UserError: if the download fails, or if the files differ from those on the Hub.
        """
        try:
            try:
                folder = self._download(variant, cached=self.cached)
            except HUB_ERRORS as error:
                if self.cached or not is_unreachable(error):
                    raise
                # The commit may be complete in the cache.
                folder = self._download(variant, cached=True)
            self._fetch_card()
        except (*HUB_ERRORS, ValueError, RuntimeError) as error:
            raise UserError(f"{self.source}: {_download_error(error)}") from error
        check_digests(self.source, folder)
        return folder

    def _download(self, variant: str | None, *, cached: bool) -> Path:
        return Path(
            diffusers.DiffusionPipeline.download(
                self.source, revision=self.commit, variant=variant, use_safetensors=True, local_files_only=cached
            )
        )

    def _fetch_card(self) -> None:
        """Download the model card, which has the license; stock diffusers does not download it."""
        try:
            hf_hub_download(self.source, "README.md", revision=self.commit, local_files_only=self.cached)
        except RemoteEntryNotFoundError:
            return
        except EntryNotFoundError as error:
            if try_to_load_from_cache(self.source, "README.md", revision=self.commit) is _CACHED_NO_EXIST:
                return
            logger.warning(
                f"{self.source}: its model card, with its license, can't be downloaded ({hub_reason(error)})"
            )


def find_on_hub(source: str, revision: str | None) -> Snapshot:
    """Return the commit of a repository and a revision, with its ``model_index.json`` in the cache.

    Without network access, or with ``HF_HUB_OFFLINE=1``, it is the commit in the cache.

    Raises:
        UserError: if there is no such repository or revision, or if it is not a pipeline.
    """
    # The content of a commit never changes: no request is needed if its index is in the cache.
    if revision is not None and _COMMIT.fullmatch(revision) and _index(source, revision, cached=True) is not None:
        return Snapshot(source, revision, cached=constants.HF_HUB_OFFLINE)
    cached = False
    try:
        # hf_hub_download alone would use the cache even if the Hub responds with an error.
        HfApi().model_info(source, revision=revision)
    except HFValidationError as error:
        raise UserError(f"{source}: neither a folder nor a Hub id; expected owner/name or an existing path") from error
    except HUB_ERRORS as error:
        cached = is_unreachable(error) and _index(source, revision, cached=True) is not None
        if not cached:
            at = "" if revision is None else f" at {revision}"
            raise UserError(f"{source}{at}: no such folder here, and on the Hub: {hub_reason(error)}") from error
        logger.warning(f"{source}: {hub_reason(error)}; the cache is used")
    # By its name, not by its commit: the cache then remembers the commit of the name.
    folder = _index(source, revision, cached=cached)
    if folder is None:
        raise UserError(
            f"{source}: no model_index.json in it; expected a complete diffusers pipeline (save_pretrained)"
        )
    return Snapshot(source, folder.name, cached)


def _index(source: str, revision: str | None, *, cached: bool) -> Path | None:
    """Return the folder of the snapshot's index; None: it has none."""
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


def _download_error(error: Exception) -> str:
    """Return the message on a failed download; stock diffusers has errors of its own for weights that it can't use."""
    text = str(error)
    if "Could not find the necessary `safetensors`" in text:
        if named := sorted(set(_VARIANT.findall(text))):
            return f"expected default weights, got variants ({', '.join(named)}); try --set variant={named[0]}"
        return (
            "expected weights in .safetensors, got pickled ones, which are not opened; try to save the pipeline again "
            "with save_pretrained(folder, safe_serialization=True)"
        )
    return hub_reason(error)


def check_digests(source: str, folder: Path) -> None:
    """Compare downloaded files with the digests in their names in the cache: the client compares sizes alone.

    A file that was compared before is not read again.

    Raises:
        UserError: if a file differs; it is removed from the cache.
    """
    seen_in = cache_path("fetched", f"{folder.name}.json")
    seen = set(json.loads(seen_in.read_text(encoding="utf-8"))) if seen_in.is_file() else set()
    # The direct target of a link has the digest as its name; it may itself be a link into a shared store.
    links = {path: path.parent / path.readlink() for path in folder.rglob("*") if path.is_symlink()}
    new = {path: blob for path, blob in links.items() if _DIGEST.fullmatch(blob.name) and blob.name not in seen}
    for path, blob in new.items():
        if _digest(blob) == blob.name:
            continue
        content = path.resolve()
        for wrong in (path, blob, content):
            wrong.unlink(missing_ok=True)
        raise UserError(
            f"{source}: {path.relative_to(folder)} differs from the file on the Hub; it was removed from the cache; "
            "run the same command again"
        )
    if not new:
        return
    try:
        seen_in.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(seen_in, shared=True) as partial:
            partial.write_text(json.dumps(sorted(seen | {blob.name for blob in new.values()})), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{seen_in} can't be written ({error}); try HF_HOME on a disk with free space") from error


def _digest(blob: Path) -> str:
    """Return a file's digest of the kind that its name is: git's SHA-1 of small files, SHA-256 of large ones."""
    if len(blob.name) == 40:
        content = blob.read_bytes()
        # The digest that git uses; it finds damage and is no protection.
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return sha256_of_file(blob)
