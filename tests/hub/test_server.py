"""The stand-in for the Hub against the real client: what it speaks, and what the client makes of its faults.

Functions without ``test_`` run in processes of their own, see ``tests.hub.client``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download

from tests.hub.client import attempt, run
from tests.hub.server import Account, Fault, Hub, environment, serve

ACCOUNTS = {
    "owner": Account("me", "write"),
    "reader": Account("me", "read"),
    "other": Account("somebody", "write"),
}
# The client writes a download to disk in pieces of this size; what is less when the connection ends is lost.
PIECE = 10 * 2**20


@pytest.fixture
def hub() -> Hub:
    return Hub(accounts=dict(ACCOUNTS))


@pytest.fixture
def address(hub: Hub) -> Iterator[str]:
    with serve(hub) as address:
        yield address


@pytest.fixture
def owner(address: str, tmp_path: Path) -> dict[str, str]:
    """The environment of the owner of everything below ``me``."""
    return environment(address, tmp_path / "home", "owner")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of both kinds, and such as try a path: 3 go through LFS."""
    files = {
        "README.md": b"---\nlicense: mit\n---\nA model.\n",
        "model_index.json": b"{}\n",
        "a name, with spaces & signs.txt": "é\r\n".encode(),
        "unet/config.json": b'{"a": 1}',
        "unet/model.safetensors": bytes(range(256)) * 1000,
        "vae/model.safetensors": b"\0" * 300_000,
        "samples/1.png": b"\x89PNG",
        "samples/empty.bin": b"",
    }
    for path, content in files.items():
        file = tmp_path / "folder" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "folder"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def push_twice(folder: str) -> dict[str, Any]:
    api = HfApi()
    return {
        "name": api.whoami()["name"],
        "created": api.create_repo("me/model", private=True),
        "refused": attempt(api.create_repo, "me/model"),
        "again": api.create_repo("me/model", private=True, exist_ok=True),
        "first": api.upload_folder(repo_id="me/model", folder_path=folder).oid,
        "second": api.upload_folder(repo_id="me/model", folder_path=folder).oid,
        "info": [api.model_info("me/model").private, api.model_info("me/model").gated],
        "sizes": {file.rfilename: file.size for file in api.model_info("me/model", files_metadata=True).siblings},
    }


def pull_twice() -> list[str]:
    return [snapshot_download("me/model"), snapshot_download("me/model"), hf_hub_download("me/model", "README.md")]


def test_what_went_up_comes_down(hub: Hub, address: str, owner: dict[str, str], folder: Path, tmp_path: Path):
    pushed = run(push_twice, owner, folder)
    assert pushed["name"] == "me"
    assert pushed["created"] == pushed["again"] == f"{address}/me/model"
    assert (pushed["refused"]["error"], pushed["refused"]["status"]) == ("HfHubHTTPError", 409)
    assert pushed["info"] == [True, False]

    repo = hub.repos["me/model"]
    sent = contents(folder)
    assert {path: file.content for path, file in repo.files.items() if path != ".gitattributes"} == sent
    assert {path for path, file in repo.files.items() if file.lfs} == {
        "unet/model.safetensors", "vae/model.safetensors", "samples/1.png",
    }  # fmt: skip
    assert {path: size for path, size in pushed["sizes"].items() if path != ".gitattributes"} == {
        path: len(content) for path, content in sent.items()
    }

    # The second time nothing is committed and no blob is sent.
    assert pushed["first"] == pushed["second"]
    assert len(repo.commits) == 2
    assert len(hub.asked("POST", "/commit/")) == 1
    assert len(hub.asked("PUT", "/_lfs/")) == 3

    hub.requests.clear()
    pulled = run(pull_twice, environment(address, tmp_path / "elsewhere", "owner"))
    came = contents(Path(pulled[0]))
    came.pop(".gitattributes")
    assert came == sent
    assert pulled[1] == pulled[0]
    # Each once, .gitattributes too, and the empty one not at all.
    assert len(hub.asked("GET", "/resolve/")) == len(sent)
    assert not [request for request in hub.requests if request.status == 501]


def edit() -> dict[str, Any]:
    api = HfApi()
    api.create_branch("me/model", branch="try/1")
    operations = [
        CommitOperationDelete("old.txt"),
        CommitOperationDelete("folder/"),
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationAdd("copy.bin", b"lfs"),
    ]
    made = api.create_commit("me/model", operations, commit_message="Edit", revision="try/1")
    missing = [CommitOperationDelete("nothing.txt")]
    return {
        "oid": made.oid,
        "sha": api.model_info("me/model", revision="try/1").sha,
        "main": api.list_repo_files("me/model"),
        "branch": api.list_repo_files("me/model", revision="try/1"),
        "refs": {branch.name: branch.target_commit for branch in api.list_repo_refs("me/model").branches},
        "top": sorted(entry.path for entry in api.list_repo_tree("me/model")),
        "below": [entry.path for entry in api.list_repo_tree("me/model", "folder")],
        "known": [file.path for file in api.get_paths_info("me/model", ["old.txt", "folder", "nothing.txt"])],
        "file": Path(hf_hub_download("me/model", "new.txt", revision="try/1")).read_text(),
        "branch again": attempt(api.create_branch, "me/model", branch="try/1"),
        "no such file": attempt(api.create_commit, "me/model", missing, commit_message="Delete"),
        "no such branch": attempt(api.create_commit, "me/model", missing, commit_message="Delete", revision="no"),
        "pull request": attempt(api.create_commit, "me/model", operations[:1], commit_message="Ask", create_pr=True),
        "deleted": [attempt(api.delete_repo, "me/gone")["error"] for _ in range(2)],
    }


def test_commits_and_branches(hub: Hub, owner: dict[str, str]):
    files = {"old.txt": b"old", "folder/a.txt": b"a", "folder/b.bin": b"b"}
    repo = hub.create("me/model", files)
    hub.create("me/gone")
    before = repo.branches["main"]
    edited = run(edit, owner)
    assert edited["refs"] == repo.branches == {"main": before, "try/1": edited["oid"]}
    assert edited["sha"] == edited["oid"]
    assert repo.commits[edited["oid"]].parent == before
    assert set(edited["main"]) == {".gitattributes", *files}
    assert set(edited["branch"]) == {".gitattributes", "copy.bin", "new.txt"}
    assert edited["top"] == [".gitattributes", "folder", "old.txt"]
    assert edited["below"] == ["folder/a.txt", "folder/b.bin"]
    assert edited["known"] == ["old.txt", "folder"]
    assert edited["file"] == "new"
    assert edited["branch again"]["status"] == 409
    assert edited["no such file"]["error"] == "RemoteEntryNotFoundError"
    assert edited["no such branch"]["error"] == "RevisionNotFoundError"
    assert edited["pull request"]["status"] == 501
    assert edited["deleted"] == [None, "RepositoryNotFoundError"]
    assert set(hub.repos) == {"me/model"}


def read_and_write(tokens: list[Any], caches: str) -> list[dict[str, Any]]:
    found = []
    for token in tokens:
        api = HfApi(token=token)
        # One for each: with a file there, a refusal ends in that file.
        cache = {"cache_dir": f"{caches}/{token}"}
        calls = {f"info {name}": (api.model_info, [f"me/{name}"]) for name in ("open", "secret", "gated", "none")}
        calls |= {
            f"file {name}": (api.hf_hub_download, [f"me/{name}", "a.txt"]) for name in ("open", "secret", "gated")
        }
        calls |= {"create": (api.create_repo, ["me/made"]), "branch": (api.create_branch, ["me/open"])}
        calls |= {"check": (api.auth_check, ["me/open"]), "upload": (api.upload_file, [])}
        options = {
            "file open": cache,
            "file secret": cache,
            "file gated": cache,
            "branch": {"branch": f"by {token}"},
            "check": {"write": True},
            "upload": {"path_or_fileobj": b"b", "path_in_repo": "b.txt", "repo_id": "me/open"},
        }
        ended = {name: attempt(call, *values, **options.get(name, {})) for name, (call, values) in calls.items()}
        found.append({name: [each["error"], each.get("status")] for name, each in ended.items()})
    return found


def test_who_may_do_what(hub: Hub, owner: dict[str, str], tmp_path: Path):
    for name, settings in {"open": {}, "secret": {"private": True}, "gated": {"gated": "manual"}}.items():
        hub.create(f"me/{name}", {"a.txt": b"a"}, **settings)
    tokens = [False, "unknown", "reader", "other", "owner"]
    nobody, unknown, reader, other, mine = run(read_and_write, owner, tokens, tmp_path)
    fine = [None, None]
    writes = ("create", "branch", "check", "upload")

    assert {name for name, ended in mine.items() if ended == fine} == set(mine) - {"info none"}
    assert mine["info none"] == other["info none"] == ["RepositoryNotFoundError", 404]

    assert nobody["info open"] == nobody["file open"] == nobody["info gated"] == fine
    assert nobody["info none"] == nobody["info secret"] == nobody["file secret"] == ["RepositoryNotFoundError", 401]
    assert nobody["file gated"] == ["GatedRepoError", 401]
    assert all(nobody[name] == ["HfHubHTTPError", 401] for name in writes)

    # A wrong token is worse than none.
    assert all(ended == ["HfHubHTTPError", 401] for ended in unknown.values())

    assert all(reader[name] == fine for name in ("info secret", "file secret", "file gated"))
    assert all(reader[name] == ["HfHubHTTPError", 403] for name in writes)

    assert other["info secret"] == other["file secret"] == ["RepositoryNotFoundError", 404]
    assert other["file gated"] == ["GatedRepoError", 403]
    assert all(other[name] == ["HfHubHTTPError", 403] for name in writes)


def push_against_faults(folder: str) -> dict[str, Any]:
    api = HfApi()

    def upload(name: str) -> dict[str, Any]:
        return attempt(api.upload_folder, repo_id=f"me/{name}", folder_path=folder)

    return {
        "whoami": attempt(api.whoami),
        "create": attempt(api.create_repo, "me/new", exist_ok=True),
        "card": upload("card"),
        "branch": attempt(api.create_branch, "me/bumpy", branch="b"),
        "bumpy": upload("bumpy"),
        "commit": upload("commit"),
        "down": upload("down"),
    }


def test_what_an_upload_retries(hub: Hub, owner: dict[str, str], folder: Path):
    for name in ("card", "bumpy", "commit", "down"):
        hub.create(f"me/{name}")
    later = {"Retry-After": "3"}
    vae = hashlib.sha256((folder / "vae/model.safetensors").read_bytes()).hexdigest()
    hub.faults += [
        Fault("GET", "/api/whoami-v2", 429, headers=later),
        Fault("POST", "/api/repos/create", 500),
        Fault("POST", "/api/validate-yaml", 429, headers=later),
        Fault("POST", "/branch/", 500),
        Fault("POST", "me/bumpy/preupload", 500, times=2),
        Fault("POST", "me/bumpy.git/info/lfs", 429, headers=later),
        Fault("PUT", f"/_lfs/{vae}", 500),
        Fault("POST", f"/_lfs/{vae}/verify", 503, headers=later),
        Fault("POST", "me/commit/commit/", 500),
        Fault("POST", "me/down/preupload", 503, times=6),
    ]
    ended = run(push_against_faults, owner, folder)
    once = {"whoami": 429, "create": 500, "card": 429, "branch": 500, "commit": 500}
    for name, status in once.items():
        assert [ended[name][key] for key in ("error", "status", "waits")] == ["HfHubHTTPError", status, []], name
    # Twice as long each time, or a second more than what it was told.
    assert ended["bumpy"] == {"error": None, "waits": [1, 2, 4, 1, 4]}
    assert ended["down"]["waits"] == [1, 2, 4, 8, 8]
    assert (ended["down"]["error"], ended["down"]["status"]) == ("HfHubHTTPError", 503)
    assert all(fault.times == 0 for fault in hub.faults)
    assert {name for name, repo in hub.repos.items() if len(repo.commits) > 1} == {"me/bumpy"}


def pull_against_faults() -> dict[str, Any]:
    return {name: attempt(snapshot_download, f"me/{name}") for name in ("bumpy", "file", "info", "down")}


def test_what_a_download_retries(hub: Hub, owner: dict[str, str]):
    for name in ("bumpy", "file", "info", "down"):
        hub.create(f"me/{name}", {"a.bin": b"a"})
    hub.faults += [
        Fault("GET", "me/bumpy/tree", 500),
        Fault("HEAD", "me/bumpy/resolve/.*/a.bin", 503),
        Fault("GET", "me/bumpy/resolve/.*/a.bin", 429, headers={"Retry-After": "3"}),
        Fault("GET", "me/file/resolve/.*/a.bin", 500),
        Fault("GET", "me/info/revision", 429, headers={"Retry-After": "3"}),
        Fault("HEAD", "me/down/resolve/.*/a.bin", 503, times=7),
    ]
    ended = run(pull_against_faults, owner)
    assert ended["bumpy"] == {"error": None, "waits": [1, 4]}
    assert [ended["file"][key] for key in ("error", "status", "waits")] == ["HfHubHTTPError", 500, []]
    assert [ended["info"][key] for key in ("error", "cause", "waits")] == [
        "LocalEntryNotFoundError",
        "HfHubHTTPError",
        [],
    ]
    assert [ended["down"][key] for key in ("error", "cause")] == ["LocalEntryNotFoundError", "HfHubHTTPError"]
    assert ended["down"]["waits"] == [1, 2, 4, 8, 8]
    assert all(fault.times == 0 for fault in hub.faults)


def pull_broken() -> dict[str, Any]:
    ended = {name: attempt(snapshot_download, f"me/{name}") for name in ("cut", "early", "reset", "ended", "wrong")}
    found = HfApi().verify_repo_checksums("me/wrong").mismatches
    return ended | {"path": snapshot_download("me/cut"), "mismatches": [each["path"] for each in found]}


def test_cut_and_wrong_downloads(hub: Hub, owner: dict[str, str], tmp_path: Path):
    content = bytes(range(256)) * 4096 * 12
    for name in ("cut", "early", "reset", "ended", "wrong"):
        hub.create(f"me/{name}", {"a.bin": content, "b.json": b"{}"})
    hub.faults += [
        Fault("GET", "me/cut/resolve/.*/a.bin", cut_after=PIECE + 1000),
        Fault("GET", "me/early/resolve/.*/a.bin", cut_after=PIECE - 1000),
        Fault("GET", "me/reset/resolve/.*/a.bin", cut_after=PIECE + 1000, reset=True),
        Fault("GET", "me/ended/resolve/.*/a.bin", cut_after=0, times=6),
        Fault("GET", "me/wrong/resolve/.*/a.bin", wrong_bytes=True),
    ]
    ended = run(pull_broken, owner)
    # One that closes is resumed, from the last whole piece.
    assert ended["cut"] == ended["early"] == {"error": None, "waits": [1]}
    seen = {name: hub.asked("GET", f"me/{name}/resolve/.*/a.bin") for name in ("cut", "early")}
    assert [(each.range, each.status) for each in seen["cut"]] == [(None, 200), (f"bytes={PIECE}-", 206)]
    assert [(each.range, each.status) for each in seen["early"]] == [(None, 200), (None, 200)]
    assert (Path(ended["path"]) / "a.bin").read_bytes() == content
    # One that breaks is not, and one that brings nothing six times is given up; nothing is left on the disk.
    assert (ended["reset"]["error"], ended["reset"]["waits"]) == ("ReadError", [])
    assert (ended["ended"]["error"], ended["ended"]["waits"]) == ("RemoteProtocolError", [1] * 5)
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    # Only the size is checked.
    assert ended["wrong"]["error"] is None
    assert ended["mismatches"] == ["a.bin"]


def push_broken(folder: str, times: int) -> list[dict[str, Any]]:
    return [attempt(HfApi().upload_folder, repo_id="me/model", folder_path=folder) for _ in range(times)]


def test_a_cut_upload_goes_on(hub: Hub, owner: dict[str, str], folder: Path):
    hub.create("me/model")
    (folder / "vae/model.safetensors").write_bytes(bytes(4_000_000))
    cut = hashlib.sha256(bytes(4_000_000)).hexdigest()
    hub.faults.append(Fault("PUT", f"/_lfs/{cut}", cut_after=100_000, times=6))
    first, second = run(push_broken, owner, folder, 2)
    assert first["error"] == "RuntimeError"
    assert first["cause"] in ("RemoteProtocolError", "WriteError", "ReadError")
    assert "vae/model.safetensors" in first["text"]
    assert first["waits"] == [1, 2, 4, 8, 8]
    assert second == {"error": None, "waits": []}
    # Seven times the one, and once each of the two others, which arrived the first time.
    tries = [each.path.removeprefix("/_lfs/") for each in hub.asked("PUT", "/_lfs/")]
    assert sorted(tries.count(oid) for oid in set(tries)) == [1, 1, 7]
    assert tries.count(cut) == 7
    assert len(hub.asked("POST", "/commit/")) == 1
    assert hub.repos["me/model"].files["vae/model.safetensors"].content == bytes(4_000_000)


def offline() -> dict[str, Any]:
    ended = {
        "snapshot": attempt(snapshot_download, "me/model"),
        "part": attempt(snapshot_download, "me/model", allow_patterns="*.json"),
        "never": attempt(snapshot_download, "me/never"),
        "file": attempt(hf_hub_download, "me/model", "b.json"),
        "no file": attempt(hf_hub_download, "me/model", "a.bin"),
        "info": attempt(HfApi().model_info, "me/model"),
    }
    return {name: each["error"] for name, each in ended.items()}


def pull_part(times: int) -> list[str]:
    return [snapshot_download("me/model", allow_patterns="*.json") for _ in range(times)]


def test_offline_and_out_of_order(hub: Hub, owner: dict[str, str]):
    repo = hub.create("me/model", {"a.bin": b"a", "b.json": b"{}"})
    (old,) = run(pull_part, owner, 1)
    hub.requests.clear()
    assert run(offline, owner | {"HF_HUB_OFFLINE": "1"}) == {
        "snapshot": "IncompleteSnapshotError",
        "part": None,
        "never": "LocalEntryNotFoundError",
        "file": None,
        "no file": "LocalEntryNotFoundError",
        "info": "OfflineModeIsEnabled",
    }
    assert not hub.requests

    # A Hub that is out of order is like none: the client gives what it had, without a word.
    repo.commit(repo.files, "newer")
    hub.faults.append(Fault("GET", "/revision/main", 500))
    stale, fresh = run(pull_part, owner, 2)
    assert stale == old
    assert Path(fresh).name == repo.branches["main"] != Path(old).name


def push_and_load(folder: str) -> dict[str, Any]:
    import torch
    from diffusers import DDPMPipeline

    own = DDPMPipeline.from_pretrained(folder)
    own.push_to_hub("me/pipeline", private=True)
    got = DDPMPipeline.from_pretrained("me/pipeline")
    pairs = zip(own.unet.state_dict().values(), got.unet.state_dict().values(), strict=True)
    return {
        "equal": all(torch.equal(a, b) for a, b in pairs),
        "missing": attempt(DDPMPipeline.from_pretrained, "me/none"),
    }


@pytest.mark.slow
def test_stock_diffusers(hub: Hub, owner: dict[str, str], teacher_folder: Path):
    loaded = run(push_and_load, owner, teacher_folder)
    assert loaded["equal"]
    assert loaded["missing"]["error"] == "OSError"
    assert hub.repos["me/pipeline"].private
    assert not [request for request in hub.requests if request.status == 501]
