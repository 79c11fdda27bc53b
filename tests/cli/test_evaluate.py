"""``fmm-distill evaluate`` as users run it: runs, exported folders, what stands beside them, the regression guard."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from huggingface_hub import constants
from matplotlib.image import imread

from tests.cli.runs import call
from tests.processes import on_two_processes

# The tiny recipe measures no images; its teacher makes those that the digits' features look at.
FEW = ("--features", "digits", "--samples", "24", "--steps", "1,2")


def kept() -> list[Path]:
    """What interrupted evaluations have left."""
    folder = Path(constants.HF_HOME) / "fmm_distill" / "evaluation"
    return list(folder.iterdir()) if folder.is_dir() else []


def measure(source, file, *options):
    status, out, err = call("evaluate", source, *FEW, "--teacher-steps", "3", *options, "--output", file)
    assert status == 0, err
    return json.loads(file.read_text()), out


@pytest.fixture(scope="module")
def measured(finished, tmp_path_factory):
    """A run's student beside everything, with a report."""
    place = tmp_path_factory.mktemp("measured")
    folded = str(finished[0] / "student" / "steps-2")
    options = ("--also", folded, "--also-steps", "2", "--also", finished[0] / "student", "--report", place / "report")
    result, out = measure(finished[0], place / "a.json", *options)
    return result, out, place, folded


def rows_of(result):
    return {(row["sampler"], row["steps"]): row for row in result["rows"]}


def test_what_stands_beside_the_student(measured, finished):
    result, out, _, folded = measured
    rows = rows_of(result)
    exported = str(finished[0] / "student")
    solvers = ("teacher-ddim", "teacher-dpmsolver++", "teacher-unipc")
    assert list(rows) == [
        *(("student", n) for n in (1, 2)),
        *((name, n) for name in solvers for n in (1, 2)),
        ("teacher-heun", 1),
        ("teacher", 3),
        (folded, 2),
        *((exported, n) for n in (2,)),
    ]
    student, own, stock = rows["student", 2], rows["teacher", 3], rows[folded, 2]
    # The same student by another way, on the same noises.
    for key in ("frechet", "kid", "precision", "recall"):
        assert stock[key] == pytest.approx(student[key], rel=1e-3, abs=1e-3)
        assert rows[exported, 2][key] == pytest.approx(student[key], rel=1e-3, abs=1e-3)
    assert rows[exported, 2]["endpoint_error"] == pytest.approx(student["endpoint_error"], rel=1e-4)
    assert stock["endpoint_error"] is None
    assert own["seconds_ratio"] == own["memory_ratio"] == 1
    assert student["seconds_ratio"] == pytest.approx(student["seconds_per_image"] / own["seconds_per_image"])
    assert "DDPMPipeline, DDPMScheduler, 3 steps" in result["protocol"]["reference_sampler"]
    assert "frechet_samples: 24" in out
    assert kept() == []


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.addresses, self.rows = [], [], 0

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.sources += [given["src"]] if "src" in given else []
        self.addresses += [given[key] for key in ("href", "srcset", "action") if key in given]
        self.rows += tag == "tr"


def test_the_report_opens_alone(measured):
    result, out, place, _ = measured
    assert f"report: {place / 'report' / 'report.html'}" in out
    text = (place / "report" / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.rows == 1 + len(result["rows"])
    # Seven quantities, two pictures of samples; all in the file.
    assert len(page.sources) == 6 + 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.addresses == []
    # Base64 may spell any word.
    for source in page.sources:
        text = text.replace(source, "")
    assert "http" not in text.split("<dl>")[0]
    assert 'name="viewport"' in text
    for name in ("samples", "interpolation", "steps"):
        assert imread(place / "report" / f"{name}.png").std() > 0.05
    samples, between = (imread(place / "report" / f"{name}.png") for name in ("samples", "interpolation"))
    assert samples.shape == between.shape
    assert (samples != between).any()


def test_an_exported_folder_is_the_same_student(measured, finished, tmp_path):
    result, *_ = measured
    again, _ = measure(finished[0] / "student", tmp_path / "b.json")
    ours, theirs = rows_of(result), rows_of(again)
    for key, row in theirs.items():
        assert (row["endpoint_error"] is None) == (key[0] == "teacher")
        for quantity in ("endpoint_error", "frechet", "kid", "inception_score", "precision", "recall"):
            assert row[quantity] is None or row[quantity] == pytest.approx(ours[key][quantity], rel=1e-3, abs=1e-3), (
                key,
                quantity,
            )
    status, out, _ = call("evaluate", "--compare", measured[2] / "a.json", tmp_path / "b.json")
    # The student beside it is not there any more, and that is said.
    assert status == 0
    assert f"missing in the second: {finished[0] / 'student'}, 2" in out
    assert out.splitlines()[-1] == "student: no value is worse"


def test_without_the_teacher(finished, tmp_path):
    options = (*FEW, "--against", "none", "--output", tmp_path / "a.json")
    status, out, err = call("evaluate", finished[0] / "student", *options)
    assert status == 0, err
    assert "--against none: the teacher is not loaded, so its rows and the endpoint error are left out" in out
    result = json.loads((tmp_path / "a.json").read_text())
    assert [(row["sampler"], row["endpoint_error"]) for row in result["rows"]] == [("student", None)] * 2
    assert list(result["consistency"]["student"]) == ["1,2"]
    # Of a run the teacher is at hand.
    status, _, err = call("evaluate", finished[0], *options)
    assert status == 0, err
    result = json.loads((tmp_path / "a.json").read_text())
    assert [row["sampler"] for row in result["rows"]] == ["student"] * 2
    assert all(row["endpoint_error"] > 0 for row in result["rows"])


def test_the_regression_guard(measured, tmp_path):
    result, _, place, _ = measured
    worse = json.loads(json.dumps(result))
    worse["rows"][1]["endpoint_error"] *= 2
    (tmp_path / "worse.json").write_text(json.dumps(worse))
    first = place / "a.json"
    assert call("evaluate", "--compare", first, first)[0] == 0
    status, out, err = call("evaluate", "--compare", first, tmp_path / "worse.json")
    assert (status, err) == (1, "")
    assert out.splitlines()[-1] == "student: 1 value is worse"
    assert call("evaluate", "--compare", tmp_path / "worse.json", first)[0] == 0
    other = result | {"protocol": result["protocol"] | {"noise_seed": 3}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    status, out, err = call("evaluate", "--compare", first, tmp_path / "other.json")
    assert (status, out) == (2, "")
    assert "expected two evaluations with one protocol, got a difference in noise_seed: first 20240607, second 3" in err
    status, out, _ = call("evaluate", "--compare", first, tmp_path / "other.json", "--across-protocols")
    assert status == 0
    assert out.startswith("different protocols: noise_seed: first 20240607, second 3")


def test_two_processes_give_the_numbers_of_one(measured, finished, tmp_path):
    result, *_ = measured
    command = ("evaluate", finished[0], *FEW, "--teacher-steps", "3", "--output", tmp_path / "two.json")
    run = on_two_processes("fmm_distill", *command, HF_HOME=str(tmp_path / "home"))
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("sampler  ") == 1
    ours = rows_of(result)
    for key, row in rows_of(json.loads((tmp_path / "two.json").read_text())).items():
        for quantity in ("endpoint_error", "frechet", "kid", "precision", "recall"):
            assert row[quantity] is None or row[quantity] == pytest.approx(ours[key][quantity], rel=1e-3, abs=1e-3)
    assert list((tmp_path / "home" / "fmm_distill" / "evaluation").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "SOURCE is missing; expected a run, an exported folder or a Hub id, or --compare A B"),
        (("RUN", "--across-protocols"), "--across-protocols needs --compare"),
        (("RUN", "--also-steps", "2"), "--also-steps needs --also"),
        (("RUN", "--against", "none", "--teacher-steps", "2"), "--teacher-steps needs --against teacher"),
        (
            ("RUN", "--compare", "a.json", "b.json"),
            "--compare reads two results and takes no other option",
        ),
        (("--compare", "a.json", "b.json"), "a.json: no such file"),
        (("RUN", "--features", "clip"), "evaluation.features: expected digits, inception, none, or the path"),
        (
            ("RUN", "--features", "inception"),
            "evaluation.features: expected data or evaluation.reference with inception",
        ),
        (("RUN", "--reference", "builtin:digits"), "evaluation.reference: expected evaluation.features with it"),
        (("RUN", "--output", "./nowhere/a.json"), "a.json: expected a path in an existing folder, got nowhere"),
        (("RUN", "--output", "tests"), "tests could not be written (it is a folder); what was there before"),
        (("RUN", "--report", "README.md"), "--report README.md: expected a folder, got the file README.md"),
        (("RUN", "--clip", "some/model"), "evaluation.clip some/model: "),
        (("RUN", "--also", "./nowhere"), "./nowhere: no such folder"),
        (("RUN", "--teacher-steps", "1001"), "--teacher-steps: expected 1 to 1000 steps"),
        (("RUN", "--steps", "1001"), "evaluation.steps: expected 1 to 1000 steps"),
        (("nobody/nothing",), "nobody/nothing: no such folder here, and on the Hub: "),
    ],
    ids=str,
)
def test_mistakes(finished, options, message):
    given = [finished[0] if option == "RUN" else option for option in options]
    status, out, err = call("evaluate", *given)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert message in line
