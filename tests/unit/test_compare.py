"""Two evaluations: what moved beyond its noise, and for the worse."""

from __future__ import annotations

import json
import math

import pytest

from fmm_distill.errors import UserError
from fmm_distill.evaluation.compare import compare, format_comparison, read_result
from fmm_distill.evaluation.result import Evaluation, Row

ERRORS = {"endpoint_error": 0.01, "frechet": 0.1, "recall": 0.02}


def result(endpoint=0.5, frechet=3.0, recall=0.6, *, sampler="student", steps=4, seconds=0.1, errors=ERRORS):
    return Evaluation({"a": 1}, [Row(sampler, steps, 4, endpoint, frechet, seconds, recall=recall, errors=errors)])


def moved(before, after):
    return {change.column.key: change.worse for change in compare(before, after).changes if change.moved}


def test_within_the_noise_nothing_has_moved():
    # Three standard errors of the difference are 0.0424, 0.424 and 0.0849.
    assert moved(result(), result(0.54, 3.4, 0.52)) == {}
    assert moved(result(), result(0.545, 3.4, 0.52)) == {"endpoint_error": True}
    assert moved(result(), result(0.45, 3.5, 0.5)) == {"endpoint_error": False, "frechet": True, "recall": True}
    assert moved(result(), result(recall=0.7)) == {"recall": False}


def test_worse_is_only_what_is_judged():
    assert compare(result(), result(0.6)).worse
    assert not compare(result(), result(0.4)).worse
    # Clocks are the machine's, and the teacher is no student.
    assert not compare(result(), result(seconds=10.0)).worse
    teacher = {"sampler": "teacher-ddim"}
    assert not compare(result(**teacher), result(0.6, **teacher)).worse
    assert moved(result(**teacher), result(0.6, **teacher)) == {"endpoint_error": True}
    named = {"sampler": "teachers-and-students/mine"}
    assert compare(result(**named), result(0.6, **named)).worse


def test_without_errors_any_difference_counts_but_rounding():
    assert moved(result(errors={}), result(0.5 + 1e-9, errors={})) == {}
    assert moved(result(errors={}), result(0.501, errors={})) == {"endpoint_error": True}


def test_no_number_is_worse_than_any():
    none = result(math.nan, errors=ERRORS | {"endpoint_error": math.nan})
    assert moved(result(), none) == {"endpoint_error": True}
    assert moved(none, result()) == {"endpoint_error": False}
    assert moved(none, none) == {}


def test_rows_that_are_missing_are_named():
    both = Evaluation({"a": 1}, [*result().rows, *result(steps=8).rows])
    comparison = compare(both, result())
    assert comparison.missing == ("student, 8",)
    assert "missing in the second: student, 8" in format_comparison(comparison)
    comparison = compare(result(), result(frechet=None))
    assert comparison.missing == ("student, 4: Fréchet",)
    with pytest.raises(UserError, match="expected rows in common, got first student at 4, second student at 8"):
        compare(result(), result(steps=8))


def test_report_shows_intervals_and_verdicts():
    lines = format_comparison(compare(result(), result(0.6, 2.0))).splitlines()
    (endpoint,) = [line for line in lines if "endpoint error" in line]
    assert "0.5000 [0.4804, 0.5196]" in endpoint
    assert "0.6000 [0.5804, 0.6196]  worse" in endpoint
    assert lines[2].endswith("better")
    assert lines[-1] == "student: 1 value is worse"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; expected a file of fmm-distill evaluate --output"),
        ("{", "can't be read"),
        ("[]", "can't be read"),
        ('{"rows": []}', "can't be read .KeyError: 'protocol'"),
        ('{"protocol": {}, "rows": [{"sampler": "student"}]}', "can't be read"),
    ],
)
def test_files_that_are_no_evaluation(tmp_path, text, message):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_result(file)
    file.write_text(json.dumps(result().to_json()))
    assert read_result(file) == result()
