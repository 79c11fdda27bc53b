"""Teachers by the Hub's id: commits, variants, what is not fetched, and what a bad day brings."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from tests.conftest import save_teacher, tiny_unet
from tests.earlier import recipe_of, save_export, trained
from tests.hub import teachers
from tests.hub.alone import alone
from tests.tiny import diffusion
from tests.tiny.ip_adapters import WEIGHTS, save_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("pipeline") / "teacher")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same with its first weight 1 more."""
    unet = tiny_unet()
    with torch.no_grad():
        next(unet.parameters()).view(-1)[0].add_(1)
    return save_teacher(tmp_path_factory.mktemp("pipeline") / "other", unet)


def first_weight(unet=None):
    return float(next((unet or tiny_unet()).parameters()).detach().flatten()[0])


@pytest.fixture(scope="module")
def seen(folder, other, tmp_path_factory):
    """What came of everything, in one process."""
    scratch, unet = tmp_path_factory.mktemp("scratch"), tiny_unet()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(scratch / "pickled", safe_serialization=False)
    pipeline = DDPMPipeline(unet.half(), DDPMScheduler())
    pipeline.save_pretrained(scratch / "half", variant="fp16")
    pipeline.save_pretrained(scratch / "sharded", variant="fp16", max_shard_size="40KB")
    assert len(list((scratch / "sharded" / "unet").glob("*.safetensors"))) > 1
    assert "fp16" in next((scratch / "sharded" / "unet").glob("*.index.*json")).read_text()
    home, recipe = scratch / "home", recipe_of(folder, {"student": {"kind": "scaled", "lora": {"rank": 2}}})
    for seed, name in enumerate(("first", "second"), 1):
        save_export(scratch / name, recipe, *trained(recipe, seed))
    return alone(
        home,
        (teachers.open_by_id, (folder, other)),
        (teachers.not_for_everyone, (folder,)),
        (teachers.what_is_not_fetched, (folder, scratch / "pickled")),
        (teachers.variants, (scratch / "half", scratch / "sharded")),
        (teachers.bad_days, (folder,)),
        (teachers.shared_store, (folder, home)),
        (teachers.offline, (folder,)),
        (teachers.earlier_students, (folder, scratch / "first", scratch / "second")),
        (teachers.goes_on_at_its_commit, (folder, other, scratch / "trained")),
        (teachers.ip_adapters, (save_adapter(scratch / "adapter", diffusion.PIPELINES["sd1"].build()),)),
    ) | {"trained": scratch / "trained"}


def test_a_teacher_is_the_commit_that_a_name_stands_for(seen):
    seen = seen["open_by_id"]
    assert seen["main"] == [seen["head"], pytest.approx(first_weight())]
    assert seen["branch"] == seen["commit"] == [seen["older"], pytest.approx(first_weight() + 1)]
    assert any(path.endswith(teachers.WEIGHTS) for path in seen["branch fetched"])
    assert seen["commit fetched"] == []
    assert seen["same as the folder"]
    assert seen["license"] == {"license": "mit"}
    assert "tester/teacher at nowhere: " in seen["unknown"]
    assert "no such branch, tag or commit" in seen["unknown"]
    assert "expected a Hub id for revision" in seen["folder at a revision"]


def test_what_is_not_for_everyone(seen):
    seen = seen["not_for_everyone"]
    assert len(seen) == 7
    assert not [line for line in seen.values() if "\n" in line or "hf_" in line]
    assert "somebody/gated: it is gated: accept its terms on its page" in seen["somebody/gated"]
    for name in ("somebody/private", "somebody/nothing"):
        assert f"{name}: no such folder here, and on the Hub: no such repository, or a private one" in seen[name]
    assert "no model_index.json in it; expected a complete diffusers pipeline" in seen["tester/dataset"]
    assert "neither a folder nor a Hub id" in seen["no such name"]
    assert "neither a folder nor a Hub id" in seen["a--b/c"]
    # A login has no effect while the variable is set.
    assert "the Hub refuses the token in HF_TOKEN; set HF_TOKEN to another token" in seen["wrong token"]


def test_only_what_can_be_used_is_fetched(seen):
    seen = seen["what_is_not_fetched"]
    lines = seen["lines"]
    assert "no adapter for" in lines["video"]
    assert "its unet is code of the repository (my_unet.py), which is not run" in lines["code"]
    assert "its pipeline is code of the repository" in lines["pipe"]
    assert "expected weights in .safetensors, got pickled ones" in lines["pickled"]
    assert lines["much"] == ""
    assert not [line for line in lines.values() if "\n" in line]
    weights = [name for name in seen["got"] if not name.endswith(".json")]
    assert weights == ["/tester/much diffusion_pytorch_model.safetensors"]


def test_variants_stand_in_for_the_plain_weights(seen):
    seen = seen["variants"]
    assert (
        seen["half"]
        == seen["half again"]
        == seen["sharded"]
        == float(next(tiny_unet().half().parameters()).detach().flatten()[0])
    )
    assert seen["plain of half"].endswith("expected default weights, got variants (fp16); try --set variant=fp16")
    assert "got variants (fp16); try --set variant=fp16" in seen["none"]
    assert "\n" not in seen["none"] + seen["plain of half"]


def test_bad_days_end_in_a_line_or_in_a_whole_teacher(seen):
    seen = seen["bad_days"]
    assert f"{teachers.WEIGHTS} differs from the file on the Hub; it was removed" in seen["wrong bytes"]
    assert "the Hub has an internal error (status 500)" in seen["not well"]
    assert "could not be reached" in seen["reset"]
    assert seen["cut"] == ""
    assert seen["faults left"] == 0
    assert seen["whole"]
    same, lines = seen["from the cache"]
    assert same
    assert len(lines) == 1
    assert lines[0].endswith("the cache is used")
    assert "could not be reached" in seen["never seen"]
    assert "the Hub has an internal error (status 503)" in seen["down"]
    assert not [line for line in seen.values() if isinstance(line, str) and "\n" in line]


def test_the_store_that_repositories_share(seen):
    seen = seen["shared_store"]
    assert seen["moved"]
    assert seen["seen"] == 1
    assert seen["again"] == ""
    assert f"{teachers.WEIGHTS} differs from the file on the Hub; it was removed" in seen["wrong"]
    assert seen["whole"]


def test_offline_nobody_is_asked(seen):
    seen = seen["offline"]
    assert seen["cached"] == [True, True]
    assert seen["asked"] == 0
    assert "HF_HUB_OFFLINE=1" in seen["missing"]
    assert "\n" not in seen["missing"]


def test_a_run_goes_on_with_the_commit_it_began_with(seen):
    folder, seen = seen["trained"], seen["goes_on_at_its_commit"]
    assert seen["kept"]
    assert seen["opened"]
    assert seen["card"]
    assert "no such branch, tag or commit" in seen["gone"]
    assert json.loads((folder / "teacher.json").read_text())["guidance.weaker_revision"] is None


def test_a_run_starts_from_a_student_of_the_hub_and_stays_with_its_commit(seen):
    seen = seen["earlier_students"]
    assert seen["commit"] == seen["head"]
    assert f"start:   the student tester/student at {seen['head']}\n" in seen["plan"]
    assert seen["same"] == [True, False]
    # Neither other pipelines nor other components.
    folders = {name.partition("/")[0] for name in seen["fetched"]}
    assert folders == {"student.json", "recipe.yaml", "model_index.json", "unet", "lora"}
    assert [name for name in seen["fetched"] if name.startswith("lora/")] == seen["lora"]
    assert "student.init tester/nothing: no such folder here, and on the Hub: no such repo" in seen["tester/nothing"]
    assert seen["tester/teacher"].startswith("student.init tester/teacher: expected a student that fmm-distill publish")


def test_ip_adapters_by_id(seen):
    found = seen["ip_adapters"]
    assert found["commit"]
    assert found["older"]
    assert found["license"] == "apache-2.0"
    assert found["fetched"] == ["README.md", "config.json", WEIGHTS, "model.safetensors"]
    assert "no file models/other.safetensors in tester/adapter; expected one of its files" in found["no file"]
    assert f"models/b.safetensors, models/{WEIGHTS}" in found["no file"]
    assert "ip_adapter.source tester/nothing: no such repository" in found["no repository"]
    assert "ip_adapter.source tester/adapter: it has no such branch" in found["no revision"]
    assert found["offline"]
    assert len(found["lines"]) == 1
    assert "the cache is used" in found["lines"][0]
    assert "forbids downloads; run once without it" in found["not in the cache"]
    lines = [found[name] for name in ("no file", "no repository", "no revision", "not in the cache")]
    assert not any("\n" in line for line in lines)
