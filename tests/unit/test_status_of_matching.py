"""``fmm-distill status`` of a second stage: the steps that the critic has skipped, and its health."""

from __future__ import annotations

import pytest

from fmm_distill.config.recipe import Recipe
from fmm_distill.run.status import RunFiles, describe
from fmm_distill.training.nonfinite import OF_CRITIC

REAL = {"name": "flow_generator_matching", "real": {}}


def lines_of(folder, loss, *skipped):
    """The lines of a run whose critic is behind the teacher."""
    matching = {"steps": 9, "critic": {"warmup_steps": 0}, "loss": loss}
    settings = {"training": {"steps": 1}, "data": "images", "teacher": "t", "matching": matching}
    recipe = Recipe.model_validate(settings).model_dump(mode="json")
    name = recipe["matching"]["loss"]["name"]
    errors = {"loss": 1.0, "critic_loss": 2.0, "teacher_loss": 1.0, "images_per_second": 1.0}
    records = [{"step": 1 + i, "phase": name} | errors | one for i, one in enumerate(skipped)]
    lines = describe(RunFiles(folder, recipe, records, [], None, None)).splitlines()
    return {line[:12].strip(): line[12:] for line in lines}


def test_steps_that_are_not_finite_are_counted_and_those_of_a_gradient_scaler_are_not(tmp_path):
    skipped = [{"skipped": one} for one in (OF_CRITIC, [], "the gradient scaler lowers its scale")]
    found = lines_of(tmp_path, {"name": "distribution_matching"}, {}, *skipped)
    assert found["skipped"] == "2 non-finite steps"


@pytest.mark.parametrize(
    ("loss", "judgment"),
    [
        ({"name": "flow_generator_matching"}, "behind the teacher: its gradient is not to be trusted yet"),
        (REAL, "learns from images too, so that its error decides nothing"),
    ],
)
def test_a_critic_of_images_too_is_not_judged(tmp_path, loss, judgment):
    found = lines_of(tmp_path, loss, {})
    assert found["critic"] == f"{judgment} (error 2 on samples, of the teacher 1; mean of 1 steps)"
