"""The second stage in the manifest and on the card of a student."""

from __future__ import annotations

import json

import pytest

from fmm_distill.config.recipe import parse
from fmm_distill.export.second_stage import check_facts, describe_stage, facts_of
from fmm_distill.io.reading import BrokenFileError
from fmm_distill.losses.matching_registry import matching_losses
from fmm_distill.training.early_stopping import evaluation_settings

STEPS = (1, 2)
PROTOCOL = {"precision_recall": "neighbor 3, 64 samples and as many images"}
STOP = {"calls": 1, "patience": 1}


def recipe_of(**matching: object):
    settings = {"steps": 10, "critic": {"warmup_steps": 7}, "evaluate_every": 4} | matching
    evaluation = {"features": "digits", "steps": STEPS}
    return parse({"training": {"steps": 20}, "evaluation": evaluation, "matching": settings}, "recipe")


def row(steps: int, frechet: float, error: float, recall: float) -> dict:
    numbers = {"frechet": frechet, "endpoint_error": error, "recall": recall, "precision": None}
    return {"sampler": "student", "steps": steps, "calls": steps} | numbers


def write_evaluations(folder, recipe, frechet: tuple[float, ...]) -> None:
    lines = [
        {
            "step": step,
            "rows": [row(n, value / n, 0.1 * (1 + i), 0.5) for n in STEPS],
            "settings": evaluation_settings(recipe),
            "protocol": PROTOCOL,
        }
        for i, (step, value) in enumerate(zip((20, 31, 35, 37), frechet, strict=False))
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("name", sorted(matching_losses()))
def test_facts_are_of_the_loss_that_was_used(name):
    facts = facts_of(recipe_of(loss={"name": name}, fraction=0.5), None, 37)
    assert (facts["loss"], facts["paper"]) == (name, matching_losses()[name].paper)
    assert (facts["steps"], facts["warmup_steps"], facts["map_steps"]) == (10, 7, 20)
    text = describe_stage(facts, None)
    assert f"distribution matching ({name}, {facts['paper']})" in text
    assert "for 10 steps, after 7 steps of its critic alone" in text
    assert "A fraction of 0.5 of each batch was matched; the losses of the map had the rest" in text
    assert "These samples were those of 1, 2, 4, 8 steps." in text
    assert "may be farther from the endpoint of the teacher's ODE" in text
    assert "Values of the map" not in text


def test_a_map_has_no_second_stage():
    assert facts_of(parse({}, "recipe"), None, 1000) is None
    # An export before the stage, and one in the warm-up of the critic.
    assert facts_of(recipe_of(), None, 20) is None
    facts = facts_of(recipe_of(), None, 25)
    assert facts["steps"] == 0
    assert "of which no step is in this student" in describe_stage(facts, None)


def test_the_values_of_the_map_are_next_to_those_of_the_student(tmp_path):
    recipe = recipe_of()
    write_evaluations(tmp_path, recipe, (0.5, 0.3))
    facts = facts_of(recipe, tmp_path, 37)
    check_facts("student.json", json.loads(json.dumps(facts)), "export again")
    assert facts["end"] is None
    evaluation = {"rows": [row(1, 0.2, 0.4, 0.6), row(2, 0.1, 0.3, 0.7)], "protocol": PROTOCOL}
    lines = describe_stage(facts, evaluation).splitlines()
    assert lines[-4:] == [
        "| steps | endpoint error | Fréchet distance | recall |",
        "|---|---|---|---|",
        "| 1 | 0.1000 → 0.4000 | 0.500 → 0.200 | 0.500 → 0.600 |",
        "| 2 | 0.1000 → 0.3000 | 0.250 → 0.100 | 0.500 → 0.700 |",
    ]
    # A recall of more samples is another quantity.
    other = evaluation | {"protocol": {"precision_recall": "neighbor 3, 9999 samples and as many images"}}
    assert describe_stage(facts, other).splitlines()[-1] == "| 2 | 0.1000 → 0.3000 | 0.250 → 0.100 |"


def test_early_stopping_is_disclosed(tmp_path):
    recipe = recipe_of(stop=STOP)
    write_evaluations(tmp_path, recipe, (0.5, 0.3, 0.4))
    facts = facts_of(recipe, tmp_path, 31)
    assert facts["steps"] == 4
    assert facts["end"] == (
        "ended after 8 of its 10 steps: the Fréchet distance at 1 call had not improved for 1 evaluation (early "
        "stopping); exported is the average after 4 steps, with the best Fréchet distance at 1 call"
    )
    assert f"The second stage {facts['end']}." in describe_stage(facts, None)
    assert "slightly too good" in describe_stage(facts, None)
    # The newest checkpoint of a run that is not finished.
    assert facts_of(recipe, tmp_path, 35)["end"] is None
    # The newest checkpoint is the best, and the stage continues.
    write_evaluations(tmp_path, recipe, (0.5, 0.3))
    assert facts_of(recipe, tmp_path, 31)["end"] is None
    # The map was the best.
    write_evaluations(tmp_path, recipe, (0.5, 0.6))
    facts = facts_of(recipe, tmp_path, 20)
    assert facts["steps"] == 0
    assert facts["end"].endswith("exported is the map before it, with the best Fréchet distance at 1 call")
    assert "Values of the map" not in describe_stage(facts, None)
    # All steps, with a bound that none crossed.
    recipe = recipe_of(stop={"patience": None, "max_endpoint_error": 0.9})
    write_evaluations(tmp_path, recipe, (0.5, 0.4, 0.3, 0.2))
    assert facts_of(recipe, tmp_path, 37)["end"] == (
        "had all its 10 steps; exported is the average after 10 steps, with the best mean Fréchet distance over the "
        "numbers of calls within the bounds"
    )


def test_facts_of_another_form_are_refused():
    facts = facts_of(recipe_of(), None, 37)
    for key in facts:
        with pytest.raises(BrokenFileError, match=key):
            check_facts("student.json", {name: value for name, value in facts.items() if name != key}, "export again")
    with pytest.raises(BrokenFileError, match="before 0"):
        check_facts("student.json", facts | {"before": [{"steps": "1"}]}, "export again")
