"""The comparison of both kinds of students, from a tiny run to its tables."""

from __future__ import annotations

import json

import pytest

from experiments import kinds
from experiments.kinds import CASES, Comparison, markdown, read

TINY = [
    "training.steps=2",
    "training.batch_size=16",
    "evaluation.samples=8",
    "evaluation.endpoint_samples=4",
    "evaluation.endpoint_solver_steps=2",
]
NAMES = ["embedded", "scaled, rank 16"]


@pytest.fixture
def few_calls(monkeypatch):
    monkeypatch.setattr(kinds, "CALLS", (1, 2))


def comparison(folder, *changes):
    return Comparison("digits", "builtin:digits", [*TINY, *changes], folder / "work", folder / "kinds.json")


def test_every_case_is_a_recipe_of_its_kind(tmp_path):
    recipes = {name: comparison(tmp_path).recipe_of(name, 3) for name in CASES}
    assert recipes
    for name, recipe in recipes.items():
        assert recipe.student.kind == name.partition(",")[0]
        assert recipe.training.seed == 3
    # No two cases have the same settings.
    assert len({recipe.to_yaml() for recipe in recipes.values()}) == len(recipes)


def test_a_finished_row_is_not_measured_again(tmp_path, few_calls, monkeypatch):
    comparison(tmp_path).run(NAMES, [0])
    first = read(tmp_path / "kinds.json")
    assert list(first["students"]) == NAMES
    for case in first["students"].values():
        assert list(case["seeds"]["0"]["rows"]) == ["1", "2"]
    trained = []
    train = kinds.train
    monkeypatch.setattr(kinds, "train", lambda recipe, folder: trained.append(recipe) or train(recipe, folder))
    comparison(tmp_path).run(NAMES, [0, 1])
    assert [recipe.training.seed for recipe in trained] == [1, 1]
    second = read(tmp_path / "kinds.json")
    assert second["teacher"] == first["teacher"]
    for name in NAMES:
        assert second["students"][name]["seeds"]["0"] == first["students"][name]["seeds"]["0"]
        assert second["students"][name]["seeds"]["1"]["rows"] != first["students"][name]["seeds"]["0"]["rows"]


def test_rows_of_other_settings_are_not_mixed(tmp_path, few_calls):
    comparison(tmp_path).run([], [])
    with pytest.raises(SystemExit, match="other settings"):
        comparison(tmp_path, "training.steps=3")


def results(*endpoints):
    rows = {"1": {"endpoint_error": 0.5, "frechet": 12.34}, "2": {"endpoint_error": 0.25, "frechet": 1.0}}
    seeds = {
        str(seed): {
            "parameters": 1234,
            "cpu_seconds": None if seed else 7.4,
            "rows": {n: {"endpoint_error": value, "frechet": 0.4} for n in ("1", "2")},
        }
        for seed, value in enumerate(endpoints)
    }
    return {"teacher": {"teacher-ddim": rows}, "students": {"scaled": {"changes": [], "seeds": seeds}}}


def test_tables_have_the_mean_of_the_seeds_and_its_standard_error(few_calls):
    text = markdown(json.loads(json.dumps(results(0.1, 0.12))))
    assert "| teacher, DDIM | 0.500 | 0.250 |" in text
    assert "| scaled | 0.110 ± 0.010 | 0.110 ± 0.010 |" in text
    assert "| teacher, DDIM | 12.3 | 1.000 |" in text
    assert "| scaled | 1,234 | 7 | 2 |" in text
    assert "| scaled | 0.100 | 0.100 |" in markdown(results(0.1))


def test_tables_have_the_quantities_that_were_measured(few_calls):
    plain = results(0.1)
    for rows in (*plain["teacher"].values(), plain["students"]["scaled"]["seeds"]["0"]["rows"]):
        for row in rows.values():
            del row["frechet"]
    text = markdown({"first": plain, "second": results(0.2)})
    assert text.index("first") < text.index("| scaled | 0.100 | 0.100 |") < text.index("second")
    assert text.index("second") < text.index("Fréchet") < text.index("| scaled | 0.400 | 0.400 |")
