"""Steps whose loss is no number: a teacher that says nothing sensible of one of its classes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fmm_distill.training import checkpoint
from tests.cli.runs import call, training_only, write_recipe
from tests.conftest import save_teacher, tiny_unet
from tests.processes import on_two_processes

STEPS = 12
CLASSES = 40


def bad_teacher(folder, classes):
    # The first eight classes are those that the export is tried with before training.
    assert min(classes) > 7
    network = tiny_unet(num_class_embeds=CLASSES)
    with torch.no_grad():
        # Finite, as a file of weights has to be, and too large to be computed with.
        network.class_embedding.weight[list(classes)] = 3e38
    return save_teacher(folder, network)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    return write_recipe(folder / "bad.yaml", bad_teacher(folder / "teacher", [14]))


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    with training_only():
        status, out, err = call("--recipe", tiny, "--output", folder)
    assert status == 0, err
    return folder, out


def lines(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def weights(folder, name="student"):
    return load_file(checkpoint.newest(folder / "checkpoints") / f"{name}.safetensors")


def test_bad_steps_are_left_out_counted_and_named(one):
    folder, out = one
    bad = [record for record in lines(folder) if "skipped" in record]
    assert 1 <= len(bad) < STEPS / 2
    assert len(lines(folder)) == STEPS
    for record in bad:
        assert record["loss"] is None
        assert record["skipped"][0]["loss"] is None
        assert 0 < record["skipped"][0]["r"] <= record["skipped"][0]["t"] < 1
        # At most one sample of eight is told the class: the others' losses are numbers.
        assert record["skipped"][-1]["loss"] > 0
    assert out.count("the step is skipped") == 1
    assert f"{len(bad)} of {STEPS} steps had a non-finite loss or gradient and were skipped" in out
    good = weights(folder)["network.conv_in.jump_weight"]
    assert good.isfinite().all()
    # Neither the optimizer nor the averages have seen them.
    assert int(weights(folder, "ema-0.999")["n_averaged"]) == STEPS - len(bad)
    assert {int(v) for k, v in weights(folder, "optimizer").items() if k.endswith(".step")} == {STEPS - len(bad)}


def test_every_process_leaves_out_the_same_steps(one, tiny, tmp_path):
    program = f"""
from unittest.mock import patch
import sys
from fmm_distill.cli import main
sys.argv = ["fmm-distill", "--recipe", {str(tiny)!r}, "--output", {str(tmp_path / "run")!r}]
with patch("fmm_distill.run.distill.finish"):
    main()
"""
    (tmp_path / "train.py").write_text(program)
    run = on_two_processes(tmp_path / "train.py")
    assert run.returncode in (0, 1), run.stderr
    ours, theirs = lines(tmp_path / "run"), lines(one[0])
    assert [record["step"] for record in ours if "skipped" in record] == [
        record["step"] for record in theirs if "skipped" in record
    ]
    for mine, other in zip(ours, theirs, strict=True):
        if "skipped" in mine:
            assert mine["skipped"][0] == other["skipped"][0]
        else:
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_too_many_in_a_row_go_back_once_and_then_stop_the_run(tmp_path):
    teacher = bad_teacher(tmp_path / "teacher", range(9, CLASSES, 3))
    recipe = write_recipe(tmp_path / "bad.yaml", teacher)
    command = ("--recipe", recipe, "--output", tmp_path / "run", "--set", "training.max_non_finite_steps=3")
    status, out, err = call(*command)
    assert status == 3, err
    assert "Traceback" not in err
    assert out.count("3 non-finite steps in a row: continuing from") == 1
    assert "at half the learning rate too; the newest checkpoint is complete" in err.splitlines()[-1]
