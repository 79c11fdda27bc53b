"""Inputs are told by their content, not by how their path was typed."""

from __future__ import annotations

import os
import shutil

import pytest

from fmm_distill.config.recipe import Recipe
from fmm_distill.errors import UserError
from fmm_distill.run import inputs
from fmm_distill.run.inputs import check_inputs, contents, same_content, with_paths


@pytest.fixture
def place(tmp_path, teacher_folder, monkeypatch):
    shutil.copytree(teacher_folder, tmp_path / "t")
    shutil.copytree(teacher_folder, tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "t", target_is_directory=True)
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"image %d" % i)
    for name in ("f.pt", "p.txt", "p.csv"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("typed", ["t", "./t", "t/", "../{here}/t", "{place}/t", "{place}/t/", "link", "a/../t"])
def test_one_folder_typed_in_many_ways_is_one_recipe(place, typed):
    typed = typed.format(here=place.name, place=place)
    found = with_paths(Recipe.model_validate({"teacher": typed, "guidance": {"weaker": typed, "scale": 2}}))
    assert found.teacher == found.guidance.weaker == str((place / "t").resolve())


def test_every_path_of_a_recipe_is_absolute(place):
    data = {"source": "./images"}
    found = with_paths(
        Recipe.model_validate(
            {
                "teacher": "t",
                "data": data,
                "prompts": {"file": "p.txt"},
                "evaluation": {"features": "f.pt", "reference": data, "clip": "t"},
            }
        )
    )
    root = place.resolve()
    assert found.data.source == found.evaluation.reference.source == str(root / "images")
    assert found.prompts.file == str(root / "p.txt")
    assert (found.evaluation.features, found.evaluation.clip) == (str(root / "f.pt"), str(root / "t"))
    found = with_paths(Recipe.model_validate({"prompts": {"dataset": "p.csv"}}))
    assert found.prompts.dataset == str(root / "p.csv")


def test_ids_and_words_stay(place):
    for name in ("none", "teacher", "digits"):
        (place / name).mkdir()
    recipe = Recipe.model_validate({"teacher": "google/ddpm-cifar10-32", "data": "teacher"})
    assert with_paths(recipe) == recipe
    recipe = Recipe.model_validate({"teacher": "builtin:digits", "evaluation": {"features": "digits"}})
    assert with_paths(recipe) == recipe


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def overwrite(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("name", [WEIGHTS, "scheduler/scheduler_config.json", "model_index.json"])
def test_an_overwritten_teacher_is_noticed(place, monkeypatch, name, large):
    """With the size and the time of the content that it had, and where digests of large files are not made again."""
    if large:
        monkeypatch.setattr(inputs, "_LARGE", 0)
    for key, settings in (
        ("teacher", {"teacher": "t"}),
        ("guidance.weaker", {"guidance": {"weaker": "t", "scale": 2}}),
    ):
        recipe = with_paths(Recipe.model_validate(settings))
        before = contents(recipe)
        check_inputs(place, before, contents(recipe, before))
        overwrite(place / "t" / name)
        with pytest.raises(UserError, match=f"{key}: .*{name} has changed"):
            check_inputs(place, before, contents(recipe, before))


def test_a_moved_teacher_is_the_same_and_another_is_not(place):
    before, after = (contents(with_paths(Recipe(teacher=name))) for name in ("t", "a/b"))
    assert same_content("teacher", before, after)
    (place / "a" / "b" / WEIGHTS).unlink()
    after = contents(with_paths(Recipe(teacher="a/b")))
    assert not same_content("teacher", before, after)
    with pytest.raises(UserError, match=f"{WEIGHTS} is missing"):
        check_inputs(place, before, after)


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("change", ["removed", "added", "grown", "renamed"])
def test_other_images_are_noticed(place, monkeypatch, change, large):
    if large:
        monkeypatch.setattr(inputs, "_LARGE", 0)
    recipe = with_paths(Recipe.model_validate({"data": "images"}))
    before = contents(recipe)
    (place / "images" / ".DS_Store").touch()
    check_inputs(place, before, contents(recipe, before))
    first = place / "images" / "0.png"
    if change == "removed":
        first.unlink()
    elif change == "added":
        shutil.copy(first, first.with_name("9.png"))
    elif change == "grown":
        first.write_bytes(b"more")
    else:
        first.rename(first.with_name("7.png"))
    with pytest.raises(UserError, match=r"data\.source: expected the files that the run"):
        check_inputs(place, before, contents(recipe, before))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "config.json"])
def test_an_overwritten_network_at_the_top_of_the_folder_is_noticed(place, name):
    """The oldest repositories have one network, next to model_index.json."""
    for path in (place / "t" / "unet").iterdir():
        path.rename(place / "t" / path.name)
    recipe = with_paths(Recipe(teacher="t"))
    before = contents(recipe)
    overwrite(place / "t" / name)
    with pytest.raises(UserError, match=f"teacher: .*{name} has changed"):
        check_inputs(place, before, contents(recipe, before))


@pytest.mark.parametrize("depth", [1, 2])
def test_images_in_linked_folders_are_noticed(place, depth):
    top = place / "linked"
    top.joinpath(*"ab"[: depth - 1]).mkdir(parents=True)
    top.joinpath(*"ab"[: depth - 1], "class").symlink_to(place / "images", target_is_directory=True)
    (place / "images" / "loop").symlink_to(top, target_is_directory=True)
    recipe = with_paths(Recipe.model_validate({"data": "linked"}))
    before = contents(recipe)
    assert before["data.source"]["files"] == 3
    overwrite(place / "images" / "0.png")
    with pytest.raises(UserError, match=r"data\.source: expected the files that the run"):
        check_inputs(place, before, contents(recipe, before))
