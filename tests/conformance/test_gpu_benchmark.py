"""The command for a borrowed GPU: its clock, its record, its list and tables; slow: every stage at tiny size."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import machine, render, steps, stored
from benchmarks.gpu.budget import Deadline, OutOfTimeError, alarm
from benchmarks.gpu.record import Record, read
from benchmarks.gpu.rows import Row, take
from benchmarks.gpu.stage import STAGES, Job, Options, Part, Stage
from experiments.plane import Perceptron, closed_form, sample, solved
from fmm_distill.losses import registered_losses
from fmm_distill.losses.mean_flow import MeanFlow
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_cifar10_benchmark import write_images

ROOT = Path(__file__).parents[2]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_deadline_counts_down_and_parts_end_no_later():
    clock = Clock()
    deadline = Deadline(60, clock)
    part, beyond = deadline.within(10), deadline.within(90)
    clock.now += 8
    assert (deadline.remaining(), part.remaining(), beyond.remaining()) == (52, 2, 52)
    assert part.fits(2)
    assert not part.fits(2.1)
    clock.now += 60
    assert deadline.remaining() == -8
    assert not deadline.fits(0)


def test_parts_pass_on_what_they_leave(tmp_path):
    clock = Clock()
    stage = Stage("x", "title", "goal", (Part("a", 0.5), Part("b", 0.25)), ())
    record = Record(tmp_path / "x.json", {"stage": "x"})
    job = Job(Options(tmp_path, tmp_path, "cpu", True, 1), record, Deadline(100, clock), stage)
    assert "50 s  a" in job.plan()
    assert "25 s  b" in job.plan()
    parts = job.parts()
    assert next(parts)[1].remaining() == 50
    clock.now += 10
    assert next(parts)[1].remaining() == 65


def test_an_alarm_that_is_lost_comes_again(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.budget._AGAIN", 0.05)
    lost = []

    def work():
        while True:
            try:
                time.sleep(0.01)
            except OutOfTimeError:
                if lost:
                    raise
                lost.append(True)

    with pytest.raises(OutOfTimeError), alarm(0.05):
        work()
    assert lost
    # Nothing rings outside of the block.
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_ends_what_catches_exceptions():
    def stubborn():
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.01)

    with pytest.raises(OutOfTimeError), alarm(0.05):
        stubborn()
    with alarm(0.05):
        pass
    time.sleep(0.1)


def rows_of(clock, calls):
    def row(name, seconds, kind="k", error=None):
        def measure(_):
            calls.append(name)
            clock.now += seconds
            if error is not None:
                raise error
            return {"value": seconds}

        return Row(name, measure, kind, 5, {"loss": name})

    return row


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def test_rows_that_do_not_fit_are_skipped_with_the_reason(tmp_path, clock):
    calls, record = [], Record(tmp_path / "r.json", {"stage": "steps"})
    row = rows_of(clock, calls)
    listed = [row("a", 10), row("b", 10), row("c", 1), row("d", 1, kind="short"), row("e", 1, kind="other")]
    # After two of them, a third of the kind is expected to take 13 of the 8 seconds left; others are guessed to fit.
    take(listed, Deadline(28, clock), record)
    assert calls == ["a", "b", "d", "e"]
    kept_rows = read(tmp_path / "r.json")["rows"]
    assert [kept_rows[name]["status"] for name in "abcde"] == ["measured"] * 2 + ["skipped"] + ["measured"] * 2
    assert kept_rows["c"]["reason"] == "no time: 13 s expected, 8 s left"
    assert kept_rows["b"] == {"status": "measured", "loss": "b", "value": 10, "kind": "k", "seconds": 10}
    # Again, with time: what is measured stays.
    calls.clear()
    take(listed, Deadline(100, clock), record)
    assert calls == ["c"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), KeyError("x"), ValueError()]
)
def test_a_row_that_fails_ends_nothing(tmp_path, clock, error):
    calls, freed, record = [], [], Record(tmp_path / "r.json", {"stage": "steps"})
    row = rows_of(clock, calls)
    take([row("a", 1, error=error), row("b", 1)], Deadline(60, clock), record, lambda: freed.append(1))
    found = read(tmp_path / "r.json")["rows"]
    assert found["a"]["status"] == "failed"
    assert found["a"]["reason"].startswith(type(error).__name__)
    assert "more" not in found["a"]["reason"]
    assert found["b"]["status"] == "measured"
    assert freed == [1]


def test_a_row_that_overruns_is_cut(tmp_path):
    record = Record(tmp_path / "r.json", {"stage": "steps"})
    take([Row("a", lambda _: time.sleep(30), "k", 0, {})], Deadline(0.2), record)
    assert read(tmp_path / "r.json")["rows"]["a"]["status"] == "cut"


@pytest.mark.parametrize(("name", "value"), [("device", "another"), ("torch", "3"), ("sources", {"a.py": "2"})])
def test_results_of_other_code_or_machines_are_not_continued(tmp_path, name, value):
    about = {"stage": "steps", "device": "one", "torch": "2", "sources": {"a.py": "1"}, "tiny": False, "date": "today"}
    file = tmp_path / "gpu-steps.json"
    Record(file, about).add("a", "measured")
    assert Record(file, about | {"date": "tomorrow"}).has("a")
    assert not Record(file, about | {name: value}).has("a")
    assert read(tmp_path / "gpu-steps.previous.json")["rows"] == {"a": {"status": "measured"}}


def test_every_loss_of_the_registry_has_a_row(monkeypatch):
    first, further = steps.cases()
    assert [case.loss["name"] for case in first] == list(registered_losses())
    assert len({case.name for case in (*first, *further)}) == len(first) + len(further)
    monkeypatch.setattr(steps, "registered_losses", lambda: {**registered_losses(), "another": MeanFlow})
    assert steps.cases()[0][-1].loss == {"name": "another"}
    assert steps.cases()[0][-1].floor is None


def test_stages_are_complete():
    for stage in STAGES.values():
        assert sum(part.fraction for part in stage.parts) < 0.99
        assert (ROOT / "benchmarks" / "gpu" / f"{stage.name}.py").is_file()
        assert len(machine.sources(stage.sources)) > 40
        assert [pattern for pattern in stage.sources if not machine.sources([pattern])] == []
        assert "fmm_distill/training/trainer.py" in machine.sources(stage.sources)
        assert stage.name in render.TABLES
        assert machine.missing(stage.modules) == []
    assert machine.missing(("torch", "yaml", "not_there")) == ["not_there"]


def result(sources, **about):
    told = {
        "stage": "steps",
        "goal": "g",
        "tiny": False,
        "commit": "abcdef0123456789",
        "changed": [],
        "device": "NVIDIA H100",
        "cores": 16,
        "torch": "2.11",
        "diffusers": "0.42",
        "python": "3.12",
        "date": "2026-11-01 10:00 UTC",
        "sources": sources,
    }
    return {"about": told | about, "rows": {"a": {"status": "skipped", "reason": "no time: 9 s"}}}


def test_the_list_says_of_which_code_results_are(tmp_path):
    now = machine.sources(STAGES["steps"].sources)
    file = tmp_path / "gpu-steps.json"
    file.write_text(json.dumps(result(now)))
    line = render.listing(tmp_path).splitlines()[1]
    assert "commit abcdef012345, NVIDIA H100, 2026-11-01 10:00 UTC, 0 of 1 rows measured: current" in line
    assert "no result (gpu-large.json)" in render.listing(tmp_path)
    changed = now | {"fmm_distill/training/trainer.py": "0", "fmm_distill/old.py": "0"}
    file.write_text(json.dumps(result(changed, commit=None, tiny=True)))
    line = render.listing(tmp_path).splitlines()[1]
    assert "commit unknown" in line
    assert "tiny: no figures: not current, changed since: fmm_distill/old.py, fmm_distill/training/trainer.py" in line


def spread(value):
    return {"median": value, "low": value, "high": value}


def test_tables_of_steps_name_what_misses_its_goal(tmp_path):
    row = {
        "status": "measured",
        "setting": "UNet, bf16",
        "loss": "lagrangian, target",
        "derivative": "exact",
        "milliseconds": {"step": spread(12.3)},
        "by_floor": spread(1.2),
        "by_flow_matching": spread(1.5),
        "memory_by_flow_matching": 1.1,
        "by_peer": {"fastgen sCM": spread(0.9)},
        "memory_by_peer": {"fastgen sCM": 0.5},
    }
    found = result({})
    found["rows"] |= {"slow": row, "fast": row | {"by_floor": None, "by_peer": {}, "memory_by_peer": {}}}
    (tmp_path / "gpu-steps.json").write_text(json.dumps(found))
    (tmp_path / "gpu-steps.previous.json").write_text("{}")
    text = render.render(sorted(tmp_path.glob("gpu-*.json")))
    assert "| lagrangian, target | exact | 12.3 | 1.20 (1.20 to 1.20) | 1.50 (1.50 to 1.50) | 1.10 | 0.90" in text
    assert "Above 1.10 of the floor: 1 of 2 rows. slow" in text
    assert "Above 0.85 of a FastGen step: slow relative to fastgen sCM" in text
    assert "- skipped (no time), 1: a" in text


def test_the_memory_table_divides_by_the_estimate(tmp_path):
    step = {"status": "measured", "what": "step", "model": "SD", "student": "LoRA", "parameters": 2e6, "batch": 4}
    step |= {"seconds_a_step": 0.5, "bytes": 3 * 2**30}
    found = result({}, stage="large")
    found["rows"] = {"s": step, "e": {"status": "measured", "what": "estimate", "of": "s", "bytes": 2 * 2**30}}
    found["rows"]["open: s"] = {"status": "measured", "what": "open", "of": "s", "seconds": 3, "open_seconds": 61.0}
    (tmp_path / "gpu-large.json").write_text(json.dumps(found))
    text = render.render([tmp_path / "gpu-large.json"])
    assert "| SD | LoRA | 2M | 0.500 | 8.0 | 3.00 | 2.00 | 1.50 |" in text
    assert "| open | open: s | 61 |" in text


@pytest.mark.parametrize("size", [1000, 40 * 2**20])
def test_what_is_kept_travels_in_pieces(tmp_path, size):
    work, pieces, again = (tmp_path / name for name in ("work", "pieces", "again"))
    (work / "teacher").mkdir(parents=True)
    pieces.mkdir()
    again.mkdir()
    data = os.urandom(1000) * (size // 1000)
    (work / "teacher" / "w.bin").write_bytes(data)
    files = stored.pack(work, ("teacher",), pieces)
    assert len(files) == (1 if size == 1000 else 3)
    assert all(file.stat().st_size <= 16 * 2**20 for file in files)
    assert stored.unpack(pieces, again)
    assert (again / "teacher" / "w.bin").read_bytes() == data
    files[0].unlink()
    assert not stored.unpack(pieces, again)
    (work / "teacher" / "w.bin").write_bytes(bytes(61 * 2**20))
    with pytest.raises(RuntimeError, match="MiB exceed 4 pieces"):
        stored.pack(work, ("teacher",), pieces)


def test_the_plane_runs_where_its_noise_is():
    # Tensors of this device and of the processor don't mix, as on a GPU.
    noise = torch.randn(5, 2, device="meta")
    assert sample(Perceptron(0, width=8).to("meta"), noise, 2).device.type == "meta"
    assert solved(closed_form(), noise, 2).device.type == "meta"


def test_published_sizes():
    from benchmarks.gpu.large_models import MODELS

    sizes = {}
    for name, model in MODELS.items():
        with torch.device("meta"):
            pipeline = model.make()
        network = pipeline.transformer if name == "sd3" else pipeline.unet
        sizes[name] = round(sum(parameter.numel() for parameter in network.parameters()) / 1e6)
    # Those of the published checkpoints; that of SD3 medium counts its table of places, 57 million, which is fixed.
    assert sizes == {"sd15": 860, "sdxl": 2567, "sd3": 2085 - 57}


def run(*arguments, **changes):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT, **changes)


def test_help_and_list_load_no_torch():
    code = "import sys; from benchmarks.gpu.__main__ import main; main({}); assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for arguments in (["--list"], ["--render", "benchmarks"]):
        subprocess.run([sys.executable, "-c", code.format(arguments)], env=environment, check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "cifar10"], "--stage cifar10 needs --data"),
        (["--stage", "steps", "--fastgen", "nowhere"], "--fastgen .*nowhere: no such folder"),
        (["--stage", "steps", "--device", "cuda"], "expected a GPU that torch can use"),
    ],
)
def test_mistakes_end_before_anything_starts(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "use", lambda _: None)
    with pytest.raises(SystemExit, match=message):
        command.main([*arguments, "--work", str(tmp_path / "w"), "--output", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def test_packages_that_are_missing_are_named_in_one_command(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "use", lambda _: None)
    monkeypatch.setattr(machine, "missing", lambda _: ["diffusers", "pydantic"])
    with pytest.raises(SystemExit, match="pip install diffusers pydantic"):
        command.main(["--stage", "steps", "--work", str(tmp_path / "w"), "--output", str(tmp_path / "o")])


def wheel(folder, name):
    """The smallest wheel that there is."""
    import zipfile

    folder.mkdir(exist_ok=True)
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "here = True\n")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


def test_wheels_of_what_is_missing_are_installed(tmp_path):
    wheel(tmp_path / "wheels", "not_there_before")
    # torch is there, whatever its version.
    wheel(tmp_path / "wheels", "torch")
    assert machine.install(tmp_path / "wheels", tmp_path / "site") == ["not_there_before"]
    assert (tmp_path / "site" / "not_there_before.py").is_file()
    assert not (tmp_path / "site" / "torch.py").exists()


def test_a_killed_run_leaves_what_it_measured(tmp_path):
    """SIGKILL at any moment leaves a complete JSON."""
    code = (
        "import time\nfrom pathlib import Path\nfrom benchmarks.gpu.record import Record\n"
        f"record = Record(Path({str(tmp_path / 'gpu-steps.json')!r}), {{'stage': 'steps'}})\n"
        "for i in range(10**6):\n    record.add(str(i % 500), 'measured', text='x' * 2000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    file = tmp_path / "gpu-steps.json"
    while not file.is_file() or len(read(file)["rows"]) < 20:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(read(file)["rows"]) >= 20


def stage(tmp_path, name, minutes, *arguments):
    """A stage at tiny size on the processor; its JSON."""
    given = ["--stage", name, "--device", "cpu", "--tiny", "--minutes", minutes]
    given += ["--work", tmp_path / "work", "--output", tmp_path / "output", *arguments]
    started = time.monotonic()
    done = run(*given)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    # Python's start and end come on top.
    assert time.monotonic() - started < 60 * minutes + 30
    assert done.stdout.startswith(f"{name}: ")
    assert f"### {name}" in run("--render", tmp_path / "output").stdout
    found = read(tmp_path / "output" / f"gpu-{name}.json")
    assert {"commit", "device", "torch", "date", "sources"} <= set(found["about"])
    statuses = [row["status"] for row in found["rows"].values()]
    assert "failed" not in statuses, found["rows"]
    assert "measured" in statuses
    return found


@pytest.mark.slow
def test_stage_steps(tmp_path):
    found = stage(tmp_path, "steps", 1.0)
    row = found["rows"]["UNet, bf16: lagrangian, target, exact"]
    assert {"by_floor", "by_flow_matching", "bytes", "milliseconds", "by_peer", "batch"} <= set(row)
    assert any(name.startswith("DiT, fp32, compiled") for name in found["rows"])


@pytest.mark.slow
def test_stage_steps_leaves_rows_when_it_is_killed_and_continues(tmp_path):
    words = ["--stage", "steps", "--device", "cpu", "--tiny", "--minutes", "1"]
    words += ["--work", str(tmp_path / "w"), "--output", str(tmp_path / "o")]
    file, environment = tmp_path / "o" / "gpu-steps.json", os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", *words], env=environment, cwd=ROOT)
    while not file.is_file() or sum("milliseconds" in row for row in read(file)["rows"].values()) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = {name: row for name, row in read(file)["rows"].items() if row["status"] == "measured"}
    assert len(before) >= 3
    assert run(*words[:5], "--minutes", "0.4", *words[7:]).returncode == 0
    after = read(file)["rows"]
    assert all(after[name] == row for name, row in before.items())


@pytest.mark.slow
def test_stage_large(tmp_path):
    found = stage(tmp_path, "large", 5)
    names = ["sd15, LoRA, 512", "sd15, full, 512", "sd3, LoRA, 512", "sdxl, LoRA, 512"]
    for name in names:
        assert {"seconds_a_step", "bytes", "parameters", "seconds_of_steps"} <= set(found["rows"][name])
        assert found["rows"][f"estimate: {name}"]["bytes"] > 0
    assert found["rows"]["launch: resumed to the end, exported"]["says"] == "going on from step-00000002"
    assert "finite: True" in found["rows"]["launch: reloaded by diffusers"]["says"]
    assert found["rows"]["open: sd15, LoRA, 512"]["open_seconds"] > 0


@pytest.mark.slow
def test_stage_cifar10_keeps_its_teacher(tmp_path):
    write_images(tmp_path / "data", 64, "img")
    found = stage(tmp_path, "cifar10", 4, "--data", tmp_path / "data")
    student = found["cifar10"]["students"]["lagrangian-0"]
    assert list(student["rows"]) == ["1", "2", "4", "8", "16"]
    assert found["rows"]["fastgen-ECT-0"] == {"status": "skipped", "reason": "no --fastgen"}
    assert (tmp_path / "output" / "gpu-cifar10-steps.png").is_file()
    assert stored.unpack(tmp_path / "output", tmp_path)
    known = load_teacher(str(tmp_path / "work" / "cifar10" / "teacher")).network.state_dict()
    again = load_teacher(str(tmp_path / "teacher")).network.state_dict()
    # Rounded before anything was measured with it.
    assert all(torch.equal(value, known[name]) and torch.equal(value, value.half()) for name, value in again.items())
    assert (tmp_path / "classifier" / "classifier.pt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "minutes"), [("checkerboard", 0.7), ("sampling", 1), ("growth", 1.5), ("startup", 4)])
def test_the_other_stages(tmp_path, name, minutes):
    found = stage(tmp_path, name, minutes)
    keys = {
        "checkerboard": {"kl_50", "kl_48", "endpoint", "samples", "trained_seconds"},
        "sampling": {"milliseconds", "ratio", "setting"},
        "growth": {"curves", "exact_by_central"},
        "startup": {"values"},
    }[name]
    assert keys <= set(next(iter(found["rows"].values())))
