"""The CIFAR-10 line: its teacher's script, its classifier, its students' recipes, and a toy run from end to end."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from experiments.cifar10 import classifier, scaling
from experiments.cifar10.budget import BUDGETS
from experiments.cifar10.methods import METHODS, recipe_of
from experiments.cifar10.processes import Processes
from experiments.cifar10.report import markdown
from fmm_distill.core.solvers import endpoint
from fmm_distill.evaluation.features import open_features
from fmm_distill.losses.registry import BUILT_IN
from fmm_distill.teachers.load import load_teacher
from tests.cli.runs import call
from tests.conftest import save_teacher, tiny_unet

ROOT = Path(__file__).parents[2]


def script():
    """The example, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("train_teacher", ROOT / "examples" / "train_teacher.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(output, **changes):
    settings = {
        "size": 8,
        "output": output,
        "objective": "v_prediction",
        "channels": [8, 8],
        "layers": 1,
        "steps": 4,
        "minutes": float("inf"),
        "batch": 4,
        "lr": 1e-3,
        "ema": 0.9,
        "precision": "no",
        "compile": False,
        "checkpoint_every": 2,
        "seed": 0,
    }
    return argparse.Namespace(**settings | changes)


def pixels(count=16, size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def trained(module, output, batches=None, **changes):
    accelerator = Accelerator(cpu=True)
    training = module.Training(options(output, **changes), accelerator)
    training.train(batches or module.Batches(pixels(), 4, 0, accelerator))
    return training


def test_a_stopped_teacher_goes_on_to_the_same_weights(tmp_path):
    module = script()

    class Stopping(module.Batches):
        def at(self, step):
            if step == 3:
                raise KeyboardInterrupt
            return super().at(step)

    whole = trained(module, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(module, tmp_path / "parts", Stopping(pixels(), 4, 0, Accelerator(cpu=True)))
    resumed = trained(module, tmp_path / "parts")
    assert resumed.step == whole.step == 4
    for ours, theirs in zip(resumed.average.parameters(), whole.average.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        # An average that is part of a graph would hold on to every step's memory.
        assert not theirs.requires_grad


@pytest.mark.parametrize("objective", ["v_prediction", "epsilon", "flow"])
def test_the_tool_takes_what_the_example_trains(tmp_path, objective):
    module = script()
    training = trained(module, tmp_path / "teacher", objective=objective, steps=2)
    training.save_pipeline()
    assert not (tmp_path / "teacher" / "checkpoints").exists()
    assert DDPMPipeline.from_pretrained(tmp_path / "teacher").unet.config.sample_size == 8
    teacher = load_teacher(str(tmp_path / "teacher"))
    assert teacher.prediction == {"flow": "flow_prediction"}.get(objective, objective)
    x, noise = torch.full((2, 3, 8, 8), 0.5), torch.zeros(2, 3, 8, 8)
    t = torch.full((2,), teacher.schedule.t_max, dtype=torch.float64)
    with torch.no_grad():
        assert teacher.velocity(x, t).isfinite().all()
        assert endpoint(teacher.velocity, teacher.schedule, teacher.prior(noise), 2).shape == x.shape


def test_objectives_are_those_of_the_schedulers():
    module = script()
    x_0, noise, uniform = torch.randn(3, 2, 3, 8, 8)[0], torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])

    class Told(torch.nn.Module):
        def forward(self, x, t):
            self.seen = x, t
            return argparse.Namespace(sample=torch.zeros_like(x))

    found = {}
    for objective in ("v_prediction", "epsilon", "flow"):
        network = Told()
        found[objective] = module.Denoising(network, objective)(x_0, noise, uniform), network.seen
    # Against a network that says 0 the loss is the mean square of its target.
    torch.testing.assert_close(found["epsilon"][0], noise.square().mean())
    torch.testing.assert_close(found["flow"][0], (noise - x_0).square().mean())
    torch.testing.assert_close(found["flow"][1][0][1], 0.1 * x_0[1] + 0.9 * noise[1])
    torch.testing.assert_close(found["flow"][1][1], torch.tensor([200.0, 900.0]))
    products = module.DDPMScheduler().alphas_cumprod[[200, 900]][:, None, None, None]
    a, s = products.sqrt(), (1 - products).sqrt()
    torch.testing.assert_close(found["v_prediction"][0], (a * noise - s * x_0).square().mean())


@pytest.mark.parametrize("size", [16, 32])
def test_the_classifier_learns_and_its_file_is_taken(tmp_path, size):
    torch.manual_seed(0)
    labels = torch.arange(64) % 2
    # Dark and bright: two classes that a network must tell apart.
    images = (labels[:, None, None, None] * 160 + torch.randint(0, 90, (64, 3, size, size))).to(torch.uint8)
    features, head = classifier.train(images, labels, width=8, epochs=6, batch=16, lr=0.1, precision="fp32")
    assert classifier.accuracy(features, head, images, labels) == 1
    file = tmp_path / "classifier.pt"
    torch.jit.trace(features, torch.rand(2, 3, size, size)).save(str(file))
    loaded = open_features(str(file), (3, size, size))
    shown = torch.rand(5, 3, size, size)
    torch.testing.assert_close(loaded(shown).features, features(shown))
    assert loaded.width == 8


def test_moved_images_keep_their_pixels():
    torch.manual_seed(0)
    # Every pixel of an image says which one it is.
    images = (torch.arange(6)[:, None, None, None] * 40).expand(6, 3, 32, 32).to(torch.uint8)
    assert torch.equal(classifier.augmented(images), images.float() / 255)
    for size in (16, 32):
        image = pixels(1, size).expand(8, -1, -1, -1)
        moved = classifier.augmented(image)
        assert len({moved[i].sum().item() for i in range(8)}) > 4
        assert moved.shape == image.shape
    assert moved.amax() <= 1


def test_every_student_has_a_recipe(tmp_path):
    (tmp_path / "data").mkdir()
    recipes = {name: recipe_of(name, tmp_path, tmp_path / "data", BUDGETS["toy"], 20, 1) for name in METHODS}
    assert {recipe.training.seed for recipe in recipes.values()} == {1}
    shared = {(recipe.training.steps, recipe.training.batch_size, recipe.weight.power) for recipe in recipes.values()}
    assert shared == {(20, 8, 1.0)}
    with_data = ["lagrangian-data", "progressive-data"]
    assert [name for name, recipe in recipes.items() if recipe.data.has_images] == with_data
    # A budget may have smaller images than the data.
    assert {recipes[name].data.fit for name in with_data} == {"crop"}
    # In half precision differences cost two calls more.
    on_gpu = {name: recipe_of(name, tmp_path, tmp_path / "data", BUDGETS["gpu"], 20, 1) for name in METHODS}
    for name in ("lagrangian", "mean_flow"):
        assert (recipes[name].loss.derivative, on_gpu[name].loss.derivative) == ("central", "exact")
    assert on_gpu["eulerian"].loss.step == 0.1
    wanted = {"lagrangian", "eulerian", "progressive", "consistency", "consistency_trajectory", "operator_regression"}
    assert wanted <= {recipe.loss.name for recipe in recipes.values()} <= set(BUILT_IN)


def test_tables_of_a_run_that_is_not_finished():
    row = {"frechet": 12.345, "endpoint": 0.4567, "images_per_second": 1.0}
    student = {"rows": dict.fromkeys(("1", "2", "4", "8", "16", "32"), row), "images_seen": 160, "device_seconds": 90.0}
    results = {
        "machine": {"device": "a machine", "torch": "2"},
        "budget": {"batch": 8},
        "protocol": {},
        "classifier": {},
        "teacher": {"rows": {"ddim": {"1": row}}},
        "students": {"lagrangian-0": student, "lagrangian-1": student},
        "missing": ["eulerian"],
    }
    text = markdown(results)
    assert "| lagrangian | 12.3 | 12.3 | 12.3 | 12.3 | 12.3 | 12.3 |  | 1.50 |" in text
    assert "| lagrangian, seed 1 | 0.457 |" in text
    assert "| teacher, DDIM | 12.3 |  |  |  |  |  |  |" in text
    assert "Not finished: eulerian." in text


def write_images(folder, count=40, column="img"):
    folder.mkdir()
    for split in ("train", "test"):
        files = []
        for image in pixels(count, 32):
            file = io.BytesIO()
            Image.fromarray(image.movedim(0, -1).numpy()).save(file, "PNG")
            files.append({"bytes": file.getvalue(), "path": None})
        table = datasets.Dataset.from_dict({column: files, "label": [i % 10 for i in range(count)]})
        table = table.cast_column(column, datasets.Image(decode=False))
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [("cifar10", "100000 of 256"), ("cifar10-fast", "6000 of 128"), ("imagenet32", "400000 of 512")],
)
def test_recipes_are_ready_to_run(tmp_path, recipe, steps):
    epsilon = recipe != "imagenet32"
    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = tiny_unet(sample_size=32, in_channels=3, out_channels=3, add_attention=False, **blocks)
    scheduler = DDPMScheduler(prediction_type="epsilon" if epsilon else "v_prediction", clip_sample=False)
    teacher = save_teacher(tmp_path / "teacher", unet, scheduler)
    data = write_images(tmp_path / "data", 4, "image")
    given = ["--teacher", teacher, "--recipe", recipe, "--data", data, "--set", "training.precision=fp32"]
    status, out, err = call(*given, "--output", tmp_path / "run", "--dry-run")
    assert status == 0, err
    assert f"{steps} samples, loss lagrangian" in out
    assert ("half of them mirrored" in out) == (recipe == "imagenet32")
    assert re.search(r"memory:  .* [GM]iB at peak", out)
    assert not (tmp_path / "run").exists()


def test_processes_say_what_they_took_of_the_processor_over_all_calls(tmp_path):
    processes = Processes(tmp_path, 2)
    taken = []
    for code in (0, 3):
        work = f"sum(i * i for i in range(10**6)); raise SystemExit({code})"
        processes.start("some", [sys.executable, "-c", work])
        assert processes.wait_for_one() == ([] if code else ["some"])
        assert not processes.running
        taken.append(processes.cpu_seconds("some"))
    assert 0 < taken[0] < taken[1]
    processes.start("endless", [sys.executable, "-c", "while True: pass"])
    assert not processes.finished()
    processes.stop()
    assert not processes.running
    assert processes.cpu_seconds("other") == 0


def test_a_power_law_is_fitted_as_it_is():
    images = [1e4, 2e4, 4e4, 8e4]
    fit = scaling.fitted(images, [3 * n**-0.25 for n in images])
    assert fit.slope == pytest.approx(-0.25)
    assert fit.at(1e9) == pytest.approx(3 * 1e9**-0.25)
    assert fit.error < 1e-6
    noisy = scaling.fitted(images, [3 * n**-0.25 * f for n, f in zip(images, (1.1, 0.9, 1.1, 0.9), strict=True)])
    # Of four points a factor of two apart, by the formula of simple regression.
    assert noisy.error == pytest.approx(noisy.spread / (5**0.5 * math.log(2)))
    rows = [{"1": {"frechet": 5 + 100 / n, "endpoint": 1 / n}} for n in (1, 2, 4)]
    size = {"teacher_frechet": 5.0, "points": [{"images_seen": 2**i, "rows": rows[i]} for i in range(3)]}
    for point in size["points"]:
        point["rows"] |= {"2": {"frechet": 4.0, "endpoint": 1.0}, "4": {"frechet": 6.0, "endpoint": 1.0}}
    found = scaling.fits(size)
    assert found["frechet, 1"].slope == pytest.approx(-1)
    # Below what is taken off: no logarithm.
    assert found["frechet, 2"] is None
    assert found["frechet, 4"].slope == pytest.approx(0)


@pytest.mark.slow
def test_a_killed_toy_run_goes_on_to_the_end(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.cifar10",
        "--budget",
        "toy",
        "--only",
        "lagrangian",
        "--minutes",
        "10",
    ]
    command += ["--data", str(write_images(tmp_path / "data")), "--work", str(tmp_path / "work")]
    command += ["--output", str(tmp_path / "out" / "cifar10.json")]
    settings = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # With all that it started, as a time limit would.
    run = subprocess.Popen(command, start_new_session=True, **settings)
    log, until = tmp_path / "work" / "students" / "lagrangian-0" / "steps.jsonl", time.monotonic() + 300
    while not log.is_file() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGKILL)
    printed = run.communicate()[0]
    assert log.is_file(), printed
    kept = (tmp_path / "work" / "teacher" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    done = subprocess.run(command, check=False, **settings)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "work" / "teacher" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == kept
    results = json.loads((tmp_path / "out" / "cifar10.json").read_text(encoding="utf-8"))
    assert sorted(results["students"]) == ["lagrangian-0", "lagrangian-1"]
    assert results["missing"] == []
    for found in results["students"].values():
        assert found["images_seen"] == 160
        assert sorted(found["rows"], key=int) == ["1", "2", "4", "8", "16"]
    assert len(results["teacher"]["rows"]["ddim"]) == len(results["teacher"]["rows"]["dpmsolver++"]) == 6
    assert sorted(file.name for file in (tmp_path / "out").glob("*.png")) == [
        "cifar10-minutes.png",
        "cifar10-samples.png",
        "cifar10-steps.png",
    ]
    scaling = [sys.executable, "-m", "experiments.cifar10.scaling", "--budget", "toy", "--lengths", "8", "16", "20"]
    scaling += ["--work", str(tmp_path / "work"), "--teachers", str(tmp_path / "work" / "teacher")]
    done = subprocess.run([*scaling, "--output", str(tmp_path / "scaling.json")], check=False, **settings)
    assert done.returncode == 0, done.stdout
    (size,) = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))["sizes"].values()
    assert [point["images_seen"] for point in size["points"]] == [64, 128, 160]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
