"""A user's mistake is one line with what came and what was wanted, exit 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, ScoreSdeVeScheduler
from PIL import Image

from tests.cli.runs import call, snapshot, spawn, training_only, write_recipe
from tests.conftest import save_teacher, tiny_unet
from tests.slow import with_slow


def rename_weights(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def add_text_encoder(folder: Path) -> None:
    index = folder / "model_index.json"
    components = json.loads(index.read_text(encoding="utf-8"))
    components |= {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    index.write_text(json.dumps(components), encoding="utf-8")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """A folder with a recipe and with teachers and data of every wrong kind."""
    root = tmp_path_factory.mktemp("mistakes")
    write_recipe(root / "tiny.yaml", teacher_folder)
    shutil.copytree(teacher_folder, root / "pickled")
    rename_weights(root / "pickled")
    save_teacher(root / "ve", scheduler=ScoreSdeVeScheduler())
    shutil.copytree(teacher_folder, root / "text")
    add_text_encoder(root / "text")
    broken = tiny_unet()
    broken.conv_in.bias.data[3] = torch.nan
    save_teacher(root / "nan", broken)
    save_teacher(root / "epsilon", scheduler=DDIMScheduler(prediction_type="epsilon"))
    save_teacher(root / "zero-snr", scheduler=DDIMScheduler(rescale_betas_zero_snr=True))
    (root / "images").mkdir()
    Image.fromarray(np.zeros((12, 8), dtype=np.uint8)).save(root / "images" / "0.png")
    (root / "other").mkdir()
    (root / "other" / "thesis.tex").write_text("all of it", encoding="utf-8")
    (root / "list.yaml").write_text("- teacher: builtin:digits\n", encoding="utf-8")
    (root / "torn.yaml").write_text("training: {steps: 3\n", encoding="utf-8")
    return root


def tiny(*arguments: str) -> tuple[str, ...]:
    return ("--recipe", "tiny.yaml", *arguments)


RECIPE = {
    "inception without data": (
        tiny("--set", "evaluation.features=inception"),
        ["features: expected data or evaluation.reference with inception"],
    ),
    "unknown recipe": (("--recipe", "digit"), ["recipe 'digit': expected one of ", ", did you mean digits?"]),
    "no such recipe file": (("--recipe", "nowhere.yaml"), ["recipe nowhere.yaml: expected a file"]),
    "out of range": (
        tiny("--set", "optimizer.lr=-1"),
        ["optimizer.lr: Input should be greater than 0 (got -1)"],
    ),
    "no number": (tiny("--set", "training.steps=many"), ["training.steps: ", "(got 'many')"]),
    "unknown loss": (
        tiny("--set", "loss.name=langrangian"),
        ["loss.name: ", "got 'langrangian', did you mean lagrangian?"],
    ),
    "a loss without its data": (tiny("--set", "loss={name: mean_flow}"), ["there are none; take eulerian"]),
    "no equals sign": (tiny("--set", "training.steps"), ["--set 'training.steps': expected key=value"]),
    "no recipe": (("--teacher", "builtin:digits"), ["--recipe is missing"]),
    "unknown option": (tiny("--stepz", "3"), ["No such option", "--stepz"]),
    "not YAML": (("--recipe", "torn.yaml"), ["recipe torn.yaml: not YAML"]),
    "no keys": (("--recipe", "list.yaml"), ["recipe list.yaml: expected keys and values, got list"]),
    "misspelled key": (
        tiny("--set", "training.warmup_stps=3"),
        ["training.warmup_stps is not a setting, did you mean training.warmup_steps?"],
    ),
    "misspelled key of a loss": (
        tiny("--set", "loss.stp=teacher"),
        ["loss.stp is not a setting of lagrangian, did you mean loss.st"],
    ),
    "misspelled group": (tiny("--set", "trainin.steps=3"), ["trainin is not a setting, did you mean training?"]),
    "shares": (
        tiny("--set", "time_sampling={prior: 0.7, diagonal: 0.5}"),
        ["time_sampling: ", "expected a sum of at most 1, got 1.2"],
    ),
    "two at once": (
        tiny("--set", "training.ema=2", "--set", "export.stpes=[1]"),
        [
            "training.ema.0: Input should be less than 1 (got 2)",
            "; ",
            "export.stpes is not a setting, did you mean export.",
        ],
    ),
    "below a value": (
        tiny("--set", "teacher.name=x"),
        ["--set 'teacher.name=x': expected a group of settings, got teacher"],
    ),
    "option of another verb": (tiny("recipes"), ["options before recipes are those of the bare command"]),
}

OPENING = {
    "no such teacher folder": (
        tiny("--teacher", "./nowhere"),
        ["./nowhere: ", "expected a pipeline folder, a Hub id or builtin:digits"],
    ),
    "no such teacher": (tiny("--teacher", "nobody/nothing"), ["nobody/nothing: no such folder here, and on the Hub: "]),
    "no such built-in": (tiny("--teacher", "builtin:cats"), ["builtin:cats: expected one of ", "builtin:digits"]),
    "folder without a pipeline": (tiny("--teacher", "other"), ["other: no model_index.json in it"]),
    "pickled weights": (
        tiny("--teacher", "pickled"),
        ["in unet, got diffusion_pytorch_model.bin; pickled weights are not opened", "safe_serialization"],
    ),
    "another network's scheduler": (
        tiny("--teacher", "ve"),
        ["ve: time_embedding_type 'positional'; expected 'fourier'"],
    ),
    "missing text encoder": (tiny("--teacher", "text"), ["text: its text_encoder is missing (no folder of that name)"]),
    "prompts for a teacher that takes none": (
        tiny("--set", "prompts.file=torn.yaml"),
        ["expected a pipeline with a text encoder for prompts and pipeline"],
    ),
    "no file of prompts": (tiny("--set", "prompts.file=nowhere.txt"), ["prompts.file nowhere.txt: can't be read"]),
    "two sources of prompts": (
        tiny("--set", "prompts.file=a.txt", "--set", "prompts.dataset=b"),
        ["prompts: expected one source of prompts, got prompts.file and prompts.dataset"],
    ),
    "guidance of an unconditional teacher": (
        tiny("--set", "guidance.scale=2"),
        ["guidance.scale 2.0 for an unconditional teacher; expected 1"],
    ),
    "adapters nowhere": (
        tiny("--set", "student.lora={rank: 2, targets: [nowhere]}"),
        ["expected linear layers or convolutions of UNet2DModel for nowhere", "student.lora.targets"],
    ),
    "zero terminal SNR": (
        tiny("--teacher", "zero-snr"),
        ["got epsilon, which is undefined there; try another prediction_type"],
    ),
    "NaN": (tiny("--teacher", "nan"), ["nan: conv_in.bias has NaN or infinite numbers"]),
    "images of another size": (
        tiny("--data", "images"),
        [
            "images, image 0: expected 1 x 8 x 8 (channels x height x width)",
            "the teacher's images, got 1 x 12 x 8",
            "data.fit=crop",
        ],
    ),
    "no such data": (tiny("--data", "./nowhere"), ["--data ./nowhere: no such file or folder"]),
    "export off the grid": (
        tiny("--set", "export.steps=[1, 3, 7]"),
        ["export.steps: expected divisors of the teacher's 1000 timesteps, got 3, 7"],
    ),
    "batch that does not split": (
        tiny("--set", "training.gradient_accumulation_steps=3"),
        ["training.batch_size: expected a multiple of 3", "got 8"],
    ),
    "fp16 without GPU": (
        tiny("--set", "training.precision=fp16"),
        ["training.precision: expected fp32 or bf16 without a GPU, got fp16"],
    ),
    "more steps than timesteps": (tiny("--set", "evaluation.steps=[1, 1001]"), ["evaluation.steps", "1001"]),
    "more steps of DDIM than timesteps": (tiny("--set", "evaluation.ddim_steps=[1001]"), ["ddim_steps", "1001"]),
    "no steps of DDIM": (tiny("--set", "evaluation.ddim_steps=[0]"), ["evaluation.ddim_steps"]),
    "another prediction without regression": (
        tiny("--teacher", "epsilon", "--set", "student.prediction=v_prediction"),
        ["student.prediction: v_prediction differs from the teacher's epsilon"],
    ),
}


def check(status: int, err: str, wanted: list[str]) -> None:
    assert status == 2, err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert all(part in lines[0] for part in wanted), lines[0]


def arguments_of(name: str, place: Path) -> tuple[tuple[str, ...], list[str]]:
    if name == "fp16 without GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    return (RECIPE | OPENING)[name]


@pytest.mark.parametrize("name", RECIPE | OPENING)
def test_a_mistake_is_one_line_and_writes_nothing(place, tmp_path, monkeypatch, name):
    arguments, wanted = arguments_of(name, place)
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    status, _, err = call(*arguments, *(() if "recipes" in arguments else ("--output", tmp_path / "out")))
    check(status, err, wanted)
    assert sorted(place.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", with_slow(["two at once", "NaN", "images of another size"], ["NaN"]))
def test_the_same_in_a_process_of_its_own(place, tmp_path, name):
    arguments, wanted = arguments_of(name, place)
    process = spawn(*arguments, "--output", tmp_path / "out", cwd=place)
    _, err = process.communicate()
    check(process.returncode, err, wanted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", OPENING)
def test_a_dry_run_finds_it_too(place, monkeypatch, name):
    arguments, wanted = arguments_of(name, place)
    monkeypatch.chdir(place)
    status, _, err = call(*arguments, "--dry-run")
    check(status, err, wanted)


def test_a_corrected_command_runs_in_the_same_folder(place, tmp_path):
    command = ("--recipe", place / "tiny.yaml", "--output", tmp_path / "run")
    assert call(*command, "--teacher", tmp_path / "nowhere")[0] == 2
    assert call(*command, "--set", "training.gradient_accumulation_steps=3")[0] == 2
    with training_only():
        status, _, err = call(*command)
    assert status == 0, err


def test_an_export_of_no_folded_pipeline_ends_well(place, tmp_path):
    command = ("--recipe", place / "tiny.yaml", "--output", tmp_path / "run", "--set", "training.steps=1")
    status, _, err = call(*command, "--set", "export.steps=[]")
    assert status == 0, err
    assert (tmp_path / "run" / "student" / "model_index.json").is_file()


def test_a_run_killed_while_its_folder_is_made_goes_on(place, tmp_path):
    """Whichever of the folder's first files was the last one written."""
    command = ("--recipe", place / "tiny.yaml", "--output", tmp_path / "run")

    def killed(path: Path, text: str) -> None:
        written.append(path.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        path.write_text(text, encoding="utf-8")

    written: list[str] = []
    with patch("fmm_distill.run.folder.write_text", killed):
        assert call(*command)[0] == 130
    with training_only():
        status, _, err = call(*command)
    assert status == 0, err
    assert {"recipe.yaml", "environment.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_the_folder_of_another_recipe_is_refused(tiny, finished):
    before = snapshot(finished[0])
    status, _, err = call("--recipe", tiny, "--output", finished[0], "--set", "training.batch_size=4")
    check(status, err, [f"--output {finished[0]} is a run of another recipe (training.batch_size: expected 8, got 4)"])
    assert snapshot(finished[0]) == before


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
def test_a_folder_that_holds_other_things_is_left_alone(place, tiny, fresh):
    before = snapshot(place / "other")
    status, _, err = call("--recipe", tiny, "--output", place / "other", *fresh)
    check(
        status,
        err,
        ["other: expected a run folder or an empty one, got other files and no "],
    )
    assert snapshot(place / "other") == before


def test_an_export_leaves_a_folder_of_other_things_alone(place, finished):
    before = snapshot(place / "other")
    status, _, err = call("export", finished[0], place / "other")
    check(status, err, ["other: expected an exported student or an empty folder"])
    assert snapshot(place / "other") == before


def test_a_file_as_output_is_refused(place, tiny):
    status, _, err = call("--recipe", tiny, "--output", place / "other" / "thesis.tex")
    check(status, err, ["thesis.tex"])
    assert (place / "other" / "thesis.tex").read_text(encoding="utf-8") == "all of it"


@pytest.mark.parametrize("name", ["2024", "no", "a: b", "run #1", "[x]"])
def test_a_teacher_may_have_any_name(place, teacher_folder, tmp_path, monkeypatch, name):
    shutil.copytree(teacher_folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    status, out, err = call("--recipe", place / "tiny.yaml", "--teacher", name, "--dry-run")
    assert status == 0, err
    assert f"teacher: {name} (UNet2DModel" in out


def test_a_recipe_in_another_encoding_is_a_mistake(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("teacher: 'modèle'\n".encode("latin-1"))
    status, _, err = call("--recipe", tmp_path / "latin.yaml", "--dry-run")
    check(status, err, ["latin.yaml"])


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ("evaluate", "nowhere"),
            "nowhere: expected a run folder (the --output of a run), got nothing there",
        ),
        (
            ("sample", "other"),
            "other: expected a run folder (the --output of a run), got a folder without .",
        ),
        (
            ("export", "other", "out"),
            "other: expected a run folder (the --output of a run), got a folder without .",
        ),
        (("evaluate", "other", "--steps", "1,x"), "'1,x': expected integers separated by commas"),
        (("evaluate", "other", "--steps", "0"), "'0': expected numbers of at least 1"),
        (("evaluate", "other", "--stochasticity", "nan"), "'nan': expected a finite number of at least 0, such as 0.5"),
        (("sample", "other", "--stochasticity", "-1"), "'-1': expected a finite number of at least 0, such as 0.5"),
        (("inspect", "text"), "text: its text_encoder is missing"),
        (("--recipe", "checkerboard", "--data", "none"), "run python -m experiments.checkerboard"),
        (("recipes", "show", "digit"), "recipe 'digit': expected one of"),
    ],
)
def test_mistakes_of_the_verbs(place, monkeypatch, arguments, wanted):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    status, _, err = call(*arguments)
    check(status, err, [wanted])
    assert sorted(place.rglob("*")) == before


def test_a_diverged_run_is_one_line_and_exit_3(tiny, tmp_path):
    status, _, err = call("--recipe", tiny, "--output", tmp_path / "run", "--set", "optimizer.lr=1e30")
    assert status == 3
    last = err.splitlines()[-1]
    assert last.startswith("error: step ")
    assert "Try a lower optimizer.lr" in last
