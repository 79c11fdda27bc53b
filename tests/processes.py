"""Other processes that take no seconds to start: forks of one that has imported torch and diffusers."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import pytest

ROOT = Path(__file__).parents[1]
SERVER = Path(__file__).with_name("fork_server.py")
# What an export is opened with; the pipelines' own modules come with a family of each kind.
OPENS_EXPORTS = (
    "torch",
    "safetensors.torch",
    "diffusers.pipelines.ddpm.pipeline_ddpm",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.wan.pipeline_wan",
)


class ForkServer:
    """A process that imports modules once, when it is first needed, and runs each job in a fork of itself.

    Its forks verify exports by the server ``stock``.
    """

    def __init__(self, *arguments: str, stock: ForkServer | None = None) -> None:
        self.arguments, self.stock = arguments, stock
        self.process: subprocess.Popen | None = None
        self.jobs: TextIO | None = None
        self.answers: TextIO | None = None

    @classmethod
    def attached(cls, jobs: int, answers: int) -> ForkServer:
        """A server that another process has started, by its streams."""
        server = cls()
        server.jobs, server.answers = os.fdopen(jobs, "w"), os.fdopen(answers)
        return server

    def start(self) -> None:
        """Start the process, unless it has been."""
        if self.jobs is not None:
            return
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"PYTHONPATH": str(ROOT)}
        command, streams = [sys.executable, "-P", str(SERVER), *self.arguments], ()
        if self.stock is not None:
            self.stock.start()
            streams = (self.stock.jobs.fileno(), self.stock.answers.fileno())
            command.append(f"--verify={','.join(map(str, streams))}")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, pass_fds=streams)
        self.jobs, self.answers = self.process.stdin, self.process.stdout

    def run(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None, **_: object
    ) -> subprocess.CompletedProcess:
        """``subprocess.run`` of ``python -P SCRIPT ...`` that captures the output."""
        python, flag, *command = command
        assert (python, flag) == (sys.executable, "-P")
        return self.together(command, [dict(os.environ if env is None else env)], cwd)

    def together(
        self, command: Sequence[object], environments: list[dict[str, str]], cwd: str | None = None
    ) -> subprocess.CompletedProcess:
        """Run a script or a module in a process for each environment, all at a time."""
        script, *arguments = map(str, command)
        self.start()
        with tempfile.TemporaryDirectory() as scratch:
            out, err = Path(scratch, "out"), Path(scratch, "err")
            job = {"script": script, "arguments": arguments, "environments": environments}
            job |= {"folder": str(cwd or Path.cwd()), "out": str(out), "err": str(err)}
            print(json.dumps(job), file=self.jobs, flush=True)
            status = int(self.answers.readline())
            return subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())

    def close(self) -> None:
        """End the process; one that holds streams of another comes first."""
        if self.process is not None:
            self.jobs.close()
            self.answers.close()
            self.process.wait()


STOCK = ForkServer("--stock", *OPENS_EXPORTS)
PACKAGE = ForkServer("fmm_distill.cli", "fmm_distill.run.distill", *OPENS_EXPORTS[2:4], stock=STOCK)


def on_two_processes(*command: object, **changes: str) -> subprocess.CompletedProcess:
    """Run a script or a module on two processes, as ``torch.distributed.run`` does on one machine without GPUs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **changes}
    return PACKAGE.together(command, [os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")])


@contextlib.contextmanager
def own_processes() -> Iterator[None]:
    """Verify exports in new processes, as users do."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fmm_distill.export.verify.subprocess", subprocess)
        yield
