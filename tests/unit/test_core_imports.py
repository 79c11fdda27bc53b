"""The mathematics depends on torch and the standard library alone."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import fmm_distill.core

ALL = """
import importlib, json, pkgutil, sys
import torch
import torch.utils.checkpoint
before = {name.partition(".")[0] for name in sys.modules}
import fmm_distill.core
names = [m.name for m in pkgutil.walk_packages(fmm_distill.core.__path__, "fmm_distill.core.")]
for name in names:
    importlib.import_module(name)
after = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([names, sorted(after - before - set(sys.stdlib_module_names))]))
"""


def test_core_imports_torch_alone():
    ran = subprocess.run([sys.executable, "-c", ALL], capture_output=True, text=True, check=True)
    names, loaded = json.loads(ran.stdout)
    assert names == [m.name for m in pkgutil.walk_packages(fmm_distill.core.__path__, "fmm_distill.core.")]
    assert {"fmm_distill.core.derivatives.engines", "fmm_distill.core.schedules.flow"} < set(names)
    assert loaded == ["fmm_distill"]
