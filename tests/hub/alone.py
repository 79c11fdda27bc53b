"""A process with a Hub of its own: there the real client reads its environment, and the test can change the Hub."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hub.server import Account, Hub, environment, serve

ROOT = Path(__file__).parents[2]
TOKEN = "hf_writes"
ACCOUNTS = {
    TOKEN: Account("tester", "write"),
    "hf_reads": Account("tester", "read"),
    "hf_other": Account("somebody", "write"),
}


def alone(home: Path, *calls: tuple[Callable[..., Any], tuple[object, ...]]) -> dict[str, Any]:
    """What each ``function(hub, *arguments)`` gives, by its name, in one new process: each with an empty Hub and cache.

    Arguments and results travel as JSON. Their module may import nothing that imports huggingface_hub, but inside the
    functions.
    """
    listed = [(function.__module__, function.__name__, arguments) for function, arguments in calls]
    told = json.dumps([str(home), listed], default=str)
    command = [sys.executable, "-m", "tests.hub.alone", told]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(calls)
    return found


def said(call: Callable[..., object], *arguments: object, **options: object) -> str:
    """The one line that a mistake ends with; empty: it ended well."""
    from fmm_distill.errors import UserError

    try:
        call(*arguments, **options)
    except UserError as error:
        return str(error)
    return ""


def _main(told: str) -> None:
    home, calls = json.loads(told)
    hub, found = Hub(accounts=dict(ACCOUNTS)), {}
    with serve(hub) as address:
        new = environment(address, Path(home), TOKEN)
        os.environ.clear()
        os.environ.update(new)
        assert "huggingface_hub" not in sys.modules
        for module, name, arguments in calls:
            for state in (hub.repos, hub.blobs, hub.faults, hub.requests):
                state.clear()
            shutil.rmtree(home, ignore_errors=True)
            os.environ["HF_TOKEN"] = TOKEN
            found[name] = getattr(importlib.import_module(module), name)(hub, *arguments)
    print(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1])
