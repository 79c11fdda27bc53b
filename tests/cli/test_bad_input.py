"""A user's mistake: one line on stderr, exit 2, nothing lost."""

from __future__ import annotations

import json
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from PIL import Image

from tests.cli.runs import STEPS, assert_same_run, call, checkpoints, spawn, training_only
from tests.conftest import save_teacher, tiny_unet


def refused(*arguments: object) -> str:
    status, _, err = call(*arguments)
    assert status == 2, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.splitlines() == lines
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe", "digit"], ["'digit' is unknown", "did you mean digits", "known: cifar10, digits"]),
        (["--recipe", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--teacher", "builtin:digits"], ["--recipe is missing"]),
        (["--recipe", "digits", "--set", "training.step=5"], ["training.step is not a setting", "training.steps"]),
        (
            ["--recipe", "digits", "--set", "training.steps=0"],
            ["training.steps", "greater than or equal to 1", "got 0"],
        ),
        (["--recipe", "digits", "--set", "training.steps=10.5"], ["training.steps", "10.5"]),
        (
            ["--recipe", "digits", "--set", "training.stepz=5", "--set", "loss.stop=nobody"],
            ["training.stepz is not a setting", "loss.stop", "'nobody'"],
        ),
        (["--recipe", "digits", "--set", "loss.name=euler"], ["loss", "'lagrangian', 'eulerian'"]),
        (["--recipe", "digits", "--set", "steps"], ["wanted key=value"]),
        (["--recipe", "digits", "--teacher", "./nowhere"], ["./nowhere: no such folder"]),
        (["--recipe", "digits", "--teacher", "owner/never-cached"], ["no such folder here, and the Hub gave nothing"]),
        (
            ["--recipe", "digits", "--set", "export.steps=[3,7]"],
            ["export.steps 3, 7", "divisors of the teacher's 1000"],
        ),
        (
            ["--recipe", "digits", "--set", "training.batch_size=7", "--set", "training.accumulation=2"],
            ["batch_size 7"],
        ),
        (["--recipe", "digits", "--set", "evaluation.features=inception"], ["features: inception"]),
        (["--recipe", "digits", "--data", "./nowhere.parquet"], ["./nowhere.parquet", "no images could be read"]),
        (["--recipe", "digits", "--stepz", "3"], ["No such option"]),
        (["sample", "nowhere"], ["nowhere is no run folder"]),
        (["evaluate", "nowhere", "--steps", "1,x"], ["'1,x'", "whole numbers"]),
    ],
)
def test_one_line(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(*arguments)
    for part in said:
        assert part in line
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_fp16_needs_a_gpu(tmp_path):
    assert "fp16 needs a GPU" in refused(
        "--recipe", "digits", "--set", "training.precision=fp16", "--output", tmp_path / "run"
    )


def test_a_teacher_that_cannot_be_opened(tmp_path):
    def said(folder):
        return refused("--recipe", "cifar10", "--teacher", folder, "--output", tmp_path / "run")

    pickled = save_teacher(tmp_path / "pickled")
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    assert "no .safetensors" in said(pickled)

    unknown = save_teacher(tmp_path / "unknown")
    EulerDiscreteScheduler().save_pretrained(unknown / "scheduler")
    index = json.loads((unknown / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (unknown / "model_index.json").write_text(json.dumps(index))
    assert "scheduler EulerDiscreteScheduler; wanted one of DDPMScheduler" in said(unknown)

    text = save_teacher(tmp_path / "text")
    index = json.loads((text / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (text / "model_index.json").write_text(json.dumps(index))
    assert "text-to-image" in said(text)

    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    assert "conv_in.weight holds NaN" in said(save_teacher(tmp_path / "nan", unet))

    epsilon = save_teacher(tmp_path / "epsilon", scheduler=DDPMScheduler())
    line = refused("--recipe", "cifar10", "--teacher", epsilon, "--set", "student.regression_steps=0")
    assert "student.regression_steps is 0" in line


def test_images_of_another_size(tmp_path, tiny):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "images" / "a.png")
    line = refused("--recipe", tiny, "--data", tmp_path / "images", "--output", tmp_path / "run")
    assert "1 x 9 x 8" in line
    assert "the teacher makes 1 x 8 x 8" in line


def test_a_folder_of_another_recipe_is_left_alone(finished, tiny):
    folder = finished[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    line = refused("--recipe", tiny, "--output", folder, "--set", "training.learning_rate=0.5")
    assert "another recipe" in line
    assert "training.learning_rate: 0.001 there, 0.5 here" in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_of_other_things_is_left_alone(tmp_path, tiny, finished):
    (tmp_path / "thesis.txt").write_text("years")
    for fresh in ([], ["--fresh"]):
        assert "is not empty and holds no run" in refused("--recipe", tiny, "--output", tmp_path, *fresh)
    assert "holds something else" in refused("export", finished[0], tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_a_truncated_checkpoint_is_named(tmp_path, stopped, tiny, finished):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    newest = run / "checkpoints" / checkpoints(run)[-1]
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    line = refused("--recipe", tiny, "--output", run)
    assert str(newest) in line
    assert "optimizer.safetensors is truncated" in line
    # What the line says to do helps.
    shutil.rmtree(newest)
    with training_only():
        assert call("--recipe", tiny, "--output", run)[0] == 0
    assert_same_run(run, finished[0])


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits as Linux has them")
def test_a_full_disk_costs_nothing_but_the_steps_since_the_last_checkpoint(tmp_path, stopped, tiny, finished):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    before = checkpoints(run)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = spawn("--recipe", tiny, "--output", run, preexec_fn=limit)
    _, err = process.communicate()
    assert process.returncode == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "could not be written" in line
    assert "run the same command again" in line
    assert "Traceback" not in err
    assert checkpoints(run) == before
    with training_only():
        assert call("--recipe", tiny, "--output", run)[0] == 0
    assert checkpoints(run)[-1] == f"step-{STEPS:08d}"
    assert_same_run(run, finished[0])
