"""Run scripts in forks of a process that has imported their libraries already; ``tests.processes`` starts it.

python -P fork_server.py [--stock] [--verify=JOBS,ANSWERS] MODULE...

With ``--stock`` every import of the package fails, here and in all forks; with ``--verify`` forks verify exports by
another such server, of which these are the streams. Each line on stdin is a job {"script",
"arguments", "environments", "folder", "out", "err"}: a script or the name of a module, run in as many forks at a time
as there are environments. Each line on stdout is its exit status. Between jobs nothing runs but this loop, so that a
fork is as good as a new process but for the imports.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import traceback

# Seconds that a fork may take.
LIMIT = 1800


def redirect(stream: int, file: str) -> None:
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, stream)
    os.close(opened)


def follow(environment: dict[str, str]) -> None:
    """Set the environment, and what libraries have read of it as they were imported."""
    os.environ.clear()
    os.environ.update(environment)
    for module in list(sys.modules.values()):
        for name in {"HF_HOME", "HF_MODULES_CACHE"} & environment.keys():
            if name in vars(module or object):
                setattr(module, name, environment[name])


def status_of(script: str) -> int:
    """Run a script or module; return its exit status, as the interpreter finds it."""
    try:
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 as the interpreter does
        traceback.print_exc()
        return 1
    return 0


def forked(job: dict, environment: dict[str, str]) -> int:
    """Start a job in a fork; return the number of its process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        redirect(0, os.devnull)
        redirect(1, job["out"])
        redirect(2, job["err"])
        # Processes that wait for each other are an error, not the end of all tests.
        signal.alarm(LIMIT)
        os.chdir(job["folder"])
        follow(environment)
        sys.argv = [job["script"], *job["arguments"]]
        status = status_of(job["script"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def ended(children: set[int]) -> int:
    """Wait for all processes, and end the others when one fails; return the first status that is not 0."""
    failed = 0
    while children:
        child, found = os.wait()
        children.remove(child)
        status = os.waitstatus_to_exitcode(found)
        if status and not failed:
            failed = status
            for other in children:
                os.kill(other, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    # Jobs and answers have streams of their own: the first ones are a fork's to redirect.
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    redirect(1, os.devnull)
    options, modules = ([a for a in sys.argv[1:] if a.startswith("--") == is_option] for is_option in (True, False))
    if "--stock" in options:
        sys.modules["fmm_distill"] = None
    for name in modules:
        importlib.import_module(name)
    for option in options:
        name, _, streams = option.partition("=")
        if name == "--verify":
            processes, verify = map(importlib.import_module, ("tests.processes", "fmm_distill.export.verify"))
            verify.subprocess = processes.ForkServer.attached(*map(int, streams.split(",")))
    for line in jobs:
        job = json.loads(line)
        print(ended({forked(job, environment) for environment in job["environments"]}), file=answers, flush=True)
