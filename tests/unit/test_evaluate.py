"""What is measured is what is said."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from fmm_distill.config.settings import DataSettings, EvaluationSettings
from fmm_distill.data.samples import load_images
from fmm_distill.errors import UserError
from fmm_distill.evaluation.checks import check_evaluation
from fmm_distill.evaluation.draws import NOISE_SEED, draw_samples_of
from fmm_distill.evaluation.evaluator import EvaluationSpec, Evaluator, evaluate
from fmm_distill.evaluation.features import open_features
from fmm_distill.evaluation.result import Evaluation, Row, choose, from_json, table
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from tests.logs import logged

SETTINGS = EvaluationSettings(
    steps=(1, 2, 4),
    ddim_steps=(1, 2, 4, 20),
    dpmsolver_steps=(1, 4),
    samples=16,
    endpoint_samples=8,
    endpoint_solver_steps=24,
    batch_size=5,
)


@pytest.fixture
def measured(teacher):
    return evaluate({"student": Student.from_teacher(teacher)}, teacher, SETTINGS, None, torch.device("cpu"))


def test_rows(measured):
    rows = {(row.sampler, row.steps): row for row in measured.rows}
    assert len(rows) == 9
    assert all(row.calls == row.steps for row in measured.rows)
    assert all(row.frechet is None and row.seconds_per_image > 0 for row in measured.rows)
    errors = [rows["teacher-ddim", n].endpoint_error for n in (1, 2, 4, 20)]
    assert errors == sorted(errors, reverse=True)
    # A student that is its teacher makes the teacher's DDIM steps.
    for n in (1, 2, 4):
        assert rows["student", n].endpoint_error == pytest.approx(rows["teacher-ddim", n].endpoint_error, rel=1e-3)
    assert measured.protocol["ode_solver_error"] < 0.1 * errors[-1]


def test_json_and_table(measured):
    kept = measured.to_json()
    assert set(kept) == {"protocol", "rows", "consistency"}
    assert from_json(json.loads(json.dumps(kept))) == measured
    printed = table(measured)
    entries = [key for key, value in kept["protocol"].items() if value is not None]
    assert len(printed.splitlines()) == 1 + 9 + 1 + len(entries)
    assert printed.splitlines()[-len(entries) :] == [f"  {key}: {kept['protocol'][key]}" for key in entries]
    assert "not measured" in printed
    assert "KID" not in printed.splitlines()[0]
    # What an earlier version wrote.
    old = {"sampler": "student", "steps": 1, "calls": 1, "endpoint_error": 0.5, "frechet": None}
    assert from_json({"protocol": {}, "rows": [old | {"seconds_per_image": 0.1}]}).rows[0].kid is None


def test_consistency_is_the_distance_between_numbers_of_steps(teacher, measured):
    student = Student.from_teacher(teacher)
    noise = draw_samples_of(teacher, range(8), NOISE_SEED).noise
    one, four = sample(student, noise, 1), sample(student, noise, 4)
    assert measured.consistency["student"]["1,4"] == pytest.approx(float((one - four).square().mean().sqrt()), rel=1e-4)
    assert list(measured.consistency["student"]) == ["1,2", "1,4", "2,4"]


def test_every_metric_of_the_digits(teacher):
    reference = load_images(DataSettings(source="builtin:digits"), (1, 8, 8))
    settings = SETTINGS.model_copy(update={"features": "digits", "samples": 60, "steps": (2,), "ddim_steps": (2,)})
    evaluation = evaluate({"student": Student.from_teacher(teacher)}, teacher, settings, reference, torch.device("cpu"))
    by_name = {row.sampler: row for row in evaluation.rows if row.steps == 2}
    student, ddim = by_name["student"], by_name["teacher-ddim"]
    keys = {"endpoint_error", "frechet", "kid", "inception_score", "precision", "recall"}
    assert set(student.errors) == keys
    # An untrained student makes its teacher's images.
    for key in keys:
        assert getattr(student, key) == pytest.approx(getattr(ddim, key), rel=1e-2, abs=1e-2)
    assert student.frechet > 1
    assert student.memory > 0
    protocol = evaluation.protocol
    assert protocol["frechet_samples"] == 60
    assert protocol["precision_recall"] == "neighbor 3, 60 samples and as many images"
    assert protocol["kid"] == "cubic kernel, mean over 10 subsets of 30, drawn with seed 0"
    assert protocol["reference_sha256"] == hashlib.sha256(reference.fingerprint.encode()).hexdigest()


def test_an_evaluation_during_training_has_quality_and_coverage(monkeypatch, teacher):
    reference = load_images(DataSettings(source="builtin:digits"), (1, 8, 8))
    settings = SETTINGS.model_copy(update={"features": "digits", "samples": 60, "steps": (2,)})
    students, device = {"student": Student.from_teacher(teacher)}, torch.device("cpu")
    (complete,) = Evaluator(EvaluationSpec(teacher, settings, reference, device)).rows_of_students(students)
    (quick,) = Evaluator(EvaluationSpec(teacher, settings, reference, device, quick=True)).rows_of_students(students)
    keys = ("endpoint_error", "frechet", "precision", "recall")
    assert [getattr(quick, key) for key in keys] == [getattr(complete, key) for key in keys]
    assert (quick.kid, quick.inception_score, quick.errors) == (None, None, {})
    # Of many samples a part is compared, which the protocol reports.
    monkeypatch.setattr("fmm_distill.evaluation.evaluator.QUICK_COMPARED", 20)
    evaluator = Evaluator(EvaluationSpec(teacher, settings, reference, device, quick=True))
    assert evaluator.protocol["precision_recall"] == "neighbor 3, 20 samples and as many images"
    (part,) = evaluator.rows_of_students(students)
    assert part.frechet == quick.frechet
    assert (part.precision, part.recall) != (quick.precision, quick.recall)
    # Fractions of 20.
    assert (20 * part.recall) % 1 == pytest.approx(0, abs=1e-9)


def test_features_that_do_not_fit(teacher):
    colored = replace(teacher, event_shape=(3, 32, 32))
    with pytest.raises(UserError, match="digits expects 1 x 8 x 8 images, the teacher generates 3 x 32 x 32"):
        check_evaluation(EvaluationSettings(features="digits"), colored)


class Moments(torch.nn.Module):
    """Three features of gray images of 8x8 pixels."""

    def __init__(self, number: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("number", torch.tensor(number))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.view(-1, 64)
        return torch.stack([rows.mean(1), rows.square().mean(1), rows[:, 27]], 1) * self.number


class Pooled(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3), keepdim=True)


def scripted(module, path):
    torch.jit.script(module).save(str(path))
    return str(path)


def test_features_from_a_file(teacher, tmp_path):
    name = scripted(Moments(), tmp_path / "moments.pt")
    settings = EvaluationSettings(features=name, samples=300, batch_size=128)
    check_evaluation(settings, teacher)
    reference = load_images(DataSettings(source="builtin:digits"), (1, 8, 8))
    images = torch.cat(list(reference.batches(500)))
    seen = open_features(name, (1, 8, 8))(images)
    assert torch.equal(seen.features, Moments()(images))
    assert seen.scores is None
    small = settings.model_copy(update={"samples": 8, "endpoint_samples": 8, "endpoint_solver_steps": 2})
    said = Evaluator(EvaluationSpec(teacher, small, reference, torch.device("cpu"))).protocol["frechet"]
    assert said.startswith("3 features of moments.pt (TorchScript, sha256 ")
    assert hashlib.sha256((tmp_path / "moments.pt").read_bytes()).hexdigest() in said


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (Moments(), (3, 32, 33), r"failed on one image, 1 x 3 x 32 x 33 \(.*shape.*invalid"),
        (Pooled(), (1, 8, 8), r"expected floats of shape \[1, d\] from one image, 1 x 1 x 8 x 8; got \[1, 1, 1, 1\]"),
        (Moments(float("nan")), (1, 8, 8), "expected finite features of a gray image; got nan or inf"),
        (None, (1, 8, 8), "can't be opened .*expected a TorchScript module, as torch.jit.save writes it"),
        ("nothing", (1, 8, 8), "no such file; expected a TorchScript module"),
    ],
    ids=["other images", "other shape", "no numbers", "weights alone", "nowhere"],
)
def test_a_feature_file_that_does_not_fit(teacher, tmp_path, module, shape, message):
    path = tmp_path / "features.pt"
    if module is None:
        torch.save({"weight": torch.ones(3)}, path)
    elif module != "nothing":
        scripted(module, path)
    with pytest.raises(UserError, match=message):
        check_evaluation(EvaluationSettings(features=str(path)), replace(teacher, event_shape=shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"features": "clip"},
            "expected digits, inception, none, or the path of a TorchScript module, which ends",
        ),
        (
            {"features": "none", "reference": "builtin:digits"},
            "evaluation.reference: expected evaluation.features with it",
        ),
        (
            {"features": "digits", "reference": "none"},
            "evaluation.reference: expected a source of images, or null, got none",
        ),
        ({"features": "digits", "samples": 3}, "evaluation.samples: expected at least 4 with features, got 3"),
    ],
)
def test_settings_of_features(settings, message):
    with pytest.raises(ValidationError, match=message):
        EvaluationSettings.model_validate(settings)


@pytest.mark.parametrize("measured", [True, False], ids=["frechet", "endpoint"])
def test_of_several_averages_the_one_that_is_nearest(measured):
    def rows(name, errors, distances):
        found = zip((1, 2), errors, distances, strict=True)
        return [Row(name, n, n, error, distance if measured else None, 0.1) for n, error, distance in found]

    # The slow one has the lower errors, the fast one the lower distances, in the mean and not at every step.
    slow, fast = rows("slow", (0.1, 0.3), (0.2, 0.9)), rows("fast", (0.2, 0.25), (0.5, 0.4))
    teacher = rows("teacher-ddim", (0.0, 0.0), (0.0, 0.0))
    rate, chosen = choose(Evaluation({"noise_seed": 1}, slow + fast + teacher), {"slow": 0.999, "fast": 0.9})
    best, other = (fast, slow) if measured else (slow, fast)
    assert rate == (0.9 if measured else 0.999)
    assert [(row.sampler, row.endpoint_error) for row in chosen.rows] == [
        *(("student", row.endpoint_error) for row in best),
        *((row.sampler, row.endpoint_error) for row in other + teacher),
    ]
    assert chosen.protocol["ema"] == rate
    said = "mean Fréchet distance over the numbers of steps, on these samples (0.999: 0.55, 0.9: 0.45)"
    assert (said in chosen.protocol["ema_chosen"]) == measured
    assert choose(Evaluation({}, slow), {"slow": 0.999})[1].protocol == {"ema": 0.999}


def test_samples_that_are_no_numbers(teacher):
    """A student that broke ends neither the process nor the comparison, and is not the one that is exported."""
    few = {"features": "digits", "steps": (1,), "ddim_steps": (), "dpmsolver_steps": ()}
    settings = SETTINGS.model_copy(update=few)
    images = load_images(DataSettings(source="builtin:digits"), (1, 8, 8))
    broken, said = Student.from_teacher(teacher), []
    with torch.no_grad():
        next(broken.network.parameters()).fill_(torch.nan)
    students = {"broken": broken, "whole": Student.from_teacher(teacher)}
    with logged(said):
        measured = evaluate(students, teacher, settings, images, torch.device("cpu"))
    assert said == ["broken, 1 steps: 16 of 16 samples are non-finite"]
    one, other = measured.rows
    assert all(math.isnan(value) for value in (one.endpoint_error, one.frechet, one.kid, one.recall))
    assert other.frechet > 0
    rate, _ = choose(measured, {"broken": 0.9, "whole": 0.99})
    assert rate == 0.99
