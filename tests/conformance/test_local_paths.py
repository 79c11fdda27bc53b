"""Nothing that leaves this machine names its folders or its users."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from fmm_distill.config.recipe import parse
from fmm_distill.evaluation.result import Evaluation, Row
from fmm_distill.export.card import write_card
from fmm_distill.export.local_paths import is_local, public_name, without_paths
from fmm_distill.export.manifest import make_manifest
from fmm_distill.export.pipelines import write_pipelines
from fmm_distill.export.place import replacing
from fmm_distill.run.publish import pack
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_prompted import FAMILIES, PROMPTS
from tests.tiny.diffusion import PIPELINES

USER = "annabella"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/ann/models/t", "local:t"),
        ("~/models/t", "local:t"),
        ("./t/", "local:t"),
        ("../t", "local:t"),
        ("runs/ann/t", "local:t"),
        ("C:\\Users\\ann\\my t", "local:my t"),
        ("\\\\server\\share\\t", "local:t"),
        ("file:///data/t", "local:t"),
        # The last name is the user's.
        ("/home/ann", "local:folder"),
        ("/Users/ann/", "local:folder"),
        ("~", "local:folder"),
        ("~ann", "local:folder"),
        ("/", "local:folder"),
    ],
)
def test_a_path_becomes_its_last_name(source, name):
    assert is_local(source)
    assert public_name(source) == name
    assert public_name(name) == name
    assert not is_local(name)


@pytest.mark.parametrize("source", ["google/ddpm-cifar10-32", "gpt2", "builtin:digits", "none", "stabilityai/sd-3.5"])
def test_ids_of_the_hub_stay(source):
    assert not is_local(source)
    assert without_paths(source, {}) == source


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("64 images of /home/ann/cats (train)", "64 images of local:cats (train)"),
        ("/home/ann/clip, 100 times the cosine; 1/2", "local:clip, 100 times the cosine; 1/2"),
        ("/data/My Pictures/cats", "local:cats"),
        ("7 of ../ann/My Pictures, resized", "7 of local:My Pictures, resized"),
        ('{"output_dir": "/home/ann/out"}', '{"output_dir": "local:out"}'),
        ("host:/home/ann/x", "host:local:x"),
        ("at C:\\Users\\ann\\x!", "at local:x!"),
        ("1/2 of 3 images/second, n/a, </s>, ~1/2, ~0.5", "1/2 of 3 images/second, n/a, </s>, ~1/2, ~0.5"),
        ("https://huggingface.co/a/b/blob/main/LICENSE.md", "https://huggingface.co/a/b/blob/main/LICENSE.md"),
        ("- / + // /", "- / + // /"),
    ],
)
def test_paths_within_sentences(text, public):
    known = {"../ann/My Pictures": "local:My Pictures"}
    assert without_paths({"a": [text, 1, None]}, known) == {"a": [public, 1, None]}


def spoiled(folder):
    """What libraries and users leave in a teacher's folder."""
    for config in folder.glob("*/*config.json"):
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | {"_name_or_path": str(config.parent), "name_or_path": f"./{USER}/t"}))
    for tokenizer in folder.glob("tokenizer*"):
        settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
        own = {"tokenizer_file": str(tokenizer / "tokenizer.json"), "special_tokens_map_file": f"/home/{USER}/map.json"}
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | own))
    for weights in folder.glob("*/*.safetensors"):
        metadata = {"format": "pt", "made": json.dumps({"output_dir": str(folder)})}
        save_file(load_file(weights), weights, metadata)
    for part in [part for part in folder.iterdir() if part.is_dir()]:
        (part / "token.txt").write_text(f"hf_{USER}")
        (part / ".env").write_text(USER)
        (part / "notes").mkdir()
        (part / "notes" / "diary.md").write_text(USER)
    return folder


def opened(kind, folder):
    if kind == "dit":
        PIPELINES[kind].build().save_pretrained(folder)
        return load_teacher(str(spoiled(folder)))
    FAMILIES[kind].build().save_pretrained(folder, safe_serialization=True)
    return load_teacher(str(spoiled(folder)), prompts=PROMPTS, call=dict(FAMILIES[kind].call))


@pytest.fixture(scope="module", params=["dit", "sd1", "sd3"])
def packed(request, tmp_path_factory):
    """What is sent of a student whose teacher, data, prompts and features are a user's own folders and files."""
    home = tmp_path_factory.mktemp(USER)
    teacher = opened(request.param, home / "my models" / "teacher")
    run = home / "run"
    run.mkdir()
    recipe = parse(
        {
            "teacher": teacher.source,
            "data": f"{home}/My Pictures/cats",
            "guidance": {"scale": 2.0, "weaker": f"../{USER}/weaker"},
            "prompts": {"file": str(home / "prompts.txt")},
            "evaluation": {
                "features": f"{home}/net.pt",
                "reference": f"~/{USER}/dogs",
                "clip": f"{USER}/models/clip",
                "steps": [1],
            },
        },
        "here",
    )
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    (run / "environment.json").write_text(json.dumps({"python": "3.11"}))
    for picture in ("samples.png", "steps.png"):
        (run / picture).write_bytes(b"\x89PNG")
    protocol = {
        "endpoint_samples": 4,
        "frechet": f"8 features of {home}/net.pt; images clipped",
        "frechet_samples": 8,
        "frechet_reference": f"9 images of ~/{USER}/dogs",
        "clip_score": f"{USER}/models/clip, 100 times the cosine",
    }
    evaluation = Evaluation(protocol, [Row("student", 1, 1, 0.5, 3.0, 0.1)])
    student = Student.from_teacher(teacher)
    with replacing(home / "student") as new:
        write_pipelines(student, teacher, new, (1,))
        about = make_manifest(student, teacher, recipe, (1,), run)
        write_card(new, about, evaluation, run)
        compared = {"passed": True, "of": str(home / "x")}
        (new / "verification.json").write_text(json.dumps(compared))
    return home, pack(home / "student", "tester/student")


def test_no_file_names_a_folder_of_this_machine(packed):
    home, upload = packed
    sent = {name: path.read_bytes() for name, path in upload.files.items()}
    sent |= {name: text.encode() for name, text in upload.texts.items()}
    assert [name for name, content in sent.items() if USER.encode() in content or str(home).encode() in content] == []
    assert not [
        name for name in sent if name.endswith((".txt", ".md", ".env")) and "/" in name and "merges" not in name
    ]
    assert not [line for line in upload.notes if "left out" in line]
    assert USER not in (upload.folder / "README.md").read_text()


def test_the_recipe_has_names_in_their_places(packed):
    recipe = yaml.safe_load(packed[1].texts["recipe.yaml"])
    assert recipe["teacher"] == packed[1].teacher == "local:teacher"
    assert json.loads(packed[1].texts["student.json"])["teacher"] == "local:teacher"
    assert recipe["data"]["source"] == "local:cats"
    assert recipe["guidance"]["weaker"] == "local:weaker"
    assert recipe["prompts"]["file"] == "local:prompts.txt"
    evaluation = recipe["evaluation"]
    assert evaluation["features"] == "local:net.pt"
    assert (evaluation["clip"], evaluation["reference"]["source"]) == ("local:clip", "local:dogs")
    assert "8 features of local:net.pt; images clipped" in packed[1].card
    assert "data: local:cats" in packed[1].card
    # It is a recipe all the same.
    assert parse(recipe, "published").data.source == "local:cats"


def test_the_student_opens_without_them(packed):
    folder = packed[1].folder
    assert DiffusionPipeline.from_pretrained(folder / "steps-1") is not None


def test_the_run_and_the_export_still_know_their_paths(packed):
    home, upload = packed
    assert str(home) in (upload.folder / "recipe.yaml").read_text()
    assert Path(json.loads((upload.folder / "student.json").read_text())["teacher"]).is_dir()


def test_hub_ids_are_sent_as_they_are(packed, tmp_path):
    folder = shutil.copytree(packed[1].folder, tmp_path / "student")
    facts = json.loads((folder / "student.json").read_text())
    training = facts["training"] | {"data": "uoft-cs/cifar10"}
    known = {"teacher": "google/ddpm", "revision": "c" * 40, "dataset": "uoft-cs/cifar10", "training": training}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {"teacher": "google/ddpm", "data": {"source": "uoft-cs/cifar10"}}
    recipe["guidance"]["weaker"] = "google/ddpm-small"
    with replacing(tmp_path / "again") as new:
        for path in folder.iterdir():
            path.rename(new / path.name)
        (new / "export.json").unlink()
        (new / "student.json").write_text(json.dumps(facts | known))
        (new / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    upload = pack(tmp_path / "again", "tester/student")
    sent = yaml.safe_load(upload.texts["recipe.yaml"])
    assert upload.teacher == sent["teacher"] == "google/ddpm"
    assert sent["data"]["source"] == "uoft-cs/cifar10"
    assert sent["guidance"]["weaker"] == "google/ddpm-small"
    assert "base_model: google/ddpm" in upload.card
