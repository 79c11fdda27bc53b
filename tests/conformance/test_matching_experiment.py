"""The comparison of second stages, from a tiny run to its tables."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from experiments.cifar10 import classifier
from experiments.matching.cases import BUDGETS, CASES, MAP, MAP_PART, map_changes, matching_changes
from experiments.matching.comparison import RECIPE, Comparison
from experiments.matching.peer import EDMNetwork
from experiments.matching.report import markdown
from fmm_distill.config.recipe import load_recipe
from tests.conftest import save_teacher, tiny_unet

TOY = BUDGETS["toy"]
KL = "map + kl"


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """The work folder of the CIFAR-10 experiment, with an untrained teacher and classifier."""
    folder = tmp_path_factory.mktemp("cifar10")
    save_teacher(folder / "teacher", tiny_unet(in_channels=3, out_channels=3))
    pixels = torch.randint(256, (48, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_file({"train": pixels}, folder / "images.safetensors")
    (folder / "classifier").mkdir()
    features, _ = classifier.train(pixels, torch.arange(48) % 10, width=8, epochs=1, batch=16, lr=0.1, precision="fp32")
    torch.jit.trace(features, torch.rand(2, 3, 8, 8)).save(str(folder / "classifier" / "classifier.pt"))
    return folder


def comparison(cifar10, folder, budget=TOY):
    return Comparison(cifar10, folder / "work", folder / "matching.json", budget, None)


def test_every_second_stage_is_a_recipe_on_the_same_map():
    stages = {name: case for name, case in CASES.items() if case.kind == "matching"}
    assert stages
    recipes = [load_recipe(RECIPE, matching_changes(TOY, case, "folder", 3)) for case in stages.values()]
    for recipe in recipes:
        assert (recipe.student.init, recipe.training.steps, recipe.training.seed) == ("folder", 0, 3)
        # Checkpoints would take a part of the seconds.
        assert recipe.training.checkpoint_every >= recipe.matching.steps
    losses = {recipe.matching.loss.model_dump_json() for recipe in recipes}
    assert len(losses) == len(recipes)
    alone = load_recipe(RECIPE, map_changes(TOY, 4, 3))
    assert {recipe.loss for recipe in recipes} == {alone.loss}


def test_rows_resume_and_have_the_seconds_of_the_map(cifar10, tmp_path, capsys):
    comparison(cifar10, tmp_path).run([KL, "FastGen DMD2"], [0])
    assert "it needs --fastgen" in capsys.readouterr().out
    first = json.loads((tmp_path / "matching.json").read_text(encoding="utf-8"))
    assert list(first["students"]) == [MAP, MAP_PART, KL]
    runs = {name: case["seeds"]["0"] for name, case in first["students"].items()}
    for run in runs.values():
        assert list(run["rows"]) == ["1", "2"]
        assert {"frechet", "endpoint", "recall", "precision"} <= run["rows"]["1"].keys()
    assert runs[MAP]["steps"] == TOY.map_steps
    assert runs[KL]["cpu_seconds"] >= runs[MAP]["cpu_seconds"]
    # A step of the map has more than a forward and a backward pass.
    assert runs[KL]["passes"] > 3 < runs[MAP]["passes"]
    again = comparison(cifar10, tmp_path)
    again._case = pytest.fail
    again.run([KL], [0])
    text = markdown(again.results)
    assert text.count(f"| {KL} |") == 5


def test_rows_of_another_budget_are_not_mixed(cifar10, tmp_path):
    comparison(cifar10, tmp_path).run([], [0])
    with pytest.raises(SystemExit, match="another budget"):
        comparison(cifar10, tmp_path, BUDGETS["cpu"])


def test_the_denoiser_of_fastgen_is_the_posterior_mean():
    deviation = 0.5

    def velocity(network, x, t):
        """E[eps - x_0] at x_t of data N(0, deviation^2)."""
        t = t.reshape(-1, 1, 1, 1)
        variance = ((1 - t) * deviation) ** 2 + t**2
        return (t - (1 - t) * deviation**2) / variance * x

    sigma = torch.tensor([0.01, 0.5, 80.0], dtype=torch.float64)
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    expected = deviation**2 / (deviation**2 + sigma**2).reshape(-1, 1, 1, 1) * x
    torch.testing.assert_close(EDMNetwork(nn.Identity(), velocity, nn.Identity())(x, sigma), expected)
