"""Digests of the numbers that four kinds of runs compute, to show that a change of the code moves none.

    python -m benchmarks.fingerprint --output before.json     # at the old commit
    python -m benchmarks.fingerprint --output after.json      # at the new one
    python -m benchmarks.fingerprint --compare before.json after.json

Everything runs through the command line on one thread per process: the digits, every loss, adapters on a tiny Stable
Diffusion, and two processes. The logged losses are compared as they are, weights and exported images by SHA-256. The
comparison is exact: equal commits on one machine give equal files. ``--only`` names the runs to make.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Fields of steps.jsonl on the speed of a step, which differ between equal runs.
MEASURED = ("images_per_second", "peak_memory_gib")
# Height and width of the images of the tiny Stable Diffusion.
SIZE = {"height": 16, "width": 16}
QUICK = {
    "training.batch_size": 8,
    "evaluation.steps": [1],
    "evaluation.ddim_steps": [],
    "evaluation.dpmsolver_steps": [],
    "evaluation.samples": 8,
    "evaluation.endpoint_samples": 4,
    "evaluation.endpoint_solver_steps": 4,
    "evaluation.features": "none",
    "export.steps": [1, 2],
}
# Teaches the velocity to losses that only make a map consistent with itself.
VELOCITY_TERM = {"loss": {"name": "flow_matching"}, "fraction": 0.5, "time_sampling": {"prior": 0, "data": 1}}


def runs() -> dict[str, dict[str, Any]]:
    """Return the settings of each run, by its name; ``processes`` is the number of processes."""
    from fmm_distill.losses import registered_losses

    digits: dict[str, Any] = {"recipe": "digits", "matching": None}
    made = {"digits": digits | {"training.steps": 50, "export.steps": [1, 4]}}
    for name, kind in registered_losses().items():
        loss = kind.model_validate({})
        own: dict[str, Any] = {"data": "builtin:digits", "training.steps": 3, "loss": {"name": name}}
        if loss.needed_sampling is not None:
            own["time_sampling"] = loss.needed_sampling.model_dump(exclude_unset=True)
        if loss.needs_velocity_term:
            own["extra_losses"] = [VELOCITY_TERM]
        made[f"loss {name}"] = digits | QUICK | own
    made["adapters"] = digits | QUICK | {"teacher": "sd", "training.steps": 3, "student.lora": {"rank": 2}}
    made["adapters"] |= {"loss": {"name": "lagrangian"}, "guidance.scale": 3.0, "pipeline": SIZE}
    made["two processes"] = digits | QUICK | {"training.steps": 5, "processes": 2}
    return made


def save_stable_diffusion(folder: Path) -> None:
    import torch

    from tests.tiny.diffusion import sd1

    # The weights are random: equal ones for every commit.
    torch.manual_seed(0)
    sd1().save_pretrained(folder)


def fingerprint(settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Make a run and digest it."""
    settings = dict(settings)
    processes, recipe = settings.pop("processes", 1), settings.pop("recipe")
    launch = ["-m", "fmm_distill"]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *launch]
    command = [sys.executable, *launch, "--recipe", recipe, "--output", str(scratch / "run")]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    ran = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ran.stderr}")
    return digest(scratch / "run")


def digest(run: Path) -> dict[str, Any]:
    """Return the losses of a run, the digests of its newest weights and its exports, and its endpoint errors."""
    lines = (run / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    weights = [*sorted(checkpoint.glob("*.safetensors")), *sorted((run / "student").rglob("*.safetensors"))]
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    rows = [{key: value for key, value in row.items() if "second" not in key} for row in evaluation["rows"]]
    return {
        "steps": steps,
        "weights": {str(path.relative_to(run)): sha256(path) for path in weights},
        "rows": rows,
        "images": {
            str(folder.relative_to(run)): images_of(folder) for folder in sorted((run / "student").glob("steps-*"))
        },
    }


def images_of(folder: Path) -> str:
    """Return the digest of four samples of an exported pipeline, as stock diffusers makes them."""
    import torch
    from diffusers import DiffusionPipeline

    # Sums over several threads have other roundings.
    torch.set_num_threads(1)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": int(folder.name.removeprefix("steps-")), "output_type": "np"}
    call |= {"prompt": [""] * 4, **SIZE} if hasattr(pipeline, "tokenizer") else {"batch_size": 4}
    images = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    return hashlib.sha256(images.tobytes()).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return a line for each run and part that is not equal."""
    found = [f"{name}: in one file only" for name in sorted(before.keys() ^ after.keys())]
    for name in sorted(before.keys() & after.keys()):
        found += _steps_that_differ(name, before[name]["steps"], after[name]["steps"])
        for part in sorted((before[name].keys() | after[name].keys()) - {"steps"}):
            if before[name].get(part) != after[name].get(part):
                found.append(f"{name}: {part} differ")
    return found


def _steps_that_differ(name: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """Return a line for the first step whose common fields are not equal; a renamed field is no difference."""
    if len(before) != len(after):
        return [f"{name}: {len(before)} steps and {len(after)}"]
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        common = one.keys() & other.keys()
        if unequal := sorted(key for key in common if one[key] != other[key]) or sorted({"loss"} - common):
            return [f"{name}: step {number}: {', '.join(unequal)} differ"]
    return []


def make(names: list[str] | None, output: Path) -> None:
    made: dict[str, Any] = {}
    for name, settings in runs().items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            if settings.get("teacher") == "sd":
                save_stable_diffusion(Path(scratch) / "sd")
            made[name] = fingerprint(settings, Path(scratch))
        print(f"{name}: {len(made[name]['steps'])} steps, {len(made[name]['weights'])} files of weights", flush=True)
        output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the digests go")
    parser.add_argument("--only", nargs="+", help="names of runs")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help="two outputs")
    given = parser.parse_args()
    if given.compare:
        before, after = (json.loads(path.read_text(encoding="utf-8")) for path in given.compare)
        found = differences(before, after)
        print("\n".join(found) or f"equal: {', '.join(before)}")
        sys.exit(1 if found else 0)
    if given.output is None:
        parser.error("--output or --compare is needed")
    make(given.only, given.output)


if __name__ == "__main__":
    main()
