"""From a teacher on the Hub to a student on the Hub, by the command line alone, and back without this package."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from fmm_distill.teachers.load import BUILTIN
from tests.hub.server import Account, Hub, environment, serve
from tests.hub.teachers import files_of

TOKEN = "hf_secret"
SHORT = ("training.steps=4", "training.batch_size=8", "evaluation.samples=16", "evaluation.endpoint_samples=8")
SHORT += (
    "evaluation.steps=[1,4]",
    "evaluation.ddim_steps=[4]",
    "evaluation.dpmsolver_steps=[4]",
    "export.steps=[1,4]",
    "evaluation.endpoint_solver_steps=8",
    # The second stage too.
    "matching={steps: 2, critic: {warmup_steps: 2}}",
)
# What a user does who has read the card.
USER = """
import json, sys
import numpy, torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
try:
    import fmm_distill.errors
    here = True
except ImportError:
    here = False
folder = snapshot_download("tester/student", allow_patterns="steps-4/*")
folded = DiffusionPipeline.from_pretrained(f"{folder}/steps-4")
any_step = DiffusionPipeline.from_pretrained("tester/student", trust_remote_code=True)
def images(pipeline, n):
    made = pipeline(batch_size=4, num_inference_steps=n, generator=torch.Generator().manual_seed(5), output_type="np")
    return made.images.tolist()
try:
    DiffusionPipeline.from_pretrained("tester/student")
    asked = False
except ValueError as error:
    asked = "trust_remote_code" in str(error)
kind = type(folded).__module__.split(".")[0]
print(json.dumps([here, kind, asked, images(folded, 4), images(any_step, 4), images(any_step, 3)]))
"""


def ended(command, folder, told):
    return subprocess.run(command, env=told, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hub():
    hub = Hub(accounts={TOKEN: Account("tester", "write")})
    hub.create("tester/teacher", files_of(BUILTIN / "digits"))
    return hub


@pytest.fixture(scope="module")
def address(hub):
    with serve(hub) as address:
        yield address


@pytest.fixture(scope="module")
def turn(address, tmp_path_factory):
    """The run's folder and what the command said."""
    folder = tmp_path_factory.mktemp("turn")
    command = ["--teacher", "tester/teacher", "--recipe", "digits", "--output", "run"]
    command += ["--push-to-hub", "tester/student"]
    command += [word for setting in SHORT for word in ("--set", setting)]
    told = environment(address, folder / "home", TOKEN) | {"OMP_NUM_THREADS": "1"}
    done = ended([sys.executable, "-m", "fmm_distill", *command], folder, told)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run", done.stdout, done.stderr


@pytest.fixture(scope="module")
def elsewhere(address, turn, tmp_path_factory):
    """A virtual environment with what is installed here but this package, which is installed as a link."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
    # A path in a .pth file is searched, the .pth files there, by which this package is found, are not read.
    (packages / "here.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    told = environment(address, folder / "home") | {"OMP_NUM_THREADS": "1"}
    told.pop("PYTHONPATH", None)
    done = ended([python, "-P", "-c", USER], folder, told)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_command_says_where_it_is_and_how_to_load_it(turn, address, hub):
    folder, out, err = turn
    assert f"published 21 files to {address}/tester/student" in out
    assert TOKEN not in out + err
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert TOKEN.encode() not in b"".join(file.content for file in hub.repos["tester/student"].files.values())
    assert len(hub.repos["tester/student"].commits) == 2


def test_the_card_names_the_commit_of_the_teacher(turn, hub):
    card = hub.repos["tester/student"].files["README.md"].content.decode()
    commit = hub.repos["tester/teacher"].at("main").sha
    assert f"distilled from tester/teacher (revision {commit})" in card
    assert "base_model: tester/teacher" in card
    assert "license: cc-by-4.0" in card


def test_students_load_where_this_package_is_not(elsewhere, turn):
    here, kind, asked, folded, any_step, three = elsewhere
    assert not here
    assert kind == "diffusers"
    assert asked
    assert np.abs(np.subtract(folded, any_step)).max() < 1e-4
    assert np.abs(np.subtract(folded, three)).max() > 1e-3
    assert np.asarray(folded).shape == (4, 8, 8, 1)


def test_the_students_samples_are_the_runs(elsewhere, turn):
    folder = turn[0]
    pipeline = DiffusionPipeline.from_pretrained(folder / "student" / "steps-4")
    generator = torch.Generator().manual_seed(5)
    made = pipeline(batch_size=4, num_inference_steps=4, generator=generator, output_type="np").images
    # Another number of threads rounds otherwise.
    assert np.abs(made - np.asarray(elsewhere[3])).max() < 1e-5
    with Image.open(folder / "student" / "samples.png") as picture:
        assert min(picture.size) > 100


def test_a_name_that_may_not_be_written_to_stops_before_training(address, tmp_path):
    command = [sys.executable, "-m", "fmm_distill", "--teacher", "tester/teacher", "--recipe", "digits"]
    command += ["--push-to-hub", "somebody/student", "--output", "run"]
    told = environment(address, tmp_path / "home", TOKEN)
    done = ended(command, tmp_path, told)
    assert done.returncode == 2
    assert (
        done.stderr == "error: somebody/student: expected a token of somebody, got one of tester; use that token, or a "
        "repository of yours\n"
    )
    assert not Path(tmp_path / "run").exists()
