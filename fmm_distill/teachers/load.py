"""From an id or a folder to a teacher: the components decide which adapter opens it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from fmm_distill.errors import UserError
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.unet2d import SCHEDULERS, load_unet2d

__all__ = ["Found", "load_teacher"]

BUILTIN = Path(__file__).parent.parent / "builtin"
