"""What one sees of a run: where it stands, evaluations on the way, trackers. The training does not notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.tracking import get_available_trackers
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fmm_distill.evaluation.evaluator import evaluate
from fmm_distill.run.curves import BAD
from fmm_distill.run.folder import stored_recipe
from fmm_distill.run.marker import MARKER
from fmm_distill.run.plan import plan
from fmm_distill.training import checkpoint
from fmm_distill.training.ema import load_trained
from tests.cli.runs import assert_same_run, call, losses, snapshot, training_only

SCRIPT = Path(__file__).parent / "watched_training.py"
TRACKED = ("--set", "logging.trackers=[tensorboard]")


def evaluations(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]


def errors(line: dict) -> dict[tuple[str, int], float]:
    return {(row["sampler"], row["steps"]): row["endpoint_error"] for row in line["rows"]}


def tracked_steps(folder: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(folder / "tensorboard" / "fmm_distill"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars(tag)]
    assert len(dict(found)) == len(found), "a step is there twice"
    return dict(found)


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny) -> Path:
    """A whole run that was evaluated on the way and tracked; read it only."""
    folder = tmp_path_factory.mktemp("runs") / "watched"
    changes = ("--set", "evaluation.every=5", "--set", "training.checkpoint_every=5", *TRACKED)
    status, _, err = call("--recipe", tiny, "--output", folder, *changes)
    assert status == 0, err
    return folder


def test_the_training_is_the_same_to_the_last_bit(watched, finished):
    assert_same_run(watched, finished[0])


def test_the_average_of_that_step_is_measured_and_the_teacher_once(watched):
    first, second = evaluations(watched)
    assert [first["step"], second["step"]] == [5, 10]
    samplers = [("student", 1), ("student", 2), ("teacher-ddim", 1), ("teacher-dpmsolver++", 2)]
    assert list(errors(first)) == samplers
    assert list(errors(second)) == samplers[:2]
    assert errors(first) != errors(first) | errors(second)
    assert sorted(path.name for path in (watched / "pictures").iterdir()) == ["samples-10.png", "samples-5.png"]
    # The same from the checkpoint of that step.
    kept = checkpoint.load(watched / "checkpoints" / "step-00000010")
    job = plan(stored_recipe(watched))
    average = {name: value for name, value in kept.tensors["ema-0.999"].items() if name != "n_averaged"}
    load_trained(job.student, job.student, average)
    measured = evaluate({"student": job.student.eval()}, job.teacher, job.recipe.evaluation, None, torch.device("cpu"))
    rows = [row for row in measured.to_json()["rows"] if row["sampler"] == "student"]
    assert errors({"rows": rows}) == pytest.approx(errors(second))


def test_the_tracker_has_what_the_logs_have(watched):
    tracked = tracked_steps(watched, "train/loss")
    assert tracked == pytest.approx({step + 1: loss for step, loss, *_ in losses(watched)})
    lines = [*evaluations(watched), {"step": 12} | json.loads((watched / "evaluation.json").read_text())]
    expected = {line["step"]: errors(line)["student", 2] for line in lines}
    assert tracked_steps(watched, "evaluation/endpoint_error/student, 2") == pytest.approx(expected)
    events = EventAccumulator(str(watched / "tensorboard" / "fmm_distill"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [5, 10, 12]
    (recipe,) = (watched / "tensorboard").glob("*/*/hparams.yml")
    assert "training.batch_size: 8" in recipe.read_text()


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_makes_it_again(tmp_path, tiny):
    command = ("--recipe", tiny, "--output", tmp_path / "run", "--set", "evaluation.every=2", *TRACKED)
    with training_only(stop_before=9):
        assert call(*command)[0] == 130
    before = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in before] == [2, 4, 6, 8]
    with (tmp_path / "run" / "evaluations.jsonl").open("a") as log:
        log.write('{"step": 10, "ro')
    # As if the run was killed while it measured: the checkpoint of that step is there, its line is not.
    (tmp_path / "run" / "evaluations.jsonl").write_text("".join(before[:2] + before[3:]) + '{"step": 10, "ro')
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000009")
    with training_only(stop_before=7):
        assert call(*command)[0] == 130
    after = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines(keepends=True)
    assert after[:2] == before[:2]
    assert [json.loads(line)["step"] for line in after] == [2, 4, 6]
    assert not (tmp_path / "run" / "pictures" / "samples-8.png").exists()
    with training_only():
        status, out, _ = call(*command, "--set", "evaluation.every=4", "--set", "logging.trackers=[]")
    assert status == 0
    assert "changed  evaluation.every: 2 until step 6, 4 from there" in out
    assert "changed  logging.trackers: ['tensorboard'] until step 6, [] from there" in out
    found = evaluations(tmp_path / "run")
    assert [line["step"] for line in found] == [2, 4, 6, 8]
    assert errors(found[2]) == errors(json.loads(before[2]))
    assert errors(found[3]) == errors(json.loads(before[3]))
    assert [len(line["rows"]) for line in found] == [4, 2, 2, 2]
    assert list(tracked_steps(tmp_path / "run", "train/loss")) == [1, 2, 3, 4, 5, 6, 7]


def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(tmp_path, tiny):
    installed = {str(name) for name in get_available_trackers()}
    missing = sorted({"wandb", "trackio"} - installed)
    if not missing:
        pytest.skip("all trackers are installed here")
    before = snapshot(tmp_path)
    change = f"logging.trackers=[tensorboard,{missing[0]}]"
    for more in ((), ("--dry-run",)):
        status, out, err = call("--recipe", tiny, "--output", tmp_path / "run", "--set", change, *more)
        assert (status, out) == (2, "")
        assert err.startswith(
            f"error: logging.trackers: expected installed packages, got {missing[0]}, not installed; try `pip install "
            f"{missing[0]}`"
        )
        assert len(err.splitlines()) == 1
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_two_processes_train_the_same_with_and_without(tmp_path, tiny):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run([*command, str(tiny), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "processes: 2" in run.stdout
    assert_same_run(tmp_path / "watched", tmp_path / "alone")
    assert [line["step"] for line in evaluations(tmp_path / "watched")] == [5, 10]
    assert not (tmp_path / "alone" / "evaluations.jsonl").exists()


def test_only_the_first_process_prints(monkeypatch, tiny, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (("--help",), ("recipes",), ("--recipe", tiny, "--dry-run")):
        assert call(*arguments) == (0, "", "")
    # It may be alone with its mistake, and then says who it is.
    status, out, err = call("status", tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith(f"process 1: error: {tmp_path}: expected a run folder")


def status_of(folder: Path, *arguments: object) -> dict[str, str]:
    status, out, err = call("status", folder, *arguments)
    assert status == 0, err
    return {line[:12].strip(): line[12:] for line in out.splitlines()}


def test_status_of_a_finished_run(watched, teacher_folder):
    found = status_of(watched)
    assert list(found) == [
        *("teacher", "losses", "step", "phase", "loss", "rate", "checkpoint", "skipped", "evaluated", "size"),
        "curves",
    ]
    assert found["teacher"] == str(teacher_folder)
    assert found["losses"] == found["phase"] == "lagrangian"
    assert found["step"] == "12 of 12 (100.0 %)"
    assert found["loss"].startswith(f"{sum(loss for _, loss, *_ in losses(watched)) / 12:.4g} (mean of the last 12 ")
    assert found["checkpoint"].startswith("step 12, written 20")
    assert found["skipped"] == "0 non-finite steps"
    assert found["evaluated"] == "at the end, 2 times during training"
    assert found["curves"] == str(watched / "curves.png")
    assert imread(watched / "curves.png").shape[1] == 1170


def test_status_of_a_run_that_was_killed(tmp_path, stopped):
    shutil.copytree(stopped, tmp_path / "run")
    log = tmp_path / "run" / "steps.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    many = [records[0] | {"step": i, "loss": 4.0 if i < 100 else 1.0, "images_per_second": 16.0} for i in range(202)]
    # Two of the last hundred are no numbers; one of these is after the checkpoint.
    many[150] |= {"loss": None, "weighted": None, "gradient_norm": None, "skipped": []}
    many[201] |= {"loss": None, "skipped": []}
    log.write_text("".join(json.dumps(record) + "\n" for record in many) + '{"step": 202, "lo')
    # A checkpoint of step 200, and one after it of which a file is lost.
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    newest = newest.rename(newest.with_name("step-00000200"))
    (newest / "manifest.json").write_text((newest / "manifest.json").read_text().replace('"step": 6', '"step": 200'))
    state = json.loads((newest / "state.json").read_text())
    state["non_finite_steps"] |= {"skipped": 1, "lr_scale": 0.5}
    (newest / "state.json").write_text(json.dumps(state))
    damaged = newest.with_name("step-00000201")
    shutil.copytree(newest, damaged)
    (damaged / "student.safetensors").unlink()
    for file in (log, newest / "manifest.json"):
        os.utime(file, (time.time() - 7500, time.time() - 7500))
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 12\n", "steps: 1002\n"))
    before = snapshot(tmp_path / "run")
    found = status_of(tmp_path / "run", "--output", tmp_path / "here.png")
    assert snapshot(tmp_path / "run") == before
    assert found["step"] == "202 of 1,002 (20.2 %, logged 2 h 5 min ago)"
    assert found["loss"] == "1 (mean of the last 100 steps; of the previous 100: 3.94, -74.6 %)"
    assert found["rate"] == "16.0 images per second, 0.5 s per step"
    assert found["time left"] == "6 min at that rate"
    assert found["checkpoint"].startswith("step 200, written 20")
    assert found["checkpoint"].endswith(" (2 h 5 min ago)")
    assert found["skipped"] == "2 non-finite steps; the learning rate was halved"
    assert found["evaluated"] == "not at the end yet"
    size = sum(len(content) for _, content in before.values())
    assert found["size"] == f"{size / 2**20:.1f} MiB"
    # The bad steps are marked in their color.
    marked = (abs(imread(tmp_path / "here.png")[..., :3] - to_rgb(BAD)).sum(-1) < 0.02).sum()
    assert marked > 10


def test_status_before_the_first_step_and_what_is_no_run(tmp_path, stopped):
    (tmp_path / "run").mkdir()
    for name in ("recipe.yaml", MARKER):
        shutil.copy(stopped / name, tmp_path / "run")
    found = status_of(tmp_path / "run")
    assert found["step"] == "0 of 12 (no step logged yet)"
    assert found["checkpoint"] == "none yet"
    assert "curves" not in found
    for arguments, message in (
        (
            (tmp_path,),
            f"error: {tmp_path}: expected a run folder (the --output of a run), got a folder without .",
        ),
        ((stopped, "--output", "a.jpg"), "error: --output a.jpg: expected a name that ends in .png, for a picture"),
        ((stopped, "--output", tmp_path / "no" / "a.png"), f"error: --output {tmp_path / 'no' / 'a.png'}: expected"),
    ):
        status, _, err = call("status", *arguments)
        assert status == 2
        assert err.startswith(message)
    (tmp_path / "run" / "steps.jsonl").write_text('{"step": 0\n{"step": 1}\n')
    status, _, err = call("status", tmp_path / "run")
    assert status == 2
    assert "steps.jsonl: line 1: not JSON (" in err


def test_status_loads_no_torch(watched, tmp_path):
    code = (
        "import sys; from fmm_distill.cli import command; "
        f"command(['status', {str(watched)!r}, '--output', {str(tmp_path / 'a.png')!r}], standalone_mode=False); "
        "assert not {'torch', 'diffusers', 'pydantic', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "a.png").is_file()
