"""Environment variables of accelerate, torch and diffusers: the recipe wins, or a line refuses one by its name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.errors import UserError
from fmm_distill.run.distill import distill
from fmm_distill.run.plan import plan
from fmm_distill.training.process import join_processes, make_accelerator
from tests.cli.runs import TINY, call, losses, training_only
from tests.logs import logged

# Each variable that accelerate reads, or a prefix of several: what becomes of it, and a value to try.
WINS, REFUSED, HARMLESS, KEPT = "the recipe wins", "refused", "changes no number", "followed on purpose"
TABLE: dict[str, tuple[str, str, str]] = {
    "ACCELERATE_MIXED_PRECISION": (WINS, "bf16", "training.precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (WINS, "4", "training.gradient_accumulation_steps"),
    "ACCELERATE_DYNAMO_": (WINS, "BACKEND=inductor", "training.compile; the others go with the backend"),
    "ACCELERATE_FP8_BACKEND": (REFUSED, "TE", "layers would be replaced, whatever the precision"),
    "ACCELERATE_FP8_": (HARMLESS, "FORMAT=E4M3", "read under fp8 alone, which no recipe has"),
    "FP8_": (HARMLESS, "FORMAT=E4M3", "the same under an older prefix"),
    "ACCELERATE_USE_DEEPSPEED": (REFUSED, "true", ""),
    "ACCELERATE_DEEPSPEED_": (HARMLESS, "ZERO_STAGE=3", "read under DeepSpeed alone"),
    "ACCELERATE_CONFIG_DS_FIELDS": (HARMLESS, "zero_stage", "the same"),
    "ACCELERATE_GRADIENT_CLIPPING": (HARMLESS, "1e-9", "the same"),
    "ACCELERATE_USE_MEGATRON_LM": (REFUSED, "true", ""),
    "MEGATRON_LM_": (HARMLESS, "TP_DEGREE=2", "read under Megatron-LM alone"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (REFUSED, "true", ""),
    "PARALLELISM_CONFIG_": (HARMLESS, "TP_SIZE=2", "read with a device mesh alone"),
    "ACCELERATE_ALLOW_CP_STANDALONE": (HARMLESS, "true", "the same"),
    "ACCELERATE_USE_SAGEMAKER": (REFUSED, "true", ""),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": (HARMLESS, "DATA_PARALLEL", "read under SageMaker alone"),
    "ACCELERATE_INIT_INCLUDE_BUFFERS": (REFUSED, "1", "networks opened without buffers"),
    "ACCELERATE_USE_FSDP": (REFUSED, "true", "without a launcher; else followed, see sharding.py"),
    "FSDP_": (KEPT, "VERSION=2", "read under FSDP alone, where sharding.py judges them"),
    "ACCELERATE_USE_CPU": (KEPT, "true", "the device"),
    "ACCELERATE_TORCH_DEVICE": (REFUSED, "meta", "a device that computes is followed"),
    "ACCELERATE_CPU_AFFINITY": (HARMLESS, "0", "which cores"),
    "ACCELERATE_DEBUG_MODE": (HARMLESS, "true", "compares shapes before collective calls"),
    "ACCELERATE_DEBUG_RDV_FILE": (HARMLESS, "x", "of accelerate's own launcher"),
    "ACCELERATE_DOWNCAST_BF16": (HARMLESS, "yes", "of TPUs, which no recipe runs on"),
    "XLA_": (HARMLESS, "USE_BF16=1", "the same"),
    "USE_TORCH_XLA": (HARMLESS, "0", "the same"),
    "ACCELERATE_BYPASS_DEVICE_MAP": (HARMLESS, "true", "of models spread over devices"),
    "ACCELERATE_ENABLE_RICH": (HARMLESS, "false", "colors"),
    "ACCELERATE_LOG_LEVEL": (HARMLESS, "error", "messages; an unknown level is refused"),
    "FORK_LAUNCHED": (HARMLESS, "0", "of notebooks"),
    "CLEARML_": (HARMLESS, "PROJECT=x", "of a tracker that no recipe has"),
    "MLFLOW_": (HARMLESS, "TAGS=x", "of a tracker that no recipe has"),
    "NCCL_": (HARMLESS, "P2P_DISABLE=1", "how processes send"),
    "OMP_NUM_THREADS": (HARMLESS, "1", "threads; rounding alone"),
    "MASTER_": (HARMLESS, "PORT=29511", "where processes meet"),
    "RANK": (REFUSED, "3", "beyond the number of processes"),
    "WORLD_SIZE": (REFUSED, "2", "processes that accelerate does not join"),
    "OMPI_COMM_WORLD_SIZE": (REFUSED, "2", "the same"),
    "PMI_SIZE": (REFUSED, "2", "the same"),
    "MV2_COMM_WORLD_SIZE": (REFUSED, "2", "the same"),
    "OMPI_COMM_WORLD_RANK": (HARMLESS, "0", "read with its size"),
    "PMI_RANK": (HARMLESS, "0", "read with its size"),
    "MV2_COMM_WORLD_RANK": (HARMLESS, "0", "read with its size"),
    "LOCAL_": (KEPT, "WORLD_SIZE=1", "set by launchers"),
    "NODE_RANK": (HARMLESS, "0", "of a launcher"),
    "NPROC": (HARMLESS, "2", "of a launcher"),
    "TPU_NAME": (HARMLESS, "x", "of a launcher"),
    "PJRT_DEVICE": (HARMLESS, "CPU", "of a launcher"),
    "KAGGLE": (HARMLESS, "x", "of a launcher"),
    "AWS_": (HARMLESS, "PROFILE=x", "of a launcher"),
    "DEEPSPEED_USE_HPU": (HARMLESS, "true", "of another device"),
    "PT_HPU_LAZY_MODE": (HARMLESS, "0", "of another device"),
    "PYTORCH_ENABLE_MPS_FALLBACK": (HARMLESS, "1", "which device an operation takes"),
}
# Of other packages, and only those that change numbers or leave a setting without effect.
OTHERS = {"DIFFUSERS_ATTN_BACKEND": "sage", "TORCHDYNAMO_DISABLE": "1", "TORCH_COMPILE_DISABLE": "1"}


def named(name: str) -> tuple[str, str]:
    """A variable and its value to try."""
    value = TABLE[name][1]
    if name.endswith("_"):
        end, value = value.split("=")
        return name + end, value
    return name, value


def of(kind: str) -> list[str]:
    return [name for name, (found, _, _) in TABLE.items() if found == kind]


@pytest.fixture(autouse=True)
def fresh():
    """accelerate as it is in a process that has made no accelerator; what was there is put back."""
    states = (AcceleratorState, GradientState, PartialState)
    kept = [dict(state._shared_state) for state in states]
    for state in states:
        state._shared_state.clear()
    yield
    for state, before in zip(states, kept, strict=True):
        state._shared_state.clear()
        state._shared_state.update(before)


def recipe_of(teacher: Path, **training: object) -> Recipe:
    settings = {"teacher": str(teacher)} | TINY
    settings["training"] = settings["training"] | {"steps": 2} | training
    return parse(settings, "here")


def trained(teacher: Path, folder: Path, **training: object) -> tuple[list[tuple], list[str]]:
    lines: list[str] = []
    with training_only(), logged(lines):
        distill(recipe_of(teacher, **training), folder)
    return losses(folder), lines


@pytest.fixture(scope="module")
def plain(tmp_path_factory, teacher_folder):
    folder = tmp_path_factory.mktemp("plain")
    return {
        parts: trained(teacher_folder, folder / str(parts), gradient_accumulation_steps=parts)[0] for parts in (1, 2)
    }


def test_the_table_has_each_variable_that_accelerate_reads():
    root = Path(accelerate.__file__).parent
    found = set()
    for file in root.rglob("*.py"):
        if file.relative_to(root).parts[0] in ("commands", "test_utils"):
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            if "environ" in line or "_from_env(" in line:
                # A name that follows a prefix is in the table by its prefix.
                found |= set(re.findall(r'(?:get\(|getenv\(|from_env\(\[?|, |environ\[)"([A-Z][A-Z0-9_]+)"', line))
        prefixes = re.findall(r'prefix = "([A-Z0-9_]+)"', file.read_text(encoding="utf-8"))
        found |= set(prefixes)
    values = {
        "FULL_SHARD",
        "FULL_STATE_DICT",
        "HYBRID",
        "MSAMP",
        "NO",
        "NO_WRAP",
        "O1",
        "O2",
        "SHARDED_STATE_DICT",
        "FOO",
        "ACCELERATE_",
    }
    missing = {name for name in found - values if not any(name.startswith(known) for known in TABLE)}
    assert len(found) > 60
    assert missing == set()


@pytest.mark.parametrize(
    ("parts", "changes", "setting"),
    [
        (1, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "training.gradient_accumulation_steps: 1"),
        (2, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, "training.gradient_accumulation_steps: 2"),
        (1, {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_DYNAMO_USE_DYNAMIC": "maybe"}, "training.compile: none"),
        (1, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "training.precision: fp32"),
        (1, {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_FP8_FORMAT": "E4M3"}, "training.precision: fp32"),
    ],
)
def test_the_recipe_wins_with_a_line(tmp_path, teacher_folder, plain, monkeypatch, parts, changes, setting):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    found, lines = trained(teacher_folder, tmp_path, gradient_accumulation_steps=parts)
    assert found == plain[parts]
    name, value = next(iter(changes.items()))
    assert lines.count(f"{name}={value.lower()} is ignored: the recipe has {setting}") == 1


def test_what_the_launcher_sets_by_itself_is_no_line(tmp_path, teacher_folder, plain, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    found, lines = trained(teacher_folder, tmp_path)
    assert found == plain[1]
    assert not [line for line in lines if "ignored" in line]


def test_all_that_are_harmless_at_once(tmp_path, teacher_folder, plain, monkeypatch):
    for name in of(HARMLESS) + of(WINS) + of(KEPT):
        monkeypatch.setenv(*named(name))
    assert trained(teacher_folder, tmp_path)[0] == plain[1]


@pytest.mark.parametrize("name", of(REFUSED))
def test_what_a_recipe_can_not_express_is_refused_by_its_name(tmp_path, teacher_folder, monkeypatch, name):
    monkeypatch.setenv(*named(name))
    says = "processes were launched" if name.endswith("_SIZE") else name
    with pytest.raises(UserError, match=says) as caught:
        trained(teacher_folder, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", [name for name in of(REFUSED) if name.startswith("ACCELERATE_USE") and "FSDP" not in name]
)
def test_an_evaluation_and_a_plan_refuse_them_too(teacher_folder, monkeypatch, name):
    monkeypatch.setenv(*named(name))
    with pytest.raises(UserError, match=name):
        join_processes()
    with pytest.raises(UserError, match=name):
        plan(recipe_of(teacher_folder))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_CPU", "maybe"),
        ("ACCELERATE_DEBUG_MODE", ""),
        ("ACCELERATE_USE_DEEPSPEED", "stage3"),
        ("WORLD_SIZE", "two"),
        ("LOCAL_RANK", "x"),
        ("ACCELERATE_LOG_LEVEL", "loud"),
        ("ACCELERATE_TORCH_DEVICE", "gpu"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:99"),
        ("ACCELERATE_FP8_BACKEND", "ours"),
    ],
)
def test_a_value_that_can_not_be_read_is_one_line(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(f"{name}={value}")) as caught:
        make_accelerator(Recipe(), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_variables_of_other_packages(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    recipe = Recipe()
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"compile": "eager"})})
    with pytest.raises(UserError, match=f"{name}={value}: "):
        make_accelerator(recipe, tmp_path)


def test_an_accelerator_of_the_caller_that_compiles_is_refused(tmp_path):
    accelerate.Accelerator(dynamo_backend="eager")
    with pytest.raises(UserError, match="got an Accelerator of this process that compiles"):
        make_accelerator(Recipe(), tmp_path)


def test_text_encoders_are_opened_with_their_buffers_in_each_process(tmp_path, monkeypatch):
    # Where accelerate splits nothing it is refused, but later than the variable is set.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_FSDP is set, but accelerate splits nothing here"):
        make_accelerator(Recipe(), tmp_path)
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"].lower() == "false"
    with pytest.raises(UserError):
        distill(Recipe(), tmp_path / "run")
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"].lower() == "false"


def test_the_command_says_it_in_one_line_before_anything_is_imported(monkeypatch):
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "loud")
    code = "import sys; from fmm_distill.cli import main; sys.argv[1:] = ['--recipe', 'digits', '--dry-run']; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "error: ACCELERATE_LOG_LEVEL=loud: no level of logging; unset it, or take info\n"


def test_the_dry_run_refuses_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    status, _, err = call("--recipe", "digits", "--dry-run")
    assert status == 2
    assert "ACCELERATE_USE_DEEPSPEED=true: DeepSpeed is not supported" in err
    assert json.dumps(err).count("\\n") == 1
