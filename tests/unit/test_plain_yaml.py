"""Recipe files and --set values: one document, each key once, no surprises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fmm_distill.config.recipe import load_recipe
from fmm_distill.errors import UserError

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
)

REFUSED = {
    "a group twice": (
        "teacher: builtin:digits\ntraining:\n  steps: 5\ntraining:\n  batch_size: 8\n",
        "training is there twice (lines 2 and 4)",
    ),
    "a key twice": (
        "training:\n  steps: 5\n  batch_size: 4\n  steps: 6\n",
        "training.steps is there twice (lines 2 and 4)",
    ),
    "in a list": (
        "extra_losses:\n  - loss: {name: flow_matching}\n    fraction: 0.5\n    fraction: 0.1\n",
        "extra_losses.0.fraction is there twice (lines 3 and 4)",
    ),
    "in a flow": ("loss: {name: eulerian, name: lagrangian}\n", "loss.name is there twice (lines 1 and 1)"),
    "in quotes": ("training: {steps: 3, 'steps': 4}\n", "training.steps is there twice"),
    "two documents": ("teacher: builtin:digits\n---\nteacher: other\n", "expected one document, got 2"),
    "a number as a key": ("1: 2\n", "line 1: a key that YAML does not read as text ('1')"),
    "a truth value as a key": ("training:\n  no: 3\n", "line 2: a key that YAML does not read as text ('no')"),
    "a list as a key": ("? [a]\n: 3\n", "line 1: a key that YAML does not read as text (a list or a group)"),
    "a list": ("- teacher\n", "expected keys and values, got list"),
    "an empty list": ("[]\n", "expected keys and values, got list"),
    "a text": ("teacher\n", "expected keys and values, got str"),
    "an empty text": ("''\n", "expected keys and values, got str"),
    "tabs": ("training:\n\tsteps: 3\n", "not YAML (while scanning"),
    "an alias of what is around it": ("pipeline: &p {a: *p}\n", "line 1: an alias (*name) of what it is in itself"),
    "an unknown alias": ("training: *nothing\n", "not YAML (found undefined alias"),
    "aliases of aliases": (BOMB, "its aliases (*name) unfold to more than 10,000 values"),
    "no such day": ("revision: 2026-02-31\n", "not YAML (day is out of range"),
    "too many digits": (f"training: {{steps: {'1' * 5000}}}\n", "not YAML ("),
    "too deep": ("teacher: " + "[" * 3000 + "\n", "not YAML"),
    "octal": ("training: {steps: 0100}\n", "line 1: 0100 is another number in YAML than it seems"),
    "base 60": ("training:\n  steps: 1:30\n", "line 2: 1:30 is another number in YAML than it seems"),
    "python": ("teacher: !!python/object/apply:os.getcwd []\n", "not YAML (could not determine a constructor"),
    "a control character": ("teacher: 'a\x01'\n", "not YAML (unacceptable character"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_in_one_line(tmp_path, name):
    text, says = REFUSED[name]
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(UserError, match=re.escape(f"recipe {file}: {says}")) as caught:
        load_recipe(str(file))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("teacher: builtin:digits\n".encode("utf-16"), "expected text in UTF-8, got UTF-16"),
        ("teacher: caf\u00e9\n".encode("latin-1"), "expected text in UTF-8, got byte 12 is no UTF-8"),
        (bytes(range(128, 200)), "expected text in UTF-8"),
    ],
)
def test_another_encoding(tmp_path, data, says):
    (tmp_path / "mine.yaml").write_bytes(data)
    with pytest.raises(UserError, match=says):
        load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff", "---\n", "%YAML 1.1\n---\n"])
def test_what_editors_write_is_read(tmp_path, start, end):
    text = start + "teacher: builtin:digits\noptimizer:\n  lr: 1e-4\ntraining:\n  steps: 7\n"
    (tmp_path / "mine.yml").write_bytes(text.replace("\n", end).encode())
    recipe = load_recipe(str(tmp_path / "mine.yml"))
    assert (recipe.training.steps, recipe.optimizer.lr) == (7, 1e-4)


def test_anchors_and_merges_are_read_and_shared_parts_change_apart(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "loss: &loss {name: lagrangian, stop_gradient: target}\n"
        "extra_losses: [{loss: {<<: *loss, stop_gradient: teacher_input}, fraction: 0.25}]\n"
        "stages: [{loss: *loss, fraction: 0.25}]\n"
    )
    recipe = load_recipe(str(file), ["loss.stop_gradient=nowhere"])
    assert [loss.stop_gradient for loss in recipe.losses] == ["nowhere", "teacher_input", "target"]


def test_a_file_that_can_not_be_opened(tmp_path):
    with pytest.raises(UserError, match="expected a file, got a path without one"):
        load_recipe(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UserError, match="expected a file, got a path without one"):
        load_recipe(str(tmp_path / "folder.yaml"))


def test_the_end_of_a_files_name_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plain").write_text("training: {steps: 3}\n")
    Path("mine.yaml").write_text("training: {steps: 3}\n")
    for name, says in {
        "./plain": "expected a file that ends in .yaml or .yml; try `mv ./plain ./plain.yaml`",
        "plain": "expected a file that ends in .yaml",
        "./mine": "expected a file that ends in .yaml, got a path without one, did you mean ./mine.yaml?",
        "mine": "did you mean mine.yaml?",
        "./nowhere": "expected a file that ends in .yaml, got a path without one",
        "nowhere": "recipe 'nowhere': expected one of ",
    }.items():
        with pytest.raises(UserError, match=re.escape(says)):
            load_recipe(name)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            ["loss.stop_gradient=nowhere", "loss={name: eulerian}"],
            "expected one change of loss.stop_gradient, got --set 'loss.stop_gradient=nowhere' too",
        ),
        (
            ["training.steps=1", "training={batch_size: 4}"],
            "expected one change of training.steps, got --set 'training.steps=1' too",
        ),
        (
            ["data.source=teacher", "data=none"],
            "expected one change of data.source, got --set 'data.source=teacher' too",
        ),
        (["loss={name: eulerian, name: mean_flow}"], "name is there twice (lines 1 and 1)"),
        (["training={steps: 1, steps: 2}"], "steps is there twice"),
        (["revision=2026-02-31"], "not YAML (day is out of range"),
        (["training.steps=[1"], "not YAML (while parsing"),
        (["training.steps=1\n---\n2"], "expected one document, got 2"),
        (["training.steps=0100"], "0100 is another number in YAML"),
    ],
)
def test_changes_that_undo_one_another_or_can_not_be_read(changes, says):
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        load_recipe("digits", changes)
    assert str(caught.value).startswith("--set ")
    assert "\n" not in str(caught.value)


def test_options_and_changes_of_the_same_setting():
    with pytest.raises(UserError, match="expected one change of teacher, got --teacher too"):
        load_recipe("digits", ["teacher=other"], teacher="builtin:digits")
    for change in ("data=none", "data.source=none"):
        with pytest.raises(UserError, match=r"expected one change of data\.source, got --data too"):
            load_recipe("digits", [change], data="somewhere")
    recipe = load_recipe(
        "digits", ["data.flip=true", "loss={name: eulerian}", "loss.stop_gradient=nowhere"], data="somewhere"
    )
    assert (recipe.data.flip, recipe.data.source, recipe.loss.stop_gradient) == (True, "somewhere", "nowhere")
