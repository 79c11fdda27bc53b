"""Modes of the calling process change no number of a run, and are the caller's again afterwards."""

from __future__ import annotations

import contextlib
import random
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from safetensors.torch import load_file

from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.core.torch_state import own_state
from fmm_distill.errors import UserError
from fmm_distill.export.load import load_student
from fmm_distill.run.distill import distill
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from tests.cli.runs import TINY, training_only
from tests.logs import logged


@contextlib.contextmanager
def changed(setter, getter, value):
    before = getter()
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextlib.contextmanager
def newer_switch():
    place = torch.backends.mkldnn.matmul
    before = place.fp32_precision
    place.fp32_precision = "bf16"
    try:
        yield
    finally:
        place.fp32_precision = before


@contextlib.contextmanager
def drawn():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def dtype(value):
    return changed(torch.set_default_dtype, torch.get_default_dtype, value)


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "float64": lambda: dtype(torch.float64),
    "bfloat16": lambda: dtype(torch.bfloat16),
    "a device around it": lambda: torch.device("meta"),
    "a default device": lambda: changed(torch.set_default_device, torch.get_default_device, "meta"),
    "deterministic": lambda: changed(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode, "error"),
    "matmul": lambda: changed(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision, "medium"),
    "matmul by the newer switch": newer_switch,
    "another seed": drawn,
    "strict numpy": lambda: np.errstate(all="raise"),
}


def recipe_of(teacher: Path, **training: object) -> Recipe:
    settings = {"teacher": str(teacher)} | TINY
    settings["training"] = settings["training"] | {"steps": 2, "ema": 0.9} | training
    return parse(settings, "here")


def state() -> tuple[object, ...]:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_deterministic_debug_mode(),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.get_num_threads(),
        torch.get_rng_state().tolist()[:64],
        str(np.random.get_state()),
        random.getstate(),
        tuple(np.geterr().items()),
        str(GradientState._shared_state),
    )


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step-00000002" / "student.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, teacher_folder) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("plain")
    with training_only():
        run(teacher_folder, folder)
    return trained(folder)


def run(teacher: Path, folder: Path, **training: object) -> None:
    # Without its end a run has no evaluation to give.
    distill(recipe_of(teacher, **training), folder)


@pytest.mark.parametrize("name", STATES)
def test_a_mode_of_the_caller_changes_nothing(tmp_path, teacher_folder, plain, name):
    with STATES[name]():
        before = state()
        with training_only():
            run(teacher_folder, tmp_path)
        assert state() == before
    found = trained(tmp_path)
    assert found.keys() == plain.keys()
    assert all(found[key].equal(plain[key]) for key in plain)


@pytest.mark.parametrize("name", ["autocast", "float64", "no_grad"])
def test_what_is_set_aside_is_logged_once(tmp_path, teacher_folder, name):
    lines = []
    with STATES[name](), training_only(), logged(lines):
        run(teacher_folder, tmp_path)
    assert [name in line.replace("torch.", "") for line in lines if line.startswith("set aside")] == [True]


def test_a_complete_run_and_its_reload(tmp_path, teacher_folder):
    """Evaluation, export, verification and loading too, in several modes at once."""
    with contextlib.ExitStack() as stack:
        for name in ("inference_mode", "float64", "a default device", "autocast"):
            stack.enter_context(STATES[name]())
        before = state()
        run(teacher_folder, tmp_path)
        loaded = load_student(tmp_path / "student")
        assert state() == before
    weights = list(loaded.flow_map.parameters())
    assert {(value.dtype, value.device.type, value.is_inference()) for value in weights} == {
        (torch.float32, "cpu", False)
    }
    noise = torch.randn(2, *loaded.event_shape, generator=torch.Generator().manual_seed(0))
    assert sample(loaded.flow_map, noise, 2).isfinite().all()


@pytest.mark.parametrize("name", ["bfloat16", "a device around it", "inference_mode"])
def test_a_teacher_and_a_student_by_hand(teacher_folder, teacher, name):
    with STATES[name]():
        student = Student.from_teacher(load_teacher(str(teacher_folder)))
    expected = Student.from_teacher(teacher)
    for ours, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert ours.equal(theirs)
        assert not ours.is_inference()


def test_levels_that_do_not_nest_are_refused(tmp_path, teacher_folder):
    recipe = recipe_of(teacher_folder)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(UserError, match=r"dual_level\(\).* leave it first"):
        distill(recipe, tmp_path / "a")
    refused = pytest.raises(UserError, match=r"torch\.func transform .* leave it first")
    with refused:
        torch.func.grad(lambda x: distill(recipe, tmp_path / "b") and x)(torch.ones(()))
    with refused:
        torch.func.vmap(lambda x: load_teacher(str(teacher_folder)) and x)(torch.ones(2))
    assert list(tmp_path.iterdir()) == []


def test_state_is_restored_after_an_error(tmp_path, teacher_folder):
    with dtype(torch.float64):
        before = state()
        with pytest.raises(UserError, match=r"training\.batch_size: expected a multiple"):
            run(teacher_folder, tmp_path, gradient_accumulation_steps=3)
        with pytest.raises(ZeroDivisionError):
            fail()
        assert state() == before


@own_state()
def fail() -> None:
    torch.manual_seed(3)
    random.seed(3)
    raise ZeroDivisionError


def test_the_last_of_calls_that_overlap_restores():
    with dtype(torch.float64):
        first, second = own_state(), own_state()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32
        second.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float64


def test_a_second_run_at_once_is_refused_and_later_ones_work(tmp_path, teacher_folder, plain):
    started, found = threading.Event(), []

    def second() -> None:
        started.wait()
        try:
            run(teacher_folder, tmp_path / "second")
        except UserError as error:
            found.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()

    def wait(_: str) -> None:
        started.set()
        thread.join()

    with training_only():
        with logged([], wait):
            run(teacher_folder, tmp_path / "first")
        assert found == [line for line in found if "another distill() is active in this process" in line]
        assert len(found) == 1
        assert not (tmp_path / "second").exists()
        # From within the first run, too.
        inner = partial(run, teacher_folder, tmp_path / "inner")
        with pytest.raises(UserError, match="another distill"), logged([], lambda _: inner()):
            run(teacher_folder, tmp_path / "outer")
        run(teacher_folder, tmp_path / "third")
    assert all(trained(tmp_path / "third")[key].equal(plain[key]) for key in plain)


def test_the_accumulation_of_the_callers_own_loop_is_kept(tmp_path, teacher_folder):
    from accelerate import Accelerator

    own = Accelerator(gradient_accumulation_steps=3)
    with training_only():
        run(teacher_folder, tmp_path, gradient_accumulation_steps=2)
    assert own.gradient_accumulation_steps == 3
