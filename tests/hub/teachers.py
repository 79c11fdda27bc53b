"""What happens to teachers that are asked for by id, in a process of its own (see ``tests.hub.alone``)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.hub.alone import said
from tests.hub.server import Fault, Hub
from tests.hub.state import File
from tests.logs import logged

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def files_of(folder: str | Path) -> dict[str, bytes]:
    """A folder as a repository has it."""
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _first_weight(teacher: Any) -> float:
    return float(next(teacher.network.parameters()).flatten()[0])


def open_by_id(hub: Hub, folder: str, other: str) -> dict[str, Any]:
    """The newest commit, an older one by a branch and by its hash, and one that is in the cache."""
    from fmm_distill.teachers.load import load_teacher

    card = {"README.md": b"---\nlicense: mit\n---\n# A teacher\n"}
    repo = hub.create("tester/teacher", files_of(other) | card)
    older = repo.at("main").sha
    repo.branches["old"] = older
    newer = {name: File(content, name == WEIGHTS) for name, content in (files_of(folder) | card).items()}
    repo.commit(newer, "newer")
    seen: dict[str, Any] = {"head": repo.at("main").sha, "older": older}
    for name, revision in (("main", None), ("branch", "old"), ("commit", older)):
        before = len(hub.requests)
        teacher = load_teacher("tester/teacher", revision=revision)
        seen[name] = [teacher.revision, _first_weight(teacher)]
        seen[f"{name} fetched"] = [r.path for r in hub.requests[before:] if r.method == "GET" and "/resolve/" in r.path]
    seen["license"] = teacher.license
    here = load_teacher(folder)
    seen["same as the folder"] = _first_weight(here) == seen["main"][1]
    seen["unknown"] = said(load_teacher, "tester/teacher", revision="nowhere")
    seen["folder at a revision"] = said(load_teacher, folder, revision="main")
    return seen


def not_for_everyone(hub: Hub, folder: str) -> dict[str, str]:
    """Gated, private, missing, with a token that is refused, and no pipeline at all."""
    import os

    from fmm_distill.teachers.load import load_teacher

    files = files_of(folder)
    hub.create("somebody/gated", files, gated="manual")
    hub.create("somebody/private", files, private=True)
    hub.create("tester/teacher", files)
    hub.create("tester/dataset", {"train.parquet": b"1"})
    names = ("somebody/gated", "somebody/private", "somebody/nothing", "tester/dataset", "no such name", "a--b/c")
    lines = {name: said(load_teacher, name) for name in names}
    os.environ["HF_TOKEN"] = "hf_wrong"
    return lines | {"wrong token": said(load_teacher, "tester/teacher")}


def what_is_not_fetched(hub: Hub, folder: str, pickled: str) -> dict[str, Any]:
    """Weights that no adapter opens, pickles, code, and what a pipeline has no use for."""
    from fmm_distill.teachers.load import load_teacher

    files = files_of(folder)
    index = json.loads(files["model_index.json"])

    def with_index(**changes: object) -> dict[str, bytes]:
        return files | {"model_index.json": json.dumps(index | changes).encode()}

    hub.create("tester/video", with_index(unet=["diffusers", "UNetSpatioTemporalConditionModel"]))
    hub.create("tester/code", with_index(unet=["my_unet", "MyUNet"]) | {"unet/my_unet.py": b"raise SystemExit(9)"})
    hub.create("tester/pipe", with_index(_class_name=["my_pipe", "Pipe"]) | {"my_pipe.py": b"raise SystemExit(9)"})
    hub.create("tester/pickled", files_of(pickled))
    hub.create("tester/much", files | {"whole.safetensors": b"1" * 100, "unet/model.bin": b"2", "picture.png": b"3"})
    lines = {name: said(load_teacher, f"tester/{name}") for name in ("video", "code", "pipe", "pickled", "much")}
    got = {
        path.split("/resolve/")[0] + " " + path.split("/")[-1]
        for path in (r.path for r in hub.asked("GET", "/resolve/"))
    }
    return {"lines": lines, "got": sorted(got)}


def variants(hub: Hub, half: str, sharded: str) -> dict[str, Any]:
    """Half precision alone, in one file and in shards, and one that is not there."""
    from fmm_distill.teachers.load import load_teacher

    hub.create("tester/half", files_of(half))
    hub.create("tester/sharded", files_of(sharded))
    seen: dict[str, Any] = {"half": _first_weight(load_teacher("tester/half", variant="fp16"))}
    seen["sharded"] = _first_weight(load_teacher("tester/sharded", variant="fp16"))
    seen["half again"] = _first_weight(load_teacher(half, variant="fp16"))
    seen["plain of half"] = said(load_teacher, "tester/half")
    seen["none"] = said(load_teacher, "tester/half", variant="bf16")
    return seen


def bad_days(hub: Hub, folder: str) -> dict[str, Any]:
    """Bytes that are not the Hub's, connections that are cut, a Hub that is not well, none at all."""
    from unittest.mock import patch

    from fmm_distill.teachers.load import load_teacher

    hub.create("tester/teacher", files_of(folder))
    seen: dict[str, Any] = {}
    with patch("time.sleep"):
        hub.faults = [Fault("GET", WEIGHTS, wrong_bytes=True)]
        seen["wrong bytes"] = said(load_teacher, "tester/teacher")
        hub.faults = [Fault("GET", WEIGHTS, status=500)]
        seen["not well"] = said(load_teacher, "tester/teacher")
        hub.faults = [Fault("GET", WEIGHTS, cut_after=100, reset=True)]
        seen["reset"] = said(load_teacher, "tester/teacher")
        hub.faults = [Fault("GET", WEIGHTS, status=429, headers={"Retry-After": "1"})]
        hub.faults += [Fault("GET", WEIGHTS, cut_after=100)]
        seen["cut"] = said(load_teacher, "tester/teacher")
        seen["faults left"] = sum(fault.times for fault in hub.faults)
        teacher = load_teacher("tester/teacher")
        seen["whole"] = _first_weight(teacher) == _first_weight(load_teacher(folder))
        lines: list[str] = []
        hub.faults = [Fault("GET", "/api/models", cut_after=0, reset=True, times=9)]
        with logged(lines):
            again = load_teacher("tester/teacher")
        seen["from the cache"] = [again.revision == teacher.revision, lines]
        hub.faults = [Fault("GET", "/api/models", cut_after=0, reset=True, times=9)]
        with logged(lines):
            seen["never seen"] = said(load_teacher, "tester/other")
        hub.faults = [Fault("GET", "/api/models", status=503, times=9)]
        seen["down"] = said(load_teacher, "tester/teacher")
    return seen


def shared_store(hub: Hub, folder: str, home: str) -> dict[str, Any]:
    """What hf_xet fetches lies in a store that repositories share, by another name; here it is put there by hand."""
    from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store

    from fmm_distill.teachers.load import load_teacher

    hub.create("tester/teacher", files_of(folder))
    # A number, as the weights may be read from the file when they are needed.
    first = _first_weight(load_teacher("tester/teacher"))
    cache = Path(home) / "hub"
    weights = next(cache.glob(f"models--tester--teacher/snapshots/*/{WEIGHTS}"))
    blob = weights.parent / weights.readlink()
    moved = publish_blob_to_shared_store(
        blob_path=str(blob.resolve()), xet_hash="a" * 64, cache_dir=cache, expected_size=blob.stat().st_size
    )
    seen = list((Path(home) / "fmm_distill" / "fetched").iterdir())
    for file in seen:
        file.unlink()
    again = said(load_teacher, "tester/teacher")
    for file in (Path(home) / "fmm_distill" / "fetched").iterdir():
        file.unlink()
    content = weights.resolve()
    content.chmod(0o644)
    content.write_bytes(bytes(content.stat().st_size))
    wrong = said(load_teacher, "tester/teacher")
    whole = _first_weight(load_teacher("tester/teacher")) == first
    return {"moved": moved, "seen": len(seen), "again": again, "wrong": wrong, "whole": whole}


def offline(hub: Hub, folder: str) -> dict[str, Any]:
    """``HF_HUB_OFFLINE=1``: what is in the cache opens, the rest is a line, and nobody is asked."""
    from huggingface_hub import constants

    from fmm_distill.teachers.load import load_teacher

    repo = hub.create("tester/teacher", files_of(folder))
    hub.create("tester/index", files_of(folder))
    load_teacher("tester/teacher")
    load = said(load_teacher, "tester/index", revision="nowhere")
    asked, lines = len(hub.requests), []
    constants.HF_HUB_OFFLINE = True
    with logged(lines):
        sha = load_teacher("tester/teacher").revision
    with logged(lines):
        pinned = load_teacher("tester/teacher", revision=sha).revision
    seen = {"cached": [sha == repo.at("main").sha, pinned == sha], "lines": lines, "before": load}
    seen["missing"] = said(load_teacher, "tester/index")
    constants.HF_HUB_OFFLINE = False
    return seen | {"asked": len(hub.requests) - asked}


def goes_on_at_its_commit(hub: Hub, folder: str, other: str, run: str) -> dict[str, Any]:
    """A run whose teacher's repository has moved on."""
    from fmm_distill.config.recipe import parse
    from fmm_distill.run.distill import distill
    from fmm_distill.run.reopen import open_run

    repo = hub.create("tester/teacher", files_of(folder))
    begun = repo.at("main").sha
    changes = {
        "teacher": "tester/teacher",
        "training": {"steps": 2, "batch_size": 2},
        "evaluation": {"features": "none", "samples": 4, "endpoint_samples": 4, "batch_size": 4, "steps": [1]}
        | {"ddim_steps": [1], "dpmsolver_steps": [1], "endpoint_solver_steps": 2},
        "export": {"steps": [1]},
    }
    distill(parse(changes, "here"), run)
    repo.commit({name: File(content, name == WEIGHTS) for name, content in files_of(other).items()}, "moved")
    more = changes | {"training": {"steps": 3, "batch_size": 2}}
    distill(parse(more, "here"), run)
    kept = json.loads((Path(run) / "teacher.json").read_text())
    card = (Path(run) / "student" / "README.md").read_text()
    job = open_run(run)
    del repo.commits[begun]
    for path in Path(run).parent.glob("home/hub/models--tester--teacher"):
        path.rename(path.with_name("gone"))
    return {
        "kept": kept["revision"] == begun,
        "opened": job.teacher.revision == begun,
        "card": begun in card and "base_model: tester/teacher" in card,
        "digest": hashlib.sha256(card.encode()).hexdigest(),
        "gone": said(open_run, run),
    }


def earlier_students(hub: Hub, folder: str, first: str, second: str) -> dict[str, Any]:
    """A run starts from a student of the Hub: its newest commit, then that commit again although there is a newer one.

    Args:
        folder: of the teacher.
        first, second: exported folders of two of its students.
    """
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.run.earlier import read_earlier
    from fmm_distill.run.folder import pinned, store_commits
    from fmm_distill.run.plan import plan

    # A pipeline has more than its network.
    more = dict.fromkeys(("steps-4/unet/a.safetensors", "text_encoder/a.safetensors", "lora/steps-4.safetensors"), b"1")
    lora = {name: content for name, content in files_of(first).items() if name.startswith("lora/")}
    repo = hub.create("tester/student", files_of(first) | more)
    hub.create("tester/teacher", files_of(folder))
    student = {"kind": "scaled", "lora": {"rank": 2}, "init": "tester/student"}
    recipe = Recipe.model_validate({"teacher": folder, "student": student})
    job, run = plan(recipe), Path(first).parent / "run"
    seen: dict[str, Any] = {"head": repo.at("main").sha, "commit": job.recipe.student.init_revision, "plan": str(job)}
    seen["fetched"] = sorted(
        {r.path.partition("/resolve/")[2].partition("/")[2] for r in hub.requests if "/resolve/" in r.path}
    )
    seen["lora"] = sorted(lora)
    run.mkdir()
    store_commits(run, job.teacher, job.recipe.student.init_revision)
    repo.commit(
        {name: File(content, name.endswith(".safetensors")) for name, content in files_of(second).items()}, "new"
    )
    weights = [plan(one).student.state_dict() for one in (pinned(recipe, run), recipe)]
    seen["same"] = [
        all(value.equal(job.student.state_dict()[name]) for name, value in state.items()) for state in weights
    ]
    for name in ("tester/nothing", "tester/teacher"):
        other = recipe.model_copy(update={"student": recipe.student.model_copy(update={"init": name})})
        seen[name] = said(read_earlier, other)
    return seen


def ip_adapters(hub: Hub, adapter: str) -> dict[str, Any]:
    """An IP-Adapter by its id: its commit and license, what is fetched of it, and what is not there.

    Args:
        adapter: the folder of its files.
    """
    from huggingface_hub import constants

    from fmm_distill.teachers.hub.adapter_files import find_adapter_files
    from fmm_distill.teachers.ip_adapter import IpAdapter

    files = {f"models/{name}": content for name, content in files_of(adapter).items()}
    more = {
        "README.md": b"---\nlicense: apache-2.0\n---\n",
        "models/ip-adapter.bin": b"1",
        "models/b.safetensors": b"2",
    }
    repo = hub.create("tester/adapter", files | more)
    own = {"source": "tester/adapter", "weight_name": "ip-adapter.safetensors", "subfolder": "models"}

    def find(**changes: Any) -> Any:
        return find_adapter_files(IpAdapter(**(own | changes)), needs_encoder=True)

    found = find()
    seen: dict[str, Any] = {"commit": found.commit == repo.at("main").sha, "license": found.license}
    seen["fetched"] = sorted({r.path.split("/")[-1] for r in hub.asked("GET", "/resolve/")})
    seen["no file"] = said(find, weight_name="other.safetensors")
    seen["no repository"] = said(find, source="tester/nothing")
    seen["no revision"] = said(find, revision="nowhere")
    repo.commit({"README.md": File(b"---\nlicense: mit\n---\n", False)}, "moved")
    older = find(revision=found.commit)
    seen["older"] = older.commit == found.commit != repo.at("main").sha
    constants.HF_HUB_OFFLINE = True
    lines: list[str] = []
    with logged(lines):
        seen["offline"] = find(revision=found.commit).commit == found.commit
    seen["lines"] = [line for line in lines if "cache" in line]
    seen["not in the cache"] = said(find, source="tester/teacher")
    constants.HF_HUB_OFFLINE = False
    return seen
