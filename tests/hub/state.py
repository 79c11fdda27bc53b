"""What the stand-in for the Hub knows: accounts, repositories with their commits, faults to come, requests seen."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".png", ".jpg", ".npz")
LFS_SIZE = 10 * 2**20
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class Reply:
    """An answer: JSON, or bytes as they are."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Refusal(Exception):  # noqa: N818 (an answer, not a failure)
    """An error answer; ``code`` and ``message`` travel in the headers from which the client makes its exceptions."""

    def __init__(self, status: int, code: str | None, message: str, **body: Any) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = Reply({"error": message} | body, status, headers)


def is_lfs(path: str, size: int) -> bool:
    return size > LFS_SIZE or (size > 0 and path.endswith(LFS_SUFFIXES))


class Account(NamedTuple):
    """Whom a token stands for. A user writes below the own name only."""

    name: str
    role: Literal["read", "write"]


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself keeps of an LFS file."""
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        """The name under which the client knows the content: for LFS files not what git calls it."""
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """A commit: all files after it."""

    sha: str
    parent: str | None
    message: str
    files: Mapping[str, File]


@dataclass
class Repo:
    """A model repository. ``readers`` may read it beside its owner where it is private or gated."""

    private: bool = False
    gated: Literal[False, "auto", "manual"] = False
    readers: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, File], message: str, branch: str = "main") -> Commit:
        """Put a commit with exactly these files on top of a branch."""
        parent = self.branches.get(branch)
        what = [parent, message, len(self.commits), sorted((path, file.etag) for path, file in files.items())]
        commit = Commit(hashlib.sha1(json.dumps(what).encode()).hexdigest(), parent, message, dict(files))
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    def at(self, revision: str) -> Commit:
        """The commit of a branch or a full commit hash."""
        commit = self.commits.get(self.branches.get(revision, revision))
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    @property
    def files(self) -> Mapping[str, File]:
        """The files of ``main``."""
        return self.at("main").files


@dataclass
class Fault:
    """Spoils the next ``times`` answers to ``method`` at paths in which ``path`` (a regular expression) is found.

    With ``status``, that answer comes in place of the route's. ``cut_after`` sends the headers and so many bytes of
    the body, or, of an upload (PUT), reads so many bytes and answers nothing; then the connection is closed, with
    ``reset`` by an RST. ``wrong_bytes`` sends a body of the right length with other content.
    """

    method: str
    path: str
    status: int | None = None
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=lambda: {"error": "injected"})
    cut_after: int | None = None
    reset: bool = False
    wrong_bytes: bool = False


@dataclass
class Request:
    """A request as it came. ``status`` is None while, or because, it got no answer."""

    method: str
    path: str
    range: str | None
    user: str | None = None
    status: int | None = None


@dataclass
class Hub:
    """Everything there is. ``accounts`` maps tokens to whom they stand for; ``blobs`` are what LFS received."""

    accounts: dict[str, Account] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def create(self, repo_id: str, files: Mapping[str, bytes] | None = None, **settings: Any) -> Repo:
        """A repository as the Hub makes it, with a first commit, and a second with ``files`` where there are any."""
        repo = self.repos[repo_id] = Repo(**settings)
        attributes = {".gitattributes": File(GITATTRIBUTES)}
        repo.commit(attributes, "initial commit")
        if files:
            repo.commit(
                attributes | {path: File(content, is_lfs(path, len(content))) for path, content in files.items()},
                "files",
            )
        return repo

    def asked(self, method: str, path: str) -> list[Request]:
        """The requests so far of a method at paths in which ``path`` is found."""
        with self.lock:
            return [each for each in self.requests if each.method == method and re.search(path, each.path)]

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that is due here; it is used up by this."""
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None
