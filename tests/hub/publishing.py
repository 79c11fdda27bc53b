"""What happens to students that are published, in a process of its own (see ``tests.hub.alone``)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tests.hub.alone import said
from tests.hub.server import Fault, Hub
from tests.logs import logged

REPO = "tester/student"


def _files(hub: Hub, repo: str = REPO) -> dict[str, bytes]:
    return {name: file.content for name, file in hub.repos[repo].files.items()}


def _commits(hub: Hub, repo: str = REPO) -> int:
    return len(hub.repos[repo].commits)


def publish_often(hub: Hub, folder: str) -> dict[str, Any]:
    """The same student again, then fewer steps of it, a branch, a private one."""
    from fmm_distill.run.publish import pack, publish

    source, lines, seen = Path(folder), [], {}
    with logged(lines):
        seen["address"] = publish(pack(source, REPO), REPO)
    sent = _files(hub)
    here = {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
    seen["names"] = sorted(sent)
    written = ("README.md", "student.json", "recipe.yaml")
    seen["equal"] = all(sent[name] == here[name].read_bytes() for name in (here.keys() & sent.keys()) - set(written))
    seen["left_here"] = sorted(here.keys() - sent.keys())
    seen["card"] = sent["README.md"].decode()
    seen["commits"] = [_commits(hub)]
    puts = len(hub.asked("PUT", "."))
    with logged(lines):
        publish(pack(source, REPO), REPO)
    seen["commits"].append(_commits(hub))
    seen["puts_again"] = len(hub.asked("PUT", ".")) - puts
    with logged(lines):
        publish(pack(source, REPO, steps=(1,)), REPO)
    seen["commits"].append(_commits(hub))
    seen["fewer"] = sorted({name.split("/")[0] for name in _files(hub) if name.startswith("steps-")})
    seen["fewer_facts"] = json.loads(_files(hub)["student.json"])["steps"]
    seen["fewer_card"] = _files(hub)["README.md"].decode()
    with logged(lines):
        seen["branch"] = publish(pack(source, REPO, "next"), REPO, "next")
    repo = hub.repos[REPO]
    seen["on_branch"] = "steps-4/model_index.json" in repo.at("next").files
    seen["on_main"] = "steps-4/model_index.json" in repo.files
    seen["branch_card"] = repo.at("next").files["README.md"].content.decode()
    import fmm_distill

    with logged(lines):
        seen["from_python"] = fmm_distill.publish(folder, "tester/python", branch="first", steps=(1,), private=True)
    python = hub.repos["tester/python"]
    seen["python_files"] = sorted({name.split("/")[0] for name in python.at("first").files})
    seen["python_private"] = python.private
    with logged(lines):
        publish(pack(source, "tester/hidden"), "tester/hidden", private=True)
    with logged(lines):
        publish(pack(source, REPO), REPO, private=True)
    return seen | {"private": [hub.repos["tester/hidden"].private, repo.private], "lines": lines}


def publish_over_others(hub: Hub, folder: str) -> dict[str, Any]:
    """Repositories that hold something else."""
    from fmm_distill.run.publish import pack, publish

    source = Path(folder)
    hub.create("tester/else", {"weights.bin": b"1", "README.md": b"mine"})
    hub.create("tester/cousin", {"student.json": b'{"teacher": "a/b"}', "unet/old.safetensors": b"2"})
    hub.create("tester/empty")
    hub.create("tester/list", {"student.json": b"[1]"})
    hub.create("tester/text", {"student.json": b"not JSON"})
    refused = {repo: said(publish, pack(source, repo), repo) for repo in ("tester/else", "tester/cousin")}
    others = [said(publish, pack(source, repo), repo) for repo in ("tester/list", "tester/text")]
    hub.create("tester/mixed", {"student.json": b"[1]", "weights.bin": b"1"})
    publish(pack(source, "tester/mixed"), "tester/mixed", force=True)
    untouched = [_commits(hub, repo) for repo in refused]
    lines: list[str] = []
    for repo in refused:
        with logged(lines):
            publish(pack(source, repo), repo, force=True)
    with logged(lines):
        publish(pack(source, "tester/empty"), "tester/empty")
    return {
        "refused": refused,
        "others": others,
        "mixed": "weights.bin" in _files(hub, "tester/mixed"),
        "untouched": untouched,
        "lines": lines,
        "kept": "weights.bin" in _files(hub, "tester/else"),
        "card": "A few-step student" in _files(hub, "tester/else")["README.md"].decode(),
        "old": "unet/old.safetensors" in _files(hub, "tester/cousin"),
        "empty": "student.json" in _files(hub, "tester/empty"),
    }


def publish_without_right(hub: Hub, folder: str) -> dict[str, str]:
    """Names and tokens that don't do."""
    from fmm_distill.run.publish import check_target, pack, publish

    source, outcomes = Path(folder), {}
    for name in ("student", "a/b/c", "tester/a..b", "tester/-a"):
        outcomes[name] = said(pack, source, name)
    outcomes["other owner"] = said(check_target, "somebody/student", "t")
    hub.create("tester/locked")
    hub.faults.append(Fault("GET", "auth-check", status=403, body={"error": "no"}))
    outcomes["locked"] = said(check_target, "tester/locked", "t")
    del hub.repos["tester/locked"]
    hub.faults.append(Fault("POST", "validate-yaml", status=400, body={"errors": [{"message": "license"}]}))
    outcomes["card"] = said(publish, pack(source, REPO), REPO)
    hub.faults.append(Fault("POST", "repos/create", status=403, body={"error": "no"}))
    outcomes["forbidden"] = said(publish, pack(source, REPO), REPO)
    for token in ("hf_wrong", "hf_reads", ""):
        os.environ["HF_TOKEN"] = token
        outcomes[token or "none"] = said(publish, pack(source, REPO), REPO)
    outcomes["made"] = ", ".join(hub.repos)
    return outcomes


def publish_through_faults(hub: Hub, folder: str) -> dict[str, Any]:
    """A file that does not arrive, a connection that is cut, and answers that the Hub gives on a bad day."""
    from unittest.mock import patch

    from fmm_distill.run.publish import pack, publish

    def send() -> str:
        return said(publish, pack(source, REPO), REPO)

    source, seen = Path(folder), {}
    digest = hashlib.sha256((source / "samples.png").read_bytes()).hexdigest()
    with patch("time.sleep"):
        # Once, and five times again.
        hub.faults = [Fault("PUT", digest, status=500, times=6), Fault("PUT", "lfs", cut_after=9, reset=True)]
        seen["lost"] = send()
        seen["arrived"] = len(hub.blobs)
        hub.faults = [Fault("POST", "/commit/", status=503)]
        seen["no commit"] = send()
        seen["files"] = list(_files(hub))
        before = len(hub.asked("PUT", "lfs"))
        hub.faults = [Fault("POST", "/preupload/", status=429, headers={"Retry-After": "1"}, times=2)]
        seen["busy"] = send()
        seen["sent again"] = len(hub.asked("PUT", "lfs")) - before
        seen["whole"] = len(_files(hub))
    return seen


def publish_into_the_void(hub: Hub, folder: str) -> str:
    """Nobody listens there."""
    from unittest.mock import patch

    from fmm_distill.run.publish import pack, publish

    hub.faults.append(Fault("GET", ".", cut_after=0, reset=True, times=100))
    with patch("time.sleep"):
        return said(publish, pack(Path(folder), REPO), REPO)


def publish_with_strangers(hub: Hub, folder: str, elsewhere: str) -> dict[str, Any]:
    """Files and links of the user's in the folder, an edited card, and files that are not as they were exported."""
    from fmm_distill.run.publish import pack, publish

    source, outside, lines = Path(folder), Path(elsewhere), []
    outside.mkdir()
    (outside / "secret.json").write_text("hf_secret")
    (source / "token.txt").write_text("hf_secret")
    (source / "notes").mkdir()
    (source / "notes" / "diary.md").write_text("hf_secret")
    (source / "unet" / "trainer_state.json").write_text("hf_secret")
    (source / "secret.json").symlink_to(outside / "secret.json")
    (source / "steps-2").symlink_to(outside)
    card = (source / "README.md").read_text(encoding="utf-8")
    (source / "README.md").write_text(card.replace("# A few-step student", "# My student"), encoding="utf-8")
    upload = pack(source, REPO)
    with logged(lines):
        publish(upload, REPO)
    seen: dict[str, Any] = {"lines": lines, "names": sorted(_files(hub)), "dry": upload.describe()}
    seen["secrets"] = [name for name, content in _files(hub).items() if b"hf_secret" in content]
    seen["card"] = _files(hub)["README.md"].decode()
    seen["how"] = upload.how_to_load
    (source / "README.md").write_text("---\n: [\n---\n", encoding="utf-8")
    seen["torn card"] = said(pack, source, REPO)
    (source / "README.md").unlink()
    with logged(lines):
        publish(pack(source, REPO), REPO)
    seen["card again"] = _files(hub)["README.md"].decode()
    before = _commits(hub)
    (source / "steps-4").rename(outside / "steps-4")
    (source / "steps-4").symlink_to(outside / "steps-4")
    (source / "samples.png").rename(outside / "samples.png")
    seen["linked"] = said(pack, source, REPO)
    seen["without it"] = sorted(pack(source, REPO, steps=(1,)).files)
    (source / "samples.png").symlink_to(outside / "samples.png")
    seen["picture"] = said(pack, source, REPO, steps=(1,))
    (source / "samples.png").unlink()
    (source / "unet" / "config.json").write_text("{}")
    seen["changed"] = said(pack, source, REPO, steps=(1,))
    (source / "unet" / "config.json").unlink()
    seen["missing"] = said(pack, source, REPO, steps=(1,))
    return seen | {"commits": _commits(hub) - before}


def publish_while_exporting(hub: Hub, run: str) -> dict[str, Any]:
    """An export into the folder that is running, one that ran in between, and a run that is not finished."""
    from fmm_distill.export.place import in_use, replacing
    from fmm_distill.run.publish import pack, publish

    source, lines = Path(run), []
    upload = pack(source, REPO)
    with in_use(source / "student", "an export"):
        running = said(publish, upload, REPO)
    with replacing(source / "student") as new:
        (new / "model_index.json").write_text("{}")
    between = said(publish, upload, REPO)
    return {"running": running, "between": between, "made": list(hub.repos), "lines": lines, "notes": upload.notes}


def publish_offline(hub: Hub, run: str) -> dict[str, Any]:
    """The network is forbidden: a line before anything is read or trained."""
    from unittest.mock import patch

    from huggingface_hub import constants

    from fmm_distill.run.publish import check_target, pack, publish
    from tests.cli.runs import call

    seen: dict[str, Any] = {}
    with patch.object(constants, "HF_HUB_OFFLINE", True):
        for name in ("TRANSFORMERS_OFFLINE", "HF_HUB_OFFLINE"):
            with patch.dict(os.environ, {name: "1"}):
                seen[name] = said(check_target, REPO, "t")
                seen[f"{name} publish"] = said(publish, pack(Path(run), REPO), REPO)
        with patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
            seen["distill"] = call("--recipe", "digits", "--push-to-hub", REPO, "--output", f"{run}-new")
    return seen | {"asked": len(hub.requests), "made": Path(f"{run}-new").exists()}
