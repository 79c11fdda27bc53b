"""A run that is killed again and again ends with the weights of one that never was."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.cli.runs import TINY, call, losses, training_only
from tests.processes import PACKAGE

DRIVER = Path(__file__).parent / "killed_training.py"
STEPS = 40


SCALED = {"student": {"kind": "scaled", "regression_steps": 10}, "time_sampling": {"groups": 2}}


STAGE = {"steps": 10, "critic": {"warmup_steps": 5}}


@pytest.mark.parametrize(
    ("kills", "more"),
    [
        (4, {}),
        pytest.param(20, {}, marks=pytest.mark.slow),
        # The regression trains other weights than the losses after it.
        pytest.param(8, SCALED, marks=pytest.mark.slow),
        pytest.param(
            8,
            SCALED | {"student": SCALED["student"] | {"lora": {"rank": 2}}, "time_sampling": {}},
            marks=pytest.mark.slow,
        ),
        pytest.param(10, {"matching": STAGE}, marks=pytest.mark.slow),
    ],
    ids=["4", "20", "scaled", "scaled-lora", "matching"],
)
def test_kills_change_nothing(tmp_path, teacher_folder, kills, more):
    training = TINY["training"] | {"steps": STEPS, "batch_size": 2, "checkpoint_every": 2, "ema": [0.9, 0.99]}
    loss = {"name": "progressive", "target": "frozen"}
    settings = {"teacher": str(teacher_folder)} | TINY | {"loss": loss, "weight": {"kind": "learned"}}
    settings["training"] = training | {"target_update_every": 7}
    settings |= more
    second = settings.get("matching")
    if second is not None:
        settings["training"] |= {"steps": STEPS - 15}
    total = STEPS + settings.get("student", {}).get("regression_steps", 0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    with training_only():
        assert call("--recipe", recipe, "--output", tmp_path / "whole")[0] == 0
    run = PACKAGE.together((DRIVER, recipe, tmp_path / "killed", kills), [dict(os.environ)])
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    # Every kill met a process at work, and the last one was let go on to the end.
    assert found["statuses"] == [-signal.SIGKILL] * kills + [0]
    assert len(set(found["steps"])) > kills / 3
    assert found["steps"] == sorted(found["steps"])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    names = ["student", "ema-0.9", "ema-0.99", "optimizer", "frozen", "weight"]
    for name in names + (["critic", "critic_average", "critic_optimizer"] if second else []):
        file = Path("checkpoints") / f"step-{total:08d}" / f"{name}.safetensors"
        ours, theirs = load_file(tmp_path / "killed" / file), load_file(tmp_path / "whole" / file)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), name
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir() if path.name.startswith(".")] == []
