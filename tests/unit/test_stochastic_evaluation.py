"""The evaluation of a student with fresh noise in its steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fmm_distill.config.recipe import parse
from fmm_distill.config.settings import DataSettings, EvaluationSettings
from fmm_distill.core.draws import sample_generator
from fmm_distill.data.samples import load_images
from fmm_distill.errors import UserError
from fmm_distill.evaluation.compare import compare
from fmm_distill.evaluation.draws import NOISE_SEED, draw_samples_of
from fmm_distill.evaluation.evaluator import EvaluationSpec, Evaluator
from fmm_distill.evaluation.gallery import Gallery
from fmm_distill.evaluation.protocol import differences
from fmm_distill.evaluation.result import choose
from fmm_distill.evaluation.samplers import of_students
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from tests.logs import logged

SETTINGS = EvaluationSettings(
    steps=(2, 3),
    ddim_steps=(2,),
    dpmsolver_steps=(),
    samples=12,
    endpoint_samples=6,
    endpoint_solver_steps=4,
    features="digits",
    stochasticity=0.5,
    batch_size=5,
)
CPU = torch.device("cpu")


@pytest.fixture
def student(teacher):
    return Student.from_teacher(teacher)


def evaluator(teacher, **changes):
    images = load_images(DataSettings(source="builtin:digits"), (1, 8, 8))
    return Evaluator(EvaluationSpec(teacher, SETTINGS.model_copy(update=changes), images, CPU))


def evaluated(teacher, student, **changes):
    one = evaluator(teacher, **changes)
    rows = [*one.rows_of_students({"student": student}), *one.rows_of_teacher()]
    return SimpleNamespace(evaluator=one, rows=rows, protocol=one.protocol, consistency=one.consistency)


def test_its_rows_have_no_number_that_compares_single_samples(teacher, student):
    with logged([]) as lines:
        found = evaluated(teacher, student)
    rows = {(row.sampler, row.steps): row for row in found.rows}
    assert set(rows) == {("student", 2), ("student", 3), ("teacher-ddim", 2)}
    assert all((row.endpoint_error is None) == (row.sampler == "student") for row in found.rows)
    assert all(row.frechet is not None and row.recall is not None for row in found.rows)
    assert found.consistency == {}
    assert found.protocol["stochasticity"] == 0.5
    (line,) = [line for line in lines if "stochasticity" in line]
    assert line.startswith("stochasticity 0.5: the student's rows have no endpoint error")
    # Without noise, as ever.
    with logged([]) as lines:
        plain = evaluated(teacher, student, stochasticity=0.0)
    assert all(row.endpoint_error is not None for row in plain.rows)
    assert list(plain.consistency["student"]) == ["2,3"]
    assert plain.protocol["stochasticity"] is None
    assert not any("stochasticity" in line for line in lines)


def test_a_sample_depends_on_the_seed_and_its_number_alone(teacher, student):
    found = evaluated(teacher, student)
    noise = draw_samples_of(teacher, range(6), NOISE_SEED).noise
    # Not the stream of the first noise, or the fresh one would be that again.
    fresh = [sample_generator(NOISE_SEED, number, stream=2) for number in range(6)]
    own = sample(student, noise, 3, stochasticity=0.5, generator=fresh)
    torch.testing.assert_close(found.evaluator.samples["student", 3], own, rtol=1e-5, atol=1e-5)
    other = evaluated(teacher, student, batch_size=64)
    torch.testing.assert_close(other.evaluator.samples["student", 3], own, rtol=1e-5, atol=1e-5)
    for one, two in zip(found.rows, other.rows, strict=True):
        assert one.frechet == pytest.approx(two.frechet, rel=1e-4)
    assert differences(found.protocol, other.protocol) == {}
    first = torch.randn(1, 1, 8, 8, generator=sample_generator(NOISE_SEED, 0, stream=2))
    assert not torch.equal(noise[:1], first)


def test_cached_samples_of_another_strength_are_others(teacher, student):
    one = evaluator(teacher)
    keys = {one._key(*of_students({"student": student}, (2,), stochasticity=s)) for s in (0.0, 0.5, 1.0)}
    assert len(keys) == 3


def test_results_of_two_strengths_are_not_compared(teacher, student):
    noisy, plain = evaluated(teacher, student), evaluated(teacher, student, stochasticity=0.0)
    assert differences(plain.protocol, noisy.protocol) == {"stochasticity": (None, 0.5)}
    # A result of a version without the setting is one without noise.
    old = {key: value for key, value in plain.protocol.items() if key != "stochasticity"}
    assert differences(old, plain.protocol) == {}
    with pytest.raises(UserError, match=r"got a difference in stochasticity: first None, second 0\.5"):
        compare(plain, noisy)


def test_the_average_of_the_lowest_distance_is_chosen(teacher, student):
    found = evaluated(teacher, student)
    assert choose(SimpleNamespace(**vars(found)), {"student": 0.98})[0] == 0.98


def test_pictures(teacher, student):
    gallery = Gallery(teacher, 2, 3, 0, CPU)
    plain, noisy, again = (gallery.rows(student, (1, 3), s) for s in (0.0, 0.5, 0.5))
    assert list(plain) == list(noisy) == ["teacher's ODE", "student, 1 step", "student, 3 steps"]
    same = {name: torch.equal(plain[name], noisy[name]) for name in plain}
    assert same == {"teacher's ODE": True, "student, 1 step": True, "student, 3 steps": False}
    assert all(torch.equal(noisy[name], again[name]) for name in noisy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"stochasticity": -1, "features": "digits"},
            "evaluation.stochasticity: Input should be greater than or equal",
        ),
        ({"stochasticity": float("inf"), "features": "digits"}, "evaluation.stochasticity: Input should be a finite"),
        ({"stochasticity": 0.5}, "evaluation.stochasticity: expected evaluation.features with it"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(UserError) as caught:
        parse({"evaluation": settings}, "here")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
