"""The whole command with the student split over two processes, as FSDP2 does it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy

from fmm_distill.config.recipe import Recipe
from fmm_distill.errors import UserError
from fmm_distill.training.checkpoint import newest
from fmm_distill.training.fsdp import check_sharding, gather_in_float32, wrap_blocks, wrapped_blocks
from tests.cli.runs import STEPS, call, losses, spawn
from tests.processes import on_two_processes

SHARDED = Path(__file__).with_name("sharded_cli.py")


def sharded(*arguments, precision="no"):
    run = on_two_processes(SHARDED, precision, *arguments)
    assert run.returncode == 0, run.stderr
    return run.stdout


def tensors(folder, name):
    return load_file(newest(folder / "checkpoints") / f"{name}.safetensors")


def assert_same_end(run, other, rel=2e-3):
    """The same losses, checkpoints of the same whole tensors, and the same weights but for rounding."""
    for mine, theirs in zip(losses(run), losses(other), strict=True):
        assert mine == pytest.approx(theirs, rel=rel)
    for name in ("student", "ema-0.999", "optimizer"):
        ours, others = tensors(run, name), tensors(other, name)
        assert ours.keys() == others.keys()
        assert all(ours[key].shape == others[key].shape for key in ours)
    for name in ("student", "ema-0.999"):
        ours, others = tensors(run, name), tensors(other, name)
        assert max(float((ours[key] - others[key]).abs().max()) for key in ours) < 1e-3, name


@pytest.fixture(scope="module")
def split_run(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("split") / "run"
    watch = ("--set", "evaluation.every=5")
    return folder, sharded("--recipe", tiny, "--output", folder, *watch)


def test_a_split_run_gives_the_numbers_of_one_process(split_run, finished):
    folder, said = split_run
    assert "FSDP: split over 2 processes; gathered at a time: ResnetBlock2D" in said.splitlines()
    assert len(losses(folder)) == STEPS
    assert_same_end(folder, finished[0])
    assert (folder / "student" / "steps-2" / "model_index.json").is_file()
    assert len((folder / "evaluations.jsonl").read_text().splitlines()) == 2


def without_the_end(run, target):
    """A run as it is when it was killed after its checkpoint before the last."""
    shutil.copytree(run, target)
    shutil.rmtree(newest(target / "checkpoints"))
    (target / "evaluation.json").unlink()
    shutil.rmtree(target / "student")
    return target


def test_a_split_run_goes_on_in_one_process(tmp_path, split_run, tiny, finished):
    folder = without_the_end(split_run[0], tmp_path / "run")
    status, out, _ = call("--recipe", tiny, "--output", folder, "--set", "evaluation.every=5")
    assert status == 0
    assert "resuming from step-00000009" in out
    assert_same_end(folder, finished[0])


def test_a_run_of_one_process_goes_on_split(tmp_path, tiny, finished):
    folder = without_the_end(finished[0], tmp_path / "run")
    assert "resuming from step-00000009" in sharded("--recipe", tiny, "--output", folder)
    assert_same_end(folder, finished[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        ("name=eulerian", "stop_gradient=target"),
        ("stop_gradient=teacher_input", "derivative=exact"),
    ],
    ids=" ".join,
)
def test_forward_mode_goes_around_what_gathers_blocks(tmp_path, tiny, loss):
    settings = [
        "--recipe",
        tiny,
        "--set",
        "training.steps=3",
        *(part for each in loss for part in ("--set", f"loss.{each}")),
    ]
    sharded(*settings, "--output", tmp_path / "split")
    with spawn(*settings, "--output", tmp_path / "one") as one:
        assert one.wait() == 0, one.stderr.read()
    found, expected = losses(tmp_path / "split"), losses(tmp_path / "one")
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)


@pytest.mark.slow
def test_half_precision_is_of_the_split_students_calls_alone(tmp_path, tiny):
    settings = ("--recipe", tiny, "--set", "training.precision=bf16", "--set", "training.steps=3")
    sharded(*settings, "--output", tmp_path / "split", precision="bf16")
    with spawn(*settings, "--output", tmp_path / "one") as one:
        assert one.wait() == 0, one.stderr.read()
    for mine, theirs in zip(losses(tmp_path / "split"), losses(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, rel=5e-3)
    weights = tensors(tmp_path / "split", "student")
    assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}


@pytest.fixture
def split_state():
    """An accelerator of this process that says it splits weights; accelerate's state is put back."""
    accelerator = Accelerator(cpu=True)
    kept = [(state, dict(state)) for state in (AcceleratorState._shared_state, PartialState._shared_state)]

    def state(kind, plugin=None):
        AcceleratorState._shared_state |= {"distributed_type": kind, "fsdp_plugin": plugin}
        return accelerator

    yield state
    for shared, before in kept:
        shared.clear()
        shared.update(before)


FSDP = FullyShardedDataParallelPlugin


@pytest.mark.parametrize(
    ("kind", "plugin", "settings", "wanted"),
    [
        (
            DistributedType.DEEPSPEED,
            None,
            {},
            "expected plain multi-GPU or FSDP2, got DEEPSPEED, which is not supported",
        ),
        (DistributedType.MEGATRON_LM, None, {}, "got MEGATRON_LM"),
        (DistributedType.FSDP, {"fsdp_version": 1}, {}, "expected fsdp_version: 2, got version 1"),
        (
            DistributedType.FSDP,
            {},
            {"training": {"compile": "inductor"}},
            "training.compile: expected none under FSDP, got inductor",
        ),
        (
            DistributedType.FSDP,
            {"auto_wrap_policy": "SIZE_BASED_WRAP"},
            {},
            "got SIZE_BASED_WRAP, which also wraps the flow map",
        ),
        (
            DistributedType.FSDP,
            {"activation_checkpointing": True},
            {},
            "expected false, got true.* try training.gradient_checkp",
        ),
    ],
)
def test_other_ways_to_split_are_refused(split_state, kind, plugin, settings, wanted):
    made = None if plugin is None else FSDP(**{"fsdp_version": 2} | plugin)
    with pytest.raises(UserError, match=wanted):
        check_sharding(split_state(kind, made), Recipe(**settings))


def test_adapters_are_not_split(split_state):
    accelerator = split_state(DistributedType.FSDP, FSDP(fsdp_version=2))
    check_sharding(accelerator, Recipe())
    with pytest.raises(UserError, match=r"student.lora.rank: expected 0 under FSDP, got 4.* try 0, or plain"):
        check_sharding(accelerator, Recipe(student={"lora": {"rank": 4}}))


def test_factored_moments_are_not_split(split_state):
    accelerator = split_state(DistributedType.FSDP, FSDP(fsdp_version=2))
    with pytest.raises(UserError, match="expected moments of the shape of their parameters under FSDP"):
        check_sharding(accelerator, Recipe(optimizer={"name": "Adafactor"}))
    for name in ("SGD", "RMSprop", "NAdam"):
        check_sharding(accelerator, Recipe(optimizer={"name": name}))


def test_a_check_of_the_split_changes_nothing(split_state):
    plugin = FSDP(fsdp_version=2, mixed_precision_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    accelerator = split_state(DistributedType.FSDP, plugin)
    check_sharding(accelerator, Recipe())
    assert plugin.mixed_precision_policy is not None
    gather_in_float32(accelerator)
    assert plugin.mixed_precision_policy is None


def test_blocks_are_the_networks_own_unless_they_are_named(split_state, teacher):
    own = FSDP(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    teacher.network._no_split_modules = ["Attention", "NotThere"]
    accelerator = split_state(DistributedType.FSDP, own)
    blocks = wrapped_blocks(accelerator, teacher.network)
    assert blocks == ["Attention"]
    assert own.transformer_cls_names_to_wrap is None
    assert wrap_blocks(accelerator, blocks).endswith("at a time: Attention")
    assert own.transformer_cls_names_to_wrap == ["Attention"]
    accelerator = split_state(DistributedType.FSDP, FSDP(fsdp_version=2))
    blocks = wrapped_blocks(accelerator, teacher.network)
    assert wrap_blocks(accelerator, blocks).endswith(": the complete network")
    wrong = FSDP(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", transformer_cls_names_to_wrap=["Resnet", "Attention"]
    )
    with pytest.raises(UserError, match="expected classes of UNet2DModel, got Resnet; try some of"):
        wrapped_blocks(split_state(DistributedType.FSDP, wrong), teacher.network)
