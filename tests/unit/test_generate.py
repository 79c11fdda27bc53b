"""Samples are the same whatever batches, processes and interruptions they are made in."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmm_distill.core.draws import sample_generator
from fmm_distill.evaluation.draws import draw_samples_of
from fmm_distill.evaluation.evaluator import Evaluator
from fmm_distill.evaluation.features import open_features
from fmm_distill.evaluation.generate import GenerationSpec, SampleGenerator
from fmm_distill.evaluation.samplers import Sampler, of_students
from fmm_distill.io.lock import locked
from fmm_distill.student.student import Student
from tests.logs import logged

COUNT = 1100


@pytest.fixture(scope="module")
def whole(teacher_folder):
    from fmm_distill.teachers.load import load_teacher

    teacher = load_teacher(str(teacher_folder))
    (sampler,) = of_students({"student": Student.from_teacher(teacher)}, (1,))
    return teacher, sampler, generator(teacher, batch=256).run(sampler)


def generator(teacher, batch, accelerator=None, count=COUNT):
    return SampleGenerator(
        GenerationSpec(
            teacher,
            torch.device("cpu"),
            count=count,
            stored=12,
            batch_size=batch,
            seed=7,
            features=open_features("digits", (1, 8, 8)),
            accelerator=accelerator,
        )
    )


def same(one, other):
    # Kernels of other batch sizes round otherwise.
    torch.testing.assert_close(one.features, other.features, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(one.samples, other.samples, rtol=0, atol=1e-5)


def test_noise_is_a_function_of_seed_and_number(teacher):
    whole = draw_samples_of(teacher, range(40), 3).noise
    parts = torch.cat([draw_samples_of(teacher, range(i, i + 8), 3).noise for i in range(0, 40, 8)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, draw_samples_of(teacher, range(40), 4).noise)
    assert len({row.numpy().tobytes() for row in whole}) == 40
    # What diffusers draws from the samples' generators.
    generators = draw_samples_of(teacher, range(2), 3).generators(after_noise=False)
    again = torch.cat([torch.randn(1, *teacher.event_shape, generator=one) for one in generators])
    assert torch.equal(again, whole[:2])
    after = draw_samples_of(teacher, range(2), 3).generators(after_noise=True)
    assert not torch.equal(torch.randn(1, *teacher.event_shape, generator=after[0]), whole[:1])


def test_noises_are_independent_and_normal(teacher):
    noise = draw_samples_of(teacher, range(4000), 0).noise.flatten(1)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.var()) - 1) < 0.02
    # Neighbors have nothing in common.
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.01
    seeds = {sample_generator(0, number).initial_seed() for number in range(20_000)}
    assert len(seeds) == 20_000


@pytest.mark.parametrize("batch", [1100, 37])
def test_batch_size_changes_nothing(whole, batch):
    teacher, sampler, made = whole
    same(generator(teacher, batch).run(sampler), made)
    assert len(made.features) == len(made.seconds) == COUNT
    assert len(made.samples) == 12


def test_processes_and_the_disk_change_nothing(whole, tmp_path):
    teacher, sampler, made = whole
    waits = []

    def process(index):
        return SimpleNamespace(process_index=index, num_processes=2, wait_for_everyone=lambda: waits.append(index))

    # The second makes its part and waits in vain for the other's: its files are there when it stops.
    with pytest.raises(FileNotFoundError):
        generator(teacher, 256, process(1)).run(sampler, tmp_path / "kept")
    assert [path.name for path in sorted((tmp_path / "kept").iterdir())] == ["part-00001.safetensors"]
    same(generator(teacher, 256, process(0)).run(sampler, tmp_path / "kept"), made)
    # Before the parts are made, when they are, and when they are read: until then the first process has the lock.
    assert waits == [1, 1, 0, 0, 0]


def test_two_evaluations_of_the_same_samples_take_turns(whole, tmp_path):
    """The second waits for the first, makes nothing again, and removes nothing that a third reads."""
    teacher, sampler, _ = whole
    calls, lines, at_work, waits = [], [], threading.Event(), threading.Event()

    def slow(draws):
        at_work.set()
        waits.wait(30)
        return sampler.run(draws)

    def counted(draws):
        calls.append(len(draws.noise))
        return sampler.run(draws)

    slowly, counting = (Sampler("student", 1, sampler.network, run) for run in (slow, counted))
    done = []
    first = threading.Thread(target=lambda: done.append(generator(teacher, 256)._cached(*kept(slowly))))

    def kept(one):
        make = lambda _, start, stop: generator(teacher, 1100)._batch(one, range(start, stop))  # noqa: E731
        return make, 1, tmp_path / "kept"

    first.start()
    at_work.wait()
    with logged(lines, lambda _: waits.set()):
        second = generator(teacher, 256)._cached(*kept(counting))
    first.join()
    assert len(lines) == 1
    assert "is in use by an evaluation" in lines[0]
    assert calls == []
    assert torch.equal(done[0]["features"], second["features"])


def test_what_another_evaluation_reads_is_not_removed(tmp_path):
    measure = SimpleNamespace(_folders=[tmp_path / "one", tmp_path / "two", tmp_path / "none"])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-00000.safetensors").touch()
    with locked(tmp_path / "one", "an evaluation"):
        Evaluator.clear_cache(measure)
        assert (tmp_path / "one" / "part-00000.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    Evaluator.clear_cache(measure)
    assert list(tmp_path.iterdir()) == []


def test_what_was_made_is_not_made_again_and_damage_is_seen(whole, tmp_path):
    teacher, sampler, made = whole
    calls, lines = [], []
    counting = Sampler("student", 1, sampler.network, lambda draws: calls.append(len(draws)) or sampler.run(draws))
    generator(teacher, 256).run(counting, tmp_path / "kept")
    assert sum(calls) == 16 + COUNT
    calls.clear()
    # One part is gone, another has one number changed.
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 3
    files[0].unlink()
    tensors = load_file(files[1])
    tensors["features"][3, 4] += 1e-3
    save_file(tensors, files[1])
    with logged(lines):
        same(generator(teacher, 256).run(counting, tmp_path / "kept"), made)
    assert sum(calls) == 16 + 1024
    (line,) = lines
    assert "part-00001.safetensors is damaged; its samples are generated again" in line


def test_costs(whole):
    teacher, _, made = whole
    assert made.cost.calls == 1
    four = generator(teacher, 16, count=16).run(of_students({"student": Student.from_teacher(teacher)}, (4,))[0])
    assert four.cost.calls == 4
    # Steps follow one another: they take no more memory than one.
    assert made.cost.memory <= four.cost.memory < 1.5 * made.cost.memory
    assert made.cost.memory > 16 * 64 * 4
    assert not teacher.network._forward_hooks
