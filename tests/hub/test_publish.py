"""``fmm-distill publish`` against a Hub on loopback, by the real client."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult

from fmm_distill.cli import command
from fmm_distill.config.recipe import parse
from fmm_distill.errors import UserError
from fmm_distill.evaluation.result import Evaluation, Row
from fmm_distill.export.card import _table, card, write_card
from fmm_distill.export.contents import record
from fmm_distill.export.load import load_student
from fmm_distill.export.manifest import make_manifest, read_manifest
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.run.marker import mark
from fmm_distill.run.publish import pack
from fmm_distill.student.student import Student
from tests.hub import publishing
from tests.hub.alone import alone

PROTOCOL = {"endpoint_samples": 16, "frechet": "32 features", "frechet_samples": 64, "frechet_reference": "7 images"}
ROWS = [
    Row("student", 1, 1, 0.5, 3.0, 0.1),
    Row("student", 4, 4, 0.25, None, 0.4),
    Row("teacher-ddim", 4, 4, 0.3, 4, 1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher_folder):
    """An exported student with its card; its comparison is put there, not made."""
    from fmm_distill.teachers.load import load_teacher

    run = tmp_path_factory.mktemp("published") / "run"
    run.mkdir()
    teacher = load_teacher(str(teacher_folder))
    student = Student.from_teacher(teacher)
    recipe = parse({"teacher": str(teacher_folder)}, "here")
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    mark(run)
    (run / "environment.json").write_text('{"python": "3.11"}')
    # The last line is that of a run that was killed.
    (run / "steps.jsonl").write_text('{"images_per_second": 64.0}\n' * 3600 + '{"images_per')
    for picture in ("samples.png", "steps.png"):
        (run / picture).write_bytes(b"\x89PNG" + picture.encode())
    export_pipeline(student, teacher, run / "student", (1, 4))
    about = make_manifest(student, teacher, recipe, (1, 4), run)
    write_card(run / "student", about, Evaluation(dict(PROTOCOL), list(ROWS)), run)
    (run / "student" / "verification.json").write_text('{"passed": true}')
    record(run / "student", "verification.json")
    (run / "student" / ".cache").mkdir()
    (run / "student" / ".cache" / "left.lock").write_text("")
    return run / "student"


@pytest.fixture
def copy(folder, tmp_path):
    """One to break."""
    return shutil.copytree(folder, tmp_path / "student")


@pytest.fixture(scope="module")
def published(folder, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("copies")
    without = shutil.ignore_patterns(".cache")
    run = shutil.copytree(folder.parent, scratch / "run", ignore=without)
    strange = shutil.copytree(folder, scratch / "strange", ignore=without)
    names = ("often", "over_others", "without_right", "through_faults", "into_the_void")
    calls = [(getattr(publishing, f"publish_{name}"), (folder,)) for name in names]
    calls += [(publishing.publish_with_strangers, (strange, scratch / "elsewhere"))]
    calls += [(publishing.publish_offline, (run,)), (publishing.publish_while_exporting, (run,))]
    return alone(tmp_path_factory.mktemp("home"), *calls)


@pytest.fixture
def often(published):
    return published["publish_often"]


def test_everything_goes_in_one_commit(often):
    assert often["address"].endswith("/tester/student")
    assert often["equal"]
    # The list of what the export wrote is the folder's own.
    assert often["left_here"] == [".cache/left.lock", "export.json"]
    assert {"student.json", "steps-4/unet/config.json", "recipe.yaml", "evaluation.json"} <= set(often["names"])
    # The Hub's own first one, and this.
    assert often["commits"][0] == 2
    assert 'from_pretrained("tester/student", trust_remote_code=True)' in often["card"]
    assert 'snapshot_download("tester/student", allow_patterns="steps-4/*")' in often["card"]


def test_the_same_again_sends_nothing(often):
    assert often["commits"][1] == often["commits"][0]
    assert often["puts_again"] == 0
    assert sum(line.startswith("nothing to upload: ") for line in often["lines"]) == 1


def test_what_a_student_has_no_more_is_removed(often):
    assert often["commits"][2] == often["commits"][1] + 1
    assert often["fewer"] == ["steps-1"]
    assert often["fewer_facts"] == [1]
    assert "steps-4" not in often["fewer_card"]
    assert "num_inference_steps=1).images" in often["fewer_card"]


def test_a_branch_is_made_and_named_in_the_card(often):
    assert often["branch"].endswith("/tester/student/tree/next")
    assert often["on_branch"]
    assert not often["on_main"]
    assert 'snapshot_download("tester/student", revision="next", allow' in often["branch_card"]
    assert 'from_pretrained("tester/student", revision="next", trust' in often["branch_card"]


def test_the_function_publishes_as_the_verb(often):
    assert often["from_python"].endswith("/tester/python/tree/first")
    assert often["python_private"]
    assert {"README.md", "student.json", "steps-1"} <= set(often["python_files"])
    assert "steps-4" not in often["python_files"]


def test_private_is_of_new_repositories(often):
    assert often["private"] == [True, False]
    assert sum("exists and is public" in line for line in often["lines"]) == 1


def test_what_is_something_else_stays(published):
    seen = published["publish_over_others"]
    assert seen["refused"]["tester/else"].startswith(
        "tester/else: expected an empty repository or a student, got other files (README.md, weights.bin); "
    )
    assert "got one of a/b; " in seen["refused"]["tester/cousin"]
    assert [line.split("; ")[0] for line in seen["others"]] == [
        f"tester/{name}: expected an empty repository or a student, got other files (student.json)"
        for name in ("list", "text")
    ]
    assert seen["untouched"] == [2, 2]
    assert "tester/else: 1 files that don't belong to this student stay in the repository" in seen["lines"]
    assert seen["kept"]
    assert seen["mixed"]
    assert seen["card"]
    assert not seen["old"]
    assert seen["empty"]


def test_without_the_right_nothing_is_made(published):
    seen = published["publish_without_right"]
    assert seen["made"] == ""
    assert all("\n" not in line for line in seen.values())
    assert not [line for line in seen.values() if "hf_" in line]
    for name in ("student", "a/b/c", "tester/a..b", "tester/-a"):
        assert seen[name].startswith(f"{name}: expected a repository as owner/name")
    assert seen["other owner"].startswith("somebody/student: expected a token of somebody, got one of tester")
    assert "403" in seen["forbidden"]
    assert "may not do this" in seen["locked"]
    assert "license" in seen["card"]
    # A login has no effect while the variable is set.
    assert "the Hub refuses the token in HF_TOKEN; set HF_TOKEN to another token" in seen["hf_wrong"]
    assert "may only read" in seen["hf_reads"]
    assert "got none; log in" in seen["none"]


def test_faults_leave_nothing_half(published, folder):
    seen = published["publish_through_faults"]
    assert seen["lost"].endswith(
        "the Hub has an internal error (status 500); run the same command again later; nothing was published"
    )
    # Two pictures, one of which was lost, and two networks: folded, an untrained student is the same at all steps.
    assert seen["arrived"] == 3
    assert seen["no commit"].endswith("nothing was published")
    assert seen["files"] == [".gitattributes"]
    assert seen["busy"] == ""
    # Whatever had arrived is not sent again.
    assert seen["sent again"] == 0
    # Without the lock and the list, and with the Hub's .gitattributes.
    assert seen["whole"] == len([path for path in folder.rglob("*") if path.is_file()]) - 2 + 1


def test_only_what_the_export_wrote_is_sent(published):
    seen = published["publish_with_strangers"]
    assert seen["secrets"] == []
    # The code of the pipeline is named by its digest.
    assert {re.sub("_[0-9a-f]{12}[.]py$", ".py", name.split("/")[0]) for name in seen["names"]} == {
        ".gitattributes",
        "README.md",
        "evaluation.json",
        "flow_map_pipeline.py",
        "model_index.json",
        "recipe.yaml",
        "samples.png",
        "scheduler",
        "steps-1",
        "steps-4",
        "steps.png",
        "student.json",
        "unet",
        "verification.json",
    }
    assert "unet/trainer_state.json" not in seen["names"]
    others = "notes/, secret.json, steps-2/, token.txt, unet/trainer_state.json"
    line = f"left out (not written by the export): {others}"
    assert seen["lines"].count(line) == 2
    assert line in seen["dry"]


def test_an_edited_card_is_sent_and_named(published):
    seen = published["publish_with_strangers"]
    assert "# My student of " in seen["card"]
    assert sum("README.md was edited since the export; it is uploaded" in line for line in seen["lines"]) == 1
    assert 'from_pretrained("tester/student", trust_remote_code=True)' in seen["how"]
    assert "# A few-step student of " in seen["card again"]
    assert "README.md: expected a model card, got another text (" in seen["torn card"]
    assert "\n" not in seen["torn card"]


def test_what_changed_since_the_export_is_refused(published):
    seen = published["publish_with_strangers"]
    assert "(steps-4/model_index.json, steps-4/scheduler/scheduler_config.json" in seen["linked"]
    assert "expected the exported files, got changed or linked ones (" in seen["linked"]
    assert not [name for name in seen["without it"] if name.startswith(("steps-4", "samples"))]
    assert "got changed or linked ones (samples.png)" in seen["picture"]
    assert "got changed or linked ones (unet/config.json)" in seen["changed"]
    assert "unet/config.json is missing; export again" in seen["missing"]
    assert seen["commits"] == 0


def test_an_export_and_a_publication_exclude_each_other(published):
    seen = published["publish_while_exporting"]
    assert "in use by an export: process " in seen["running"]
    assert "was exported again in the meantime; run the same command again" in seen["between"]
    assert seen["made"] == []
    assert len(seen["notes"]) == 1
    assert seen["notes"][0].endswith("is not finished; publishing the student that was exported after step 1000")


def test_offline_publishing_is_refused_before_training(published):
    seen = published["publish_offline"]
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        line = f"tester/student: publishing needs the network, but {name}=1 is set; unset {name} and run the same"
        assert seen[name].startswith(line)
        assert seen[f"{name} publish"].startswith(line)
    status, out, err = seen["distill"]
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "unset HF_HUB_OFFLINE" in err
    assert (seen["asked"], seen["made"]) == (0, False)


def test_no_network_is_one_line(published):
    line = published["publish_into_the_void"]
    assert "could not be reached" in line
    assert "\n" not in line


def test_the_card_is_what_the_hub_reads(folder):
    text = card(folder, "tester/student")
    read = ModelCard(text).data
    assert (read.library_name, read.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    assert read.get("base_model") is None
    results = {(r.metric_type, r.metric_args["num_inference_steps"]): r for r in read.eval_results}
    assert all(isinstance(result, EvalResult) for result in results.values())
    assert {key: result.metric_value for key, result in results.items()} == {
        ("endpoint-error", 1): 0.5,
        ("endpoint-error", 4): 0.25,
        ("frechet-distance", 1): 3.0,
    }
    assert read.model_name == "student"
    assert "| student | 4 | 4 | 0.2500 | not measured | 0.40000 |" in text
    # 3600 steps of a second.
    assert ", 1.0 hours\n- loss: lagrangian\n" in text
    assert "arXiv 2406.07507; LSD arXiv 2505.18825" in text
    assert "samples.png" in text


@pytest.mark.parametrize(
    ("hours", "text"), [(130, "130.0 hours"), (0.75, "45.0 minutes"), (0.01, "36 seconds"), (3.3e-6, "0.012 seconds")]
)
def test_a_duration_is_in_the_unit_that_fits(copy, hours, text):
    about = json.loads((copy / "student.json").read_text())
    (copy / "student.json").write_text(json.dumps(about | {"hours": hours}))
    assert f"samples, {text}\n" in card(copy)


def test_a_student_without_the_class_of_its_network_is_read(copy):
    about = json.loads((copy / "student.json").read_text())
    del about["started_from"]
    (copy / "student.json").write_text(json.dumps(about))
    assert read_manifest(copy).started_from is None


def test_the_card_has_what_else_was_measured():
    rows = [asdict(Row("student", 1, 1, None, 3.0, 0.1, kid=0.0125, recall=0.5)), asdict(ROWS[1])]
    assert _table(rows).splitlines() == [
        "| sampler | steps | network calls | endpoint error | Fréchet distance | seconds per sample | KID | recall |",
        "|---|---|---|---|---|---|---|---|",
        "| student | 1 | 1 | not measured | 3.000 | 0.10000 | 0.01250 | 0.500 |",
        "| student | 4 | 4 | 0.2500 | not measured | 0.40000 | not measured | not measured |",
    ]


def test_a_teacher_of_the_hub_is_the_base_model(folder, copy):
    about = json.loads((folder / "student.json").read_text())
    known = {"teacher": "google/ddpm", "revision": "c" * 40, "license": {"license": "mit"}, "dataset": "a/b"}
    (copy / "student.json").write_text(json.dumps(about | known))
    data = yaml.safe_load(card(copy).split("---")[1])
    assert data["base_model"] == "google/ddpm"
    assert data["base_model_relation"] == "finetune"
    assert (data["license"], data["datasets"]) == ("mit", ["a/b"])
    assert f"google/ddpm (revision {'c' * 40})" in card(copy)


def test_numbers_of_another_student_are_not_said(copy):
    (copy / "evaluation.json").unlink()
    text = card(copy)
    assert "It was not evaluated." in text
    assert "model-index" not in text


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda folder: (folder / "student.json").unlink(), "got a folder without student.json"),
        (lambda folder: (folder / "student.json").write_text('{"fmm_distill": "9"}'), "written by fmm_distill 9"),
        (lambda folder: (folder / "student.json").write_text("{"), "is truncated"),
        (lambda folder: (folder / "verification.json").unlink(), "expected a verified export"),
        (lambda folder: (folder / "verification.json").write_text('{"passed": false}'), "got a failed verification"),
        (lambda folder: (folder / "verification.json").write_text('{"passed": "no"}'), "expected true or false"),
        (lambda folder: (folder / "verification.json").write_text('{"pipelines": {}}'), "passed is missing"),
        (lambda folder: (folder / "verification.json").write_text("[]"), "expected a mapping"),
        (lambda folder: (folder / "verification.json").write_text("{"), "is truncated"),
    ],
)
def test_what_is_no_whole_student_is_refused(copy, change, wanted):
    change(copy)
    with pytest.raises(UserError, match=wanted) as caught:
        pack(copy, "tester/student")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["student.json", "verification.json", "evaluation.json", "recipe.yaml", "export.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"text"', '{"rows": 1}', "\x00\xff"])
def test_a_damaged_file_is_a_line(copy, name, text):
    (copy / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=rf"{name.split('.')[0]}\.") as caught:
        pack(copy, "tester/student")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["student.json", "model_index.json", "unet/config.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_damaged_file_of_a_student_that_is_loaded_is_a_line(copy, name, text):
    (copy / name).write_text(text)
    with pytest.raises(UserError) as caught:
        load_student(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": ["four"]},
        {"training": {}},
        {"scheduler": {}},
        {"guidance": {"scale": "much"}},
        {"teacher": None},
        {"license": "mit"},
    ],
)
def test_facts_of_another_form_are_a_line(copy, change):
    facts = json.loads((copy / "student.json").read_text())
    (copy / "student.json").write_text(json.dumps(facts | change))
    for look in (lambda: pack(copy, "tester/student"), lambda: load_student(copy)):
        with pytest.raises(UserError, match=rf"student\.json: {next(iter(change))}") as caught:
            look()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gone", "student"])
def test_a_source_that_is_not_there(tmp_path, name):
    (tmp_path / f".{name}.partial").mkdir()
    with pytest.raises(UserError, match="expected a run or an exported folder, got nothing there"):
        pack(tmp_path / name, "tester/student")


def test_an_interrupted_export_is_published_as_it_was(folder, tmp_path):
    run = shutil.copytree(folder.parent, tmp_path / "run")
    (run / "student").rename(run / ".student.old")
    assert pack(run, "tester/student").files.keys() == pack(folder, "tester/student").files.keys()
    assert (run / "student").is_dir()


def test_an_export_without_a_list_says_what_to_do(copy):
    (copy / "export.json").unlink()
    with pytest.raises(UserError, match=r"got one without .* run fmm-distill export RUN FOLDER"):
        pack(copy, "tester/student")


def test_steps_that_were_not_exported(folder):
    with pytest.raises(UserError, match=r"--steps 2: .* exported numbers \(1, 4\) of .*; export others"):
        pack(folder, "tester/student", steps=(1, 2))


def test_an_export_of_an_earlier_version_says_what_to_do(folder, tmp_path):
    run = shutil.copytree(folder.parent, tmp_path / "run")
    (run / "student" / "student.json").unlink()
    with pytest.raises(UserError, match=r"run fmm-distill export .*/run FOLDER, then publish FOLDER"):
        pack(run, "tester/student")


def test_folders_that_are_gone_are_not_in_the_card(copy):
    shutil.rmtree(copy / "steps-4")
    upload = pack(copy, "tester/student")
    assert "steps-4" not in upload.card
    assert json.loads(upload.texts["student.json"])["steps"] == [1]


def test_a_run_without_a_student(tmp_path):
    mark(tmp_path)
    with pytest.raises(UserError, match="got one without a student"):
        pack(tmp_path, "tester/student")


def test_a_dry_run_lists_and_shows(folder):
    done = CliRunner().invoke(command, ["publish", str(folder.parent), "tester/student", "--dry-run", "--steps", "4"])
    assert done.exit_code == 0
    assert "  steps-4/unet/diffusion_pytorch_model.safetensors\n" in done.output
    assert "steps-1/" not in done.output
    assert "# A few-step student of" in done.output
    assert done.output.endswith("nothing was uploaded (--dry-run)\n")


def test_facts_come_back_as_they_were(folder):
    about = read_manifest(folder)
    assert about.steps == (1, 4)
    assert about.hours == pytest.approx(1)
    assert Path(about.teacher).is_dir()
