"""Tiny real teachers, saved as pipelines and loaded back by path. No network, no GPU."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile

# Before any library reads them. Nothing is kept in the user's own caches.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="fmm_distill_tests_")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Processes that tests start: each test process has one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.load import load_teacher
from tests.processes import PACKAGE, STOCK

torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Leave modules and collected tests out of garbage collections: nearly all objects are theirs."""
    gc.collect()
    gc.freeze()


def tiny_unet(**changes: object) -> UNet2DModel:
    """A UNet of 8x8 gray images with attention and some thousand parameters; the same one every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 8,
        }
        return UNet2DModel(**(config | changes))


def save_teacher(folder: Path, unet: UNet2DModel | None = None, scheduler: object | None = None) -> Path:
    """A pipeline folder as ``save_pretrained`` writes it; v_prediction on the linear schedule by default."""
    scheduler = scheduler or DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    DDPMPipeline(unet=unet or tiny_unet(), scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def teacher(teacher_folder: Path) -> Teacher:
    return load_teacher(str(teacher_folder))


@pytest.fixture(scope="session", autouse=True)
def stock_processes() -> Iterator[None]:
    """Verify exports in forks of one process, but in ``own_processes()``: its imports take longer than the work."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fmm_distill.export.verify.subprocess", STOCK)
        yield
    PACKAGE.close()
    STOCK.close()
