"""Functions run in another process, where the real client has read the environment it was given."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
CALL = """
import importlib, json, sys
module, name, arguments = json.loads(sys.argv[1])
print(json.dumps(getattr(importlib.import_module(module), name)(*arguments)))
"""


def run(function: Callable[..., Any], environment: Mapping[str, str], *arguments: Any) -> Any:
    """What a module's function gives in a new process; arguments and result travel as JSON."""
    told = json.dumps([function.__module__, function.__name__, arguments], default=str)
    command = [sys.executable, "-c", CALL, told]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def attempt(function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    """How a call of the client ended and the seconds it meant to wait on the way, which are not waited."""
    waits: list[float] = []
    with patch("time.sleep", waits.append):
        try:
            function(*arguments, **options)
        except Exception as error:  # noqa: BLE001 which one it is, is what is asked
            response = getattr(error, "response", None)
            outcome = {"error": type(error).__name__, "cause": type(error.__cause__).__name__, "text": str(error)}
            return outcome | {"status": response.status_code if response is not None else None, "waits": waits}
    return {"error": None, "waits": waits}
