from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from fmm_distill.training import checkpoint
from fmm_distill.training.signals import StopRequest, stop_requests
from fmm_distill.training.trainer import Trainer
from tests.cli.runs import (
    STEPS,
    assert_same_run,
    call,
    checkpoints,
    losses,
    snapshot,
    spawn,
    training_only,
)
from tests.processes import PACKAGE


def kill_after(lines: int, *arguments: object) -> None:
    """Start the command, and kill it as soon as it has logged so many steps."""
    log = Path(arguments[-1]) / "steps.jsonl"
    process = spawn(*arguments)
    while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err


@pytest.mark.slow
def test_a_run_that_is_killed_and_run_again_gives_the_same_numbers(tmp_path, tiny, finished):
    command = ("--recipe", tiny, "--output", tmp_path / "run")
    for lines in (2, 5, 10):
        kill_after(lines, *command)
        assert not (tmp_path / "run" / "evaluation.json").exists()
    with training_only():
        status, out, _ = call(*command)
    assert status == 0
    assert "resuming from step-0000000" in out
    assert_same_run(tmp_path / "run", finished[0])


def test_a_whole_second_process_ends_with_the_same_student(tmp_path, stopped, tiny, finished):
    shutil.copytree(stopped, tmp_path / "run")
    run = PACKAGE.together(("fmm_distill", "--recipe", tiny, "--output", tmp_path / "run"), [dict(os.environ)])
    assert run.returncode == 0, run.stderr
    assert "resuming from step-00000006" in run.stdout
    assert_same_run(tmp_path / "run", finished[0])
    for file in ("student/unet/diffusion_pytorch_model.safetensors", "student/steps-2/unet/config.json"):
        assert (tmp_path / "run" / file).read_bytes() == (finished[0] / file).read_bytes()


@pytest.mark.parametrize("step", [0, 1, 3, 4, 11])
def test_a_run_that_is_interrupted_goes_on_with_the_same_numbers(tmp_path, tiny, finished, step):
    command = ("--recipe", tiny, "--output", tmp_path / "run")
    with training_only(stop_before=step):
        assert call(*command)[0] == 130
    assert len(losses(tmp_path / "run")) == step
    with training_only():
        assert call(*command)[0] == 0
    assert_same_run(tmp_path / "run", finished[0])


@pytest.fixture
def interrupts():
    """As of a program at a terminal; one in the background may ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signaled_process(number: int, *command: object) -> tuple[int, str]:
    """The command in a process that gets a signal after some steps: exit status and stderr."""
    process = spawn(*command)
    log = Path(command[-1]) / "steps.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= 4):
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate()
    return process.returncode, err


def signaled_call(number: int, *command: object) -> tuple[int, str]:
    """The same in this process."""
    step_of = Trainer.train_step

    def step(self: Trainer, done: int, request: StopRequest) -> tuple[dict, bool]:
        if done == 4:
            signal.raise_signal(number)
        return step_of(self, done, request)

    with patch.object(Trainer, "train_step", step):
        status, _, err = call(*command)
    return status, err


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("stopped_by", [signaled_call, pytest.param(signaled_process, marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_stop_saves_first(tmp_path, tiny, stopped, finished, name, stopped_by):
    # As if it was killed before its first step: the export is not tried again.
    shutil.copytree(stopped, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "steps.jsonl"))
    command = ("--recipe", tiny, "--output", tmp_path / "run")
    number = getattr(signal, name)
    status, err = stopped_by(number, *command)
    assert status == 128 + number, err
    done = len(losses(tmp_path / "run"))
    assert 4 <= done < STEPS
    assert (
        err.splitlines()[-1]
        == f"stopped by {name} after step {done}, which is saved; the same command resumes from there"
    )
    assert checkpoints(tmp_path / "run")[-1] == f"step-{done:08d}"
    with training_only():
        assert call(*command)[0] == 0
    assert_same_run(tmp_path / "run", finished[0])


@pytest.mark.usefixtures("interrupts")
def test_a_second_request_interrupts_at_once():
    with stop_requests() as request:
        signal.raise_signal(signal.SIGTERM)
        assert request.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_does_not_touch_the_steps_made_may_change(tmp_path, tiny, stopped, finished):
    shutil.copytree(stopped, tmp_path / "run")
    command = ("--recipe", tiny, "--output", tmp_path / "run", "--set", "training.steps=14")
    with training_only():
        status, out, err = call(*command, "--set", "training.checkpoint_every=5", "--set", "evaluation.steps=[1]")
    assert status == 0, err
    for line in (
        "changed  evaluation.steps: [1, 2] until step 6, [1] from there",
        "changed  training.checkpoint_every: 3 until step 6, 5 from there",
        "changed  training.steps: 12 until step 6, 14 from there",
    ):
        assert line in out
    run = tmp_path / "run"
    assert yaml.safe_load((run / "recipe-until-6.yaml").read_text())["training"]["steps"] == 12
    assert yaml.safe_load((run / "recipe.yaml").read_text())["training"]["steps"] == 14
    assert checkpoints(run) == ["step-00000010", "step-00000014"]
    # The steps made stay; the learning rate of the later ones falls to the new end.
    assert losses(run)[:6] == losses(finished[0])[:6]
    assert losses(run)[8] != losses(finished[0])[8]


def test_a_finished_run_with_more_steps_goes_on_and_is_unfinished_until_then(tmp_path, tiny, finished):
    shutil.copytree(finished[0], tmp_path / "run")
    command = ("--recipe", tiny, "--output", tmp_path / "run")
    with training_only(stop_before=13):
        assert call(*command, "--set", "training.steps=15")[0] == 130
    assert not (tmp_path / "run" / "evaluation.json").exists()
    status, _, err = call(*command, "--set", "training.steps=11")
    assert status == 2
    assert err.startswith("error: training.steps 11: expected at least the 12 steps that the run in ")


def test_half_a_line_in_the_log_is_dropped(tmp_path, tiny, stopped, finished):
    shutil.copytree(stopped, tmp_path / "run")
    with (tmp_path / "run" / "steps.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 7, "lo')
    with training_only():
        assert call("--recipe", tiny, "--output", tmp_path / "run")[0] == 0
    assert_same_run(tmp_path / "run", finished[0])


def test_only_the_newest_checkpoints_stay(finished, stopped):
    assert checkpoints(stopped) == ["step-00000003", "step-00000006"]
    assert checkpoints(finished[0]) == ["step-00000009", "step-00000012"]


def test_a_finished_run_prints_its_table_again_and_changes_nothing(tiny, finished):
    folder, printed = finished
    before = snapshot(folder)
    status, out, err = call("--recipe", tiny, "--output", folder)
    assert (status, err) == (0, "")
    table = printed[printed.index("sampler ") : printed.index("reloaded with")]
    assert "is finished; --fresh starts again" in out
    assert table in out
    assert snapshot(folder) == before


def test_fresh_starts_again(tmp_path, tiny, finished):
    shutil.copytree(finished[0], tmp_path / "run")
    first = (tmp_path / "run" / "steps.jsonl").read_bytes()
    with training_only():
        status, out, _ = call("--recipe", tiny, "--output", tmp_path / "run", "--fresh")
    assert status == 0
    assert "resuming" not in out
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert (tmp_path / "run" / "steps.jsonl").read_bytes() != first
    assert_same_run(tmp_path / "run", finished[0])


def test_fresh_takes_another_recipe(tmp_path, tiny, stopped):
    shutil.copytree(stopped, tmp_path / "run")
    with training_only():
        command = ("--recipe", tiny, "--output", tmp_path / "run", "--set", "training.steps=2")
        command = (*command, "--set", "training.batch_size=4")
        status, _, err = call(*command)
        assert status == 2
        assert "is a run of another recipe (training.batch_size: expected 8, got 4); choose another folder" in err
        assert call(*command, "--fresh")[0] == 0
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    "name", ["student.safetensors", "ema-0.999.safetensors", "optimizer.safetensors", "state.json"]
)
def test_a_truncated_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, tiny, stopped, finished, name):
    shutil.copytree(stopped, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000006" / name
    file.write_bytes(file.read_bytes()[:-7])
    with training_only():
        status, out, _ = call("--recipe", tiny, "--output", tmp_path / "run")
    assert status == 0
    size = file.stat().st_size if file.exists() else "[0-9]+"
    assert re.search(
        rf"checkpoint {file.parent}: {name} is truncated or changed \({size} bytes\); using the one before it\n", out
    )
    assert "resuming from step-00000003" in out
    assert_same_run(tmp_path / "run", finished[0])


def test_when_all_checkpoints_are_damaged_nothing_is_touched(tmp_path, tiny, stopped):
    shutil.copytree(stopped, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    before = snapshot(tmp_path)
    status, _, err = call("--recipe", tiny, "--output", tmp_path / "run")
    assert status == 2
    assert err.splitlines()[-1].endswith(
        "step-00000003: manifest.json is missing or unreadable, and there is none before it: start again with --fresh"
    )
    assert snapshot(tmp_path) == before


def test_without_the_damaged_checkpoint_the_run_goes_on_from_the_one_before(tmp_path, tiny, stopped, finished):
    shutil.copytree(stopped, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    with training_only():
        status, out, _ = call("--recipe", tiny, "--output", tmp_path / "run")
    assert status == 0
    assert "resuming from step-00000003" in out
    assert_same_run(tmp_path / "run", finished[0])


@contextlib.contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file grows over a number of bytes, as on a disk that is almost full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_later(tmp_path, tiny, stopped, finished):
    shutil.copytree(stopped, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    before = snapshot(newest)
    with limited_files(300_000):
        status, out, err = call("--recipe", tiny, "--output", tmp_path / "run")
    assert status == 2, err
    assert "resuming from step-00000006" in out
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith(f"error: {newest.with_name('step-00000009')} could not be written (")
    assert last.endswith("make room or choose another --output, then run the same command again")
    assert checkpoints(tmp_path / "run") == ["step-00000003", "step-00000006"]
    assert snapshot(newest) == before
    assert checkpoint.load(newest).step == 6
    with training_only():
        assert call("--recipe", tiny, "--output", tmp_path / "run")[0] == 0
    assert_same_run(tmp_path / "run", finished[0])


def test_a_full_disk_while_logging_is_one_line_too(tmp_path, tiny, stopped):
    shutil.copytree(stopped, tmp_path / "run")
    # Room for the six lines that stay and no more.
    size = sum(len(line) for line in (stopped / "steps.jsonl").read_bytes().splitlines(keepends=True)[:6]) + 20
    with limited_files(size):
        status, _, err = call("--recipe", tiny, "--output", tmp_path / "run")
    assert status == 2, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"error: {tmp_path / 'run' / 'steps.jsonl'} could not be written (")
    assert checkpoint.load(checkpoint.newest(tmp_path / "run" / "checkpoints")).step == 6


def test_the_log_has_one_line_a_step(finished):
    assert [step for step, *_ in losses(finished[0])] == list(range(STEPS))
