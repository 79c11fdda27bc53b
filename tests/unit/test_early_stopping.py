"""The end of the second stage as a function of its evaluations."""

from __future__ import annotations

import json
import math

import pytest

from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.errors import UserError
from fmm_distill.training.early_stopping import evaluation_settings, is_evaluated, judge, judge_run

RULE = {"metric": "frechet", "calls": None, "patience": 2, "max_endpoint_error": None, "min_recall": None}


def line(step: int, frechet: float | tuple[float, ...], error: float = 0.1, recall: float | None = 0.5) -> dict:
    values = frechet if isinstance(frechet, tuple) else (frechet, frechet)
    rows = [
        {"sampler": "student", "steps": 2**i, "frechet": value, "endpoint_error": error, "recall": recall}
        for i, value in enumerate(values)
    ]
    # The best of all, and no student.
    rows.append({"sampler": "teacher-ddim", "steps": 1, "frechet": 0.0, "endpoint_error": 0.0, "recall": 1.0})
    return {"step": step, "rows": rows}


def lines(*values: float | tuple[float, ...]) -> list[dict]:
    return [line(100 + 10 * i, value) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "patience", "best", "last", "ends"),
    [
        ((0.5,), 2, 100, 100, False),
        ((0.5, 0.4, 0.3), 2, 120, 120, False),
        ((0.5, 0.4, 0.45), 2, 110, 120, False),
        ((0.5, 0.4, 0.45, 0.41), 2, 110, 130, True),
        # What came after the end, of an earlier and longer start, does not count.
        ((0.5, 0.4, 0.45, 0.41, 0.1), 2, 110, 130, True),
        ((0.5, 0.4, 0.45, 0.39, 0.4, 0.4), 2, 130, 150, True),
        ((0.5, 0.6), 1, 100, 110, True),
        # Equal is no improvement.
        ((0.5, 0.5), 1, 100, 110, True),
        ((0.5, 0.6, 0.7, 0.8), None, 100, 130, False),
        ((math.nan, 0.6, math.nan), 2, 110, 120, False),
    ],
)
def test_patience(values, patience, best, last, ends):
    verdict = judge(lines(*values), RULE | {"patience": patience})
    assert (verdict.step, verdict.last, verdict.reason is not None) == (best, last, ends)
    assert verdict.value == pytest.approx(values[(best - 100) // 10], nan_ok=True)
    if ends:
        count = "1 evaluation" if patience == 1 else f"{patience} evaluations"
        assert verdict.reason == f"the mean Fréchet distance over the numbers of calls had not improved for {count}"


def test_the_number_of_calls_and_the_metric_decide():
    found = [line(100, (0.5, 0.1)), line(110, (0.4, 0.3)), line(120, (0.3, 0.4), recall=0.4)]
    best = {
        (metric, calls): judge(found, RULE | {"metric": metric, "calls": calls}).step
        for metric, calls in (("frechet", 1), ("frechet", 2), ("frechet", None), ("recall", None))
    }
    assert best == {("frechet", 1): 120, ("frechet", 2): 100, ("frechet", None): 100, ("recall", None): 100}
    assert judge([line(1, 0.1, recall=0.3), line(2, 0.2, recall=0.6)], RULE | {"metric": "recall"}).value == 0.6
    assert judge([], RULE) is None


@pytest.mark.parametrize(
    ("bound", "reason"),
    [
        ({"max_endpoint_error": 0.2}, "the endpoint error at 1 call was 0.21, above 0.2"),
        ({"min_recall": 0.6}, "the recall at 1 call was 0.59, below 0.6"),
    ],
)
def test_a_bound_ends_the_stage_and_what_is_outside_is_not_chosen(bound, reason):
    values = [(0.1, 0.7), (0.2, 0.6), (0.21, 0.59)]
    found = [line(100 + i, 0.5 - 0.1 * i, error, recall) for i, (error, recall) in enumerate(values)]
    rule = RULE | {"calls": 1, "patience": None} | bound
    assert judge(found[:2], rule).reason is None
    verdict = judge(found, rule)
    assert (verdict.step, verdict.last, verdict.reason) == (101, 102, reason)
    # The map itself is outside: it is exported all the same.
    outside = judge(found[2:], rule)
    assert (outside.step, outside.reason) == (102, reason)


def recipe_of(**changes: object) -> Recipe:
    matching = {"steps": 10, "critic": {"warmup_steps": 7}, "evaluate_every": 4}
    evaluation = {"every": changes.pop("every", 0), "features": "digits", "steps": [1, 2]}
    settings = {"training": {"steps": 20}, "evaluation": evaluation, "matching": matching | changes}
    return parse(settings, "recipe")


def evaluated(recipe: Recipe) -> list[int]:
    return [step for step in range(recipe.total_steps + 1) if is_evaluated(recipe, step)]


def test_evaluated_steps():
    # The map at the start of the stage, no step of the critic alone; the end has the final evaluation.
    assert evaluated(recipe_of()) == [20, 31, 35]
    assert evaluated(recipe_of(every=8)) == [8, 16, 20, 31, 35]
    assert evaluated(recipe_of(every=5, evaluate_every=0)) == [5, 10, 15, 20, 32]
    assert evaluated(recipe_of(evaluate_every=0)) == []
    assert evaluated(recipe_of(stop={})) == [20, 31, 35, 37]
    plain = parse({"training": {"steps": 20}, "evaluation": {"every": 5}}, "recipe")
    assert evaluated(plain) == [5, 10, 15]


@pytest.mark.parametrize(
    ("matching", "evaluation", "message"),
    [
        ({"evaluate_every": 0}, {}, "matching.stop: expected evaluations of the second stage, got none; try --set"),
        ({}, {"features": "none"}, "matching.stop: metric: frechet: expected evaluation.features with it, got none"),
        (
            {"stop": {"metric": "endpoint_error", "min_recall": 0.4}},
            {"features": "none"},
            "matching.stop: min_recall: 0.4: expected evaluation.features with it, got none",
        ),
        ({"stop": {"calls": 4}}, {}, "matching.stop.calls: expected one of evaluation.steps 1, 2, got 4"),
    ],
)
def test_a_rule_without_its_numbers_is_refused(matching, evaluation, message):
    settings = {"evaluation": {"features": "digits", "steps": [1, 2]} | evaluation}
    settings["matching"] = {"steps": 10, "evaluate_every": 4, "stop": {}} | matching
    with pytest.raises(UserError) as refusal:
        parse(settings, "recipe")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    # The endpoint error needs no features.
    stop = {"metric": "endpoint_error", "calls": 2, "max_endpoint_error": 0.2}
    parse(settings | {"matching": settings["matching"] | {"stop": stop, "evaluate_every": 4}}, "recipe")


def test_a_run_is_judged_by_the_evaluations_of_its_stage_and_settings(tmp_path):
    recipe = recipe_of(stop={"patience": 1})
    settings = evaluation_settings(recipe)
    assert judge_run(recipe, tmp_path) is None
    found = [line(8, 0.1), line(20, 0.5), line(31, 0.3), line(35, 0.4)]
    written = [one | {"settings": settings} for one in found]
    written.insert(2, line(20, 0.01) | {"settings": settings | {"samples": 9}})
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in written) + '{"step": 37')
    verdict = judge_run(recipe, tmp_path)
    assert (verdict.step, verdict.last, verdict.since) == (31, 35, 1)
    assert judge_run(recipe_of(), tmp_path) is None
