"""The Hub's routes that huggingface_hub and diffusers call for models, with LFS and without Xet."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs

from tests.hub.state import Account, Commit, File, Hub, Refusal, Reply, Repo, is_lfs


@dataclass(frozen=True)
class Call:
    """What a route gets: the groups of its pattern, unquoted, beside the request."""

    hub: Hub
    address: str
    groups: Mapping[str, str]
    query: Mapping[str, Sequence[str]]
    headers: Mapping[str, str]
    body: bytes
    account: Account | None

    @property
    def repo_id(self) -> str:
        return self.groups["repo"]

    @property
    def revision(self) -> str:
        return self.groups["revision"]

    def json(self) -> Any:
        return json.loads(self.body)

    def may_read(self, repo: Repo) -> bool:
        name = self.account.name if self.account else None
        return name is not None and (name == self.repo_id.split("/")[0] or name in repo.readers)

    def readable(self) -> Repo:
        """The repository. A private one is not told from a missing one; without a token both are 401."""
        repo = self.hub.repos.get(self.repo_id)
        if repo is None or (repo.private and not self.may_read(repo)):
            raise Refusal(404 if self.account else 401, "RepoNotFound", "Repository not found")
        return repo

    def downloadable(self) -> Repo:
        """The repository, where its files may be taken: of a gated one everybody sees the list only."""
        repo = self.readable()
        if repo.gated and not self.may_read(repo):
            status = 403 if self.account else 401
            raise Refusal(status, "GatedRepo", f"Access to model {self.repo_id} is restricted")
        return repo

    def writable(self) -> Repo:
        repo = self.readable()
        self.require_write(self.repo_id.split("/")[0])
        return repo

    def require_write(self, namespace: str) -> None:
        if self.account is None:
            raise Refusal(401, None, "Invalid username or password.")
        if self.account.role != "write":
            raise Refusal(403, None, "Forbidden: pass a token with the write role")
        if self.account.name != namespace:
            raise Refusal(403, None, f"You don't have the rights to write under the namespace {namespace!r}")


def whoami(call: Call) -> Reply:
    if call.account is None:
        raise Refusal(401, None, "Invalid username or password.")
    token = {"displayName": "token", "role": call.account.role}
    return Reply({"type": "user", "name": call.account.name, "orgs": [], "auth": {"accessToken": token}})


def named_repo(call: Call) -> str:
    """The repository in the body of a request to create or delete it, checked for the right to."""
    asked = call.json()
    if asked.get("type", "model") != "model":
        raise Refusal(501, None, "only models are spoken here")
    namespace = asked.get("organization") or (call.account.name if call.account else "")
    call.require_write(namespace)
    return f"{namespace}/{asked['name']}"


def create_repo(call: Call) -> Reply:
    repo_id, asked = named_repo(call), call.json()
    url = f"{call.address}/{repo_id}"
    if repo_id in call.hub.repos:
        raise Refusal(409, None, "You already created this model repo", url=url)
    call.hub.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
    return Reply({"url": url, "name": repo_id, "id": repo_id})


def delete_repo(call: Call) -> Reply:
    if call.hub.repos.pop(named_repo(call), None) is None:
        raise Refusal(404, "RepoNotFound", "Repository not found")
    return Reply({})


def auth_check(call: Call) -> Reply:
    call.writable() if "write" in call.groups else call.downloadable()
    return Reply({})


def file_entry(path: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
    return entry | ({"lfs": lfs_entry(file)} if file.lfs else {})


def lfs_entry(file: File) -> dict[str, Any]:
    return {"oid": file.sha256, "sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}


def entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """All files and folders of a commit."""
    folders = {str(parent) for path in commit.files for parent in PurePosixPath(path).parents} - {"."}
    found = {path: {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders}
    return dict(sorted((found | {path: file_entry(path, file) for path, file in commit.files.items()}).items()))


def model_info(call: Call) -> Reply:
    repo = call.readable()
    commit = repo.at(call.groups.get("revision", "main"))
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
    if "blobs" in call.query:
        for sibling in siblings:
            file = commit.files[sibling["rfilename"]]
            sibling |= {"size": len(file.content), "blobId": file.blob_id} | (
                {"lfs": lfs_entry(file)} if file.lfs else {}
            )
    about = {"id": call.repo_id, "modelId": call.repo_id, "author": call.repo_id.split("/")[0], "sha": commit.sha}
    return Reply(
        about | {"private": repo.private, "gated": repo.gated, "disabled": False, "tags": [], "siblings": siblings}
    )


def tree(call: Call) -> Reply:
    listed = entries(call.readable().at(call.revision))
    below = call.groups.get("path", "").strip("/")
    if below and listed.get(below, {}).get("type") != "directory":
        raise Refusal(404, "EntryNotFound", f"{below} does not exist on {call.revision!r}")
    inside = [entry for path, entry in listed.items() if not below or path.startswith(f"{below}/")]
    if call.query.get("recursive", ["false"])[0].lower() != "true":
        inside = [entry for entry in inside if "/" not in entry["path"].removeprefix(f"{below}/" if below else "")]
    return Reply(inside)


def paths_info(call: Call) -> Reply:
    listed = entries(call.readable().at(call.revision))
    return Reply([listed[path] for path in parse_qs(call.body.decode())["paths"] if path in listed])


def refs(call: Call) -> Reply:
    branches = call.readable().branches
    listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches.items()]
    return Reply({"branches": listed, "converts": [], "tags": [], "pullRequests": []})


def create_branch(call: Call) -> Reply:
    repo = call.writable()
    if call.revision in repo.branches:
        raise Refusal(409, None, f"Reference already exists: refs/heads/{call.revision}")
    repo.branches[call.revision] = repo.at(call.json().get("startingPoint", "main")).sha
    return Reply({})


def preupload(call: Call) -> Reply:
    """How each file is to come, and what is there already under its name: the client leaves out what is the same."""
    there = call.writable().at(call.revision).files
    answers = []
    for asked in call.json()["files"]:
        mode = "lfs" if is_lfs(asked["path"], asked["size"]) else "regular"
        answer = {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}
        known = there.get(asked["path"])
        answers.append(answer | ({"oid": known.etag} if known else {}))
    return Reply({"files": answers})


def lfs_batch(call: Call) -> Reply:
    """Where each object is to be put; none for those that are here."""
    call.writable()
    objects = []
    for asked in call.json()["objects"]:
        href = f"{call.address}/_lfs/{asked['oid']}"
        actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        objects.append(asked | ({} if asked["oid"] in call.hub.blobs else {"actions": actions}))
    return Reply({"transfer": "basic", "objects": objects})


def lfs_put(call: Call) -> Reply:
    """The store behind the Hub, which asks for no token."""
    if hashlib.sha256(call.body).hexdigest() != call.groups["oid"]:
        raise Refusal(400, None, "The content does not have the hash it was announced with")
    call.hub.blobs[call.groups["oid"]] = call.body
    return Reply(b"")


def lfs_verify(call: Call) -> Reply:
    blob, asked = call.hub.blobs.get(call.groups["oid"]), call.json()
    if blob is None or asked["oid"] != call.groups["oid"] or asked["size"] != len(blob):
        raise Refusal(404, None, "The object did not arrive")
    return Reply({})


def commit(call: Call) -> Reply:
    repo = call.writable()
    if call.revision not in repo.branches:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {call.revision}")
    header, *operations = [json.loads(line) for line in call.body.splitlines()]
    known = {"summary", "description", "parentCommit"}
    if call.query or header["key"] != "header" or not header["value"].keys() <= known:
        raise Refusal(501, None, "pull requests are not spoken here")
    if header["value"].get("parentCommit", repo.at(call.revision).sha) != repo.at(call.revision).sha:
        raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
    files = dict(repo.at(call.revision).files)
    for operation in operations:
        apply(files, operation["key"], operation["value"], call.hub.blobs)
    made = repo.commit(files, header["value"]["summary"], call.revision)
    return Reply(
        {"success": True, "commitOid": made.sha, "commitUrl": f"{call.address}/{call.repo_id}/commit/{made.sha}"}
    )


def apply(files: dict[str, File], key: str, value: Mapping[str, Any], blobs: Mapping[str, bytes]) -> None:
    """One line of a commit, done to the files."""
    path = value["path"]
    if key == "file":
        files[path] = File(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in blobs:
            raise Refusal(400, None, f"The LFS pointer of {path} points to a file that does not exist")
        files[path] = File(blobs[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        below = path.rstrip("/") + "/"
        gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(below))]
        if not gone:
            raise Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
        for name in gone:
            del files[name]
    else:
        raise Refusal(501, None, f"{key} is not spoken here")


def resolve(call: Call) -> Reply:
    """A file, or the part of it that Range asks for."""
    commit = call.downloadable().at(call.revision)
    file = commit.files.get(call.groups["path"])
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    if file is None:
        missing = Refusal(404, "EntryNotFound", "Entry not found").reply
        return Reply(missing.body, missing.status, {**missing.headers, **headers})
    content, size = file.content, len(file.content)
    headers |= {"ETag": f'"{file.etag}"'}
    if file.lfs:
        headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(size)}
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
    if span is None:
        return Reply(content, headers=headers)
    start, stop = int(span[1]), min(int(span[2] or size - 1), size - 1) + 1
    if start >= size:
        return Reply(b"", 416, headers | {"Content-Range": f"bytes */{size}"})
    return Reply(content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})


REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
MODEL = rf"/api/models/{REPO}"
REVISION = r"(?P<revision>[^/]+)"
OID = r"(?P<oid>[0-9a-f]{64})"

# Patterns stand for paths as they travel, where a slash inside a name is quoted.
ROUTES: list[tuple[str, str, Callable[[Call], Reply]]] = [
    # What the client wants to know about where it runs, before its first request.
    ("GET", "/api/agent-harnesses", lambda _: Reply({"standardEnvVars": [], "harnesses": {}})),
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("POST", "/api/validate-yaml", lambda _: Reply({"errors": [], "warnings": []})),
    ("GET", rf"{MODEL}/auth-check(?P<write>/write)?", auth_check),
    ("GET", rf"{MODEL}/revision/{REVISION}", model_info),
    ("GET", rf"{MODEL}/tree/{REVISION}(?P<path>/.*)?", tree),
    ("GET", rf"{MODEL}/refs", refs),
    ("GET", MODEL, model_info),
    ("POST", rf"{MODEL}/paths-info/{REVISION}", paths_info),
    ("POST", rf"{MODEL}/branch/{REVISION}", create_branch),
    ("POST", rf"{MODEL}/preupload/{REVISION}", preupload),
    ("POST", rf"{MODEL}/commit/{REVISION}", commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", rf"/_lfs/{OID}", lfs_put),
    ("POST", rf"/_lfs/{OID}/verify", lfs_verify),
    ("HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
    ("GET", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
]
