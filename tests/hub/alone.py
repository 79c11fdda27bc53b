"""A process with a Hub of its own: there the real client reads its environment, and the test can change the Hub."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hub.server import Account, Hub, environment, serve

ROOT = Path(__file__).parents[2]
ACCOUNTS = {
    "hf_writes": Account("tester", "write"),
    "hf_reads": Account("tester", "read"),
    "hf_other": Account("somebody", "write"),
}


def alone(function: Callable[..., Any], home: Path, *arguments: object, token: str = "hf_writes") -> Any:
    """What ``function(hub, *arguments)`` gives in a new process; arguments and result travel as JSON.

    Its module may import nothing that imports huggingface_hub, but inside the function.
    """
    told = json.dumps([function.__module__, function.__name__, str(home), token, arguments], default=str)
    command = [sys.executable, "-m", "tests.hub.alone", told]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def said(call: Callable[..., object], *arguments: object, **options: object) -> str:
    """The one line that a mistake ends with; empty: it ended well."""
    from fmm_distill.errors import UserError

    try:
        call(*arguments, **options)
    except UserError as error:
        return str(error)
    return ""


def _main(told: str) -> None:
    module, name, home, token, arguments = json.loads(told)
    hub = Hub(accounts=dict(ACCOUNTS))
    with serve(hub) as address:
        new = environment(address, Path(home), token)
        os.environ.clear()
        os.environ.update(new)
        function = getattr(importlib.import_module(module), name)
        assert "huggingface_hub" not in sys.modules
        print(json.dumps(function(hub, *arguments)))


if __name__ == "__main__":
    _main(sys.argv[1])
