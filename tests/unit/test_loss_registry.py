"""Losses of other distributions: what the registry takes, what it refuses, and how it says so."""

from __future__ import annotations

import json
import logging
from typing import ClassVar, Literal

import pytest

from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.errors import UserError
from fmm_distill.losses import Jump, Loss, registered_losses, squared_norm
from fmm_distill.losses.registry import BUILT_IN, find_loss, incomplete, reload_losses

MODULE = """
from typing import ClassVar, Literal

from fmm_distill.losses import Loss, squared_norm


class Plain(Loss):
    summary: ClassVar[str] = "a loss of another package, for the tests of the registry"
    paper: ClassVar[str] = "none"

    name: Literal["plain"] = "plain"
    factor: float = 1.0

    def __call__(self, flow_map, velocity, jump):
        return self.factor * squared_norm(flow_map.mean_velocity(jump.x, jump.t, jump.r, jump.cond))


class Copy(Plain):
    name: Literal["lagrangian"] = "lagrangian"
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs distributions with entry points; the registry is read again after each and at the end."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plain_loss.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "failing_loss.py").write_text("raise RuntimeError('no such device')", encoding="utf-8")

    def add(distribution: str, *entries: str) -> None:
        about = tmp_path / f"{distribution}-1.5.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n", encoding="utf-8"
        )
        (about / "entry_points.txt").write_text("[fmm_distill.losses]\n" + "\n".join(entries), encoding="utf-8")
        reload_losses()

    yield add
    reload_losses()


def refused(**settings):
    with pytest.raises(UserError) as caught:
        parse(settings, "here")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_entry_point_is_a_loss_like_the_others(installed, caplog):
    installed("plain-loss", "plain = plain_loss:Plain")
    assert list(registered_losses()) == [*BUILT_IN, "plain"]
    extra = [{"loss": {"name": "plain", "factor": 3}, "fraction": 0.5}]
    stages = [{"loss": {"name": "plain"}, "fraction": 0.5}]
    recipe = parse({"loss": {"name": "plain", "factor": 2}, "extra_losses": extra, "stages": stages}, "here")
    assert [loss.factor for loss in recipe.losses] == [2.0, 3.0, 1.0]
    assert recipe.loss_names == "plain, then plain and plain"
    assert parse(json.loads(recipe.model_dump_json()), "here") == recipe
    assert "here: loss.factr is not a setting of plain, did you mean loss.factor?" in refused(
        loss={"name": "plain", "factr": 2}
    )
    assert "here: loss.factor: Input should be a valid number" in refused(loss={"name": "plain", "factor": "much"})
    assert caplog.messages == []


def test_every_registered_loss_is_in_the_schema_of_a_recipe(installed):
    installed("plain-loss", "plain = plain_loss:Plain")
    schemas = Recipe.model_json_schema()["properties"]["loss"]["oneOf"]
    assert [schema["properties"]["name"]["const"] for schema in schemas] == list(registered_losses())


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("failing = failing_loss:Loss", "failing_loss:Loss) cannot be imported: RuntimeError: no such device"),
        ("failing = no_such_module:Loss", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("failing = plain_loss:NoSuchClass", "cannot be imported: AttributeError"),
        ("failing = plain_loss:squared_norm", "expected a subclass of fmm_distill.losses.Loss, got <function"),
        ("failing = plain_loss:Loss", "expected a class that defines __call__"),
        ("failing = plain_loss:Plain", 'expected the field name: Literal["failing"] = "failing"'),
    ],
)
def test_a_broken_entry_point_names_its_distribution(installed, caplog, entry, reason):
    installed("broken-loss", entry)
    with caplog.at_level(logging.WARNING):
        assert "failing" not in registered_losses()
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("loss failing of broken-loss 1.5")
    assert reason in caplog.messages[0]
    # The others train as ever; whoever names it reads why it is not there.
    assert parse({"loss": {"name": "eulerian"}}, "here").loss.name == "eulerian"
    assert "here: loss: loss failing of broken-loss 1.5" in refused(loss={"name": "failing"})
    assert reason in refused(loss={"name": "failing"})


def test_two_distributions_with_one_name_are_named_both(installed, caplog):
    installed("plain-loss", "plain = plain_loss:Plain")
    installed("other-loss", "plain = plain_loss:Plain")
    expected = "loss plain is registered by other-loss 1.5 and by plain-loss 1.5; uninstall all but one of them"
    assert expected in refused(loss={"name": "plain"})
    assert caplog.messages == [expected]


def test_the_name_of_a_loss_of_this_package_is_taken(installed, caplog):
    installed("plain-loss", "lagrangian = plain_loss:Copy")
    assert registered_losses()["lagrangian"].__module__ == "fmm_distill.losses.lagrangian"
    assert caplog.messages == [
        "loss lagrangian of plain-loss 1.5: the name is one of fmm_distill's own losses; rename the loss"
    ]


class Mine(Loss):
    """A loss that is registered nowhere."""

    summary: ClassVar[str] = "a loss of a script"
    paper: ClassVar[str] = "none"

    name: Literal["mine"] = "mine"
    """Name of the loss."""
    factor: float = 1.0
    """Factor."""

    def __call__(self, flow_map, velocity, jump: Jump):
        return self.factor * squared_norm(flow_map.mean_velocity(jump.x, jump.t, jump.r, jump.cond))


@pytest.fixture
def unknown():
    reload_losses()
    yield
    reload_losses()


def test_a_recipe_takes_an_instance_anywhere(unknown):
    message = refused(loss={"name": "mine"})
    assert "here: loss.name: expected a loss of fmm-distill losses, got 'mine'" in message
    assert "install the package that registers it, with an entry point in fmm_distill.losses" in message
    extra, stages = [{"loss": Mine(factor=2), "fraction": 0.5}], [{"loss": Mine(factor=3), "fraction": 0.5}]
    recipe = Recipe.model_validate({"loss": Mine(), "extra_losses": extra, "stages": stages})
    assert [loss.factor for loss in recipe.losses] == [1.0, 2.0, 3.0]
    again = Recipe.model_validate(Recipe().model_dump() | {"loss": Mine(factor=5)})
    assert again.loss == Mine(factor=5)
    # A resumed run reads the recipe that it wrote.
    assert parse(again.model_dump(mode="json"), "here") == again
    assert find_loss("mine") is Mine
    assert "mine" not in registered_losses()


def test_an_instance_with_the_name_of_another_loss_is_refused():
    class Lagrangian(Mine):
        name: Literal["lagrangian"] = "lagrangian"

    message = refused(loss=Lagrangian())
    assert "Lagrangian has the name of fmm_distill.losses.lagrangian.Lagrangian: give it another name" in message


def test_what_makes_a_class_incomplete():
    class NoSummary(Loss):
        name: Literal["x"] = "x"
        paper: ClassVar[str] = "none"

        def __call__(self, flow_map, velocity, jump):
            return jump.t

    class Required(Mine):
        name: Literal["x"] = "x"
        strength: float

    assert incomplete(Mine, "mine") is None
    assert incomplete(NoSummary, "x") == "expected the class attribute summary, a text"
    assert incomplete(Required, "x") == "expected a default for every field, and strength has none"
    assert incomplete(Mine(), "mine").startswith("expected a subclass of fmm_distill.losses.Loss, got ")


@pytest.mark.parametrize(
    ("settings", "path", "expected"),
    [
        ({"metric": {}}, "metric", "distance"),
        ({"pairs": {}}, "pairs", "time_sampling"),
        ({"also": []}, "also", "extra_losses"),
        ({"before": []}, "before", "stages"),
        (
            {"extra_losses": [{"loss": {"name": "eulerian"}, "share": 0.5}]},
            "extra_losses.0.share",
            "extra_losses.fraction",
        ),
        (
            {"stages": [{"loss": {"name": "eulerian"}, "fraction": 0.5, "pairs": {}}]},
            "stages.0.pairs",
            "stages.time_sampling",
        ),
    ],
)
def test_an_old_key_names_the_new_one(settings, path, expected):
    assert f"{path} is not a setting; expected its new name, {expected}" in refused(**settings)


def test_an_old_key_of_a_loss_names_the_new_one():
    message = refused(loss={"name": "lagrangian", "stop": "target"})
    assert "loss.stop is not a setting of lagrangian; expected its new name, loss.stop_gradient" in message
    extra = [{"loss": {"name": "eulerian", "stop": "none"}, "fraction": 0.5}]
    assert "extra_losses.0.loss.stop is not a setting of eulerian; expected its new name" in refused(extra_losses=extra)
    # No loss without such a setting is told of it.
    assert "stop_gradient" not in refused(loss={"name": "progressive", "stop": "none"})
