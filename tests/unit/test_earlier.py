"""A student that starts from an earlier one is that one, whatever its form and wherever it is stored."""

from __future__ import annotations

import re
import shutil
from functools import partialmethod
from unittest.mock import patch

import pytest
import torch
import yaml
from diffusers import DDPMScheduler

from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.errors import UserError
from fmm_distill.run.earlier import read_earlier
from fmm_distill.run.folder import check_folder, pinned, store_commits
from fmm_distill.run.given import Given
from fmm_distill.run.plan import plan
from fmm_distill.training.ema import build_averages
from fmm_distill.training.memory import forecast_memory
from fmm_distill.training.trainer import Trainer
from tests.conftest import save_teacher, tiny_unet
from tests.earlier import SAVE, recipe_of, save_export, save_run, trained, untrained
from tests.logs import logged
from tests.scaled import points, train
from tests.tiny.diffusion import PIPELINES

REGRESSION = {"prediction": "v_prediction", "regression_steps": 4}
CASES = {
    "embedded": {"student": {"kind": "embedded"}},
    "embedded, v": {"student": {"kind": "embedded"} | REGRESSION},
    "adapters": {"student": {"kind": "embedded", "lora": {"rank": 2}}},
    "full": {"student": {"kind": "scaled"}},
    "full, v": {"student": {"kind": "scaled"} | REGRESSION},
    "low": {"student": {"kind": "scaled", "lora": {"rank": 2}}},
    "low, v": {"student": {"kind": "scaled", "lora": {"rank": 2}} | REGRESSION},
    "timesteps": {"student": {"kind": "scaled"}, "timesteps": 400},
}
GUIDED = {"scale": 2.0, "range": [1.0, 3.0]}
MATCHING = {"steps": 3, "critic": {"warmup_steps": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("epsilon"), scheduler=DDPMScheduler(prediction_type="epsilon"))


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """The teacher with other weights."""
    unet = tiny_unet()
    with torch.no_grad():
        for value in unet.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2)))
    return save_teacher(tmp_path_factory.mktemp("tuned"), unet, DDPMScheduler(prediction_type="epsilon"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A teacher of classes, which can be guided."""
    folder = tmp_path_factory.mktemp("dit") / "teacher"
    PIPELINES["dit"].build().save_pretrained(folder)
    return folder


def saved(where, folder, teacher_folder, settings):
    """A trained student, its teacher and its folder."""
    recipe = recipe_of(teacher_folder, settings)
    student, teacher = trained(recipe)
    return student, teacher, SAVE[where](folder, recipe, student, teacher)


def next_recipe(teacher_folder, settings, init, **student):
    """The recipe that goes on from a student, without a regression unless there is one in ``student``."""
    changed = settings.get("student", {}) | {"init": str(init), "regression_steps": 0} | student
    return recipe_of(teacher_folder, settings | {"student": changed})


def refused(recipe):
    with pytest.raises(UserError) as error:
        plan(recipe)
    assert "\n" not in str(error.value)
    return str(error.value)


@torch.no_grad()
def values(student, teacher):
    """u of jumps and on the diagonal, at two scales of guidance where it is an input."""
    x, t, r, cond = points(teacher)
    guided = teacher.guidance is not None and teacher.guidance.range is not None
    scales = [cond.guided(w) for w in (1.0, 2.5)] if guided else [cond]
    return torch.stack([student.mean_velocity(x, t, end, c) for end in (r, t) for c in scales])


def assert_same(found, expected, tolerance=1e-5):
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("where", SAVE)
@pytest.mark.parametrize("name", CASES)
def test_the_student_equals_the_earlier_one(tmp_path, folder, name, where):
    student, teacher, earlier = saved(where, tmp_path / "earlier", folder, CASES[name])
    expected = values(student, teacher)
    assert (values(untrained(recipe_of(folder, CASES[name]))[0], teacher) - expected).norm() > 1e-3 * expected.norm()
    job = plan(next_recipe(folder, CASES[name], earlier))
    assert_same(values(job.student, teacher), expected)
    described = f"start:   the student {earlier}" + (" (average 0.999 at step 7)\n" if where == "run" else "\n")
    assert described in str(job)
    # The run's moving averages start from the same weights, and its teacher is the original one.
    (average,) = build_averages(job.student, (0.999,)).values()
    ours, theirs = average.module.state_dict(), job.student.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    x, t, _, cond = points(teacher)
    assert_same(job.teacher.velocity(x, t, cond), trained(recipe_of(folder, CASES[name]))[1].velocity(x, t, cond))


@pytest.mark.parametrize("where", SAVE)
@pytest.mark.parametrize(
    ("guidance", "student"),
    [
        ({"scale": 2.0}, {"kind": "embedded"}),
        ({"scale": 2.0}, {"kind": "scaled", "regression_steps": 4}),
        (GUIDED, {"kind": "embedded"}),
        (GUIDED, {"kind": "scaled", "regression_steps": 4}),
        (GUIDED, {"kind": "scaled", "regression_steps": 4, "lora": {"rank": 2}}),
    ],
    ids=["embedded", "full", "embedded range", "full range", "low range"],
)
def test_the_student_equals_the_earlier_guided_one(tmp_path, classes, guidance, student, where):
    settings = {"student": student, "guidance": guidance}
    earlier, teacher, place = saved(where, tmp_path / "earlier", classes, settings)
    job = plan(next_recipe(classes, settings, place))
    assert_same(values(job.student, teacher), values(earlier, teacher))


@pytest.mark.parametrize("name", ["full", "low", "adapters", "embedded"])
def test_changes_go_onto_a_fine_tuned_teacher(tmp_path, folder, fine_tuned, name):
    """At h = 0 a scaled student is its new teacher; what was trained is the earlier student's."""
    student, _, earlier = saved("export", tmp_path / "earlier", folder, CASES[name])
    lines = []
    with logged(lines):
        job = plan(next_recipe(fine_tuned, CASES[name], earlier))
    [line] = [one for one in lines if "which is not its teacher" in one]
    assert ("replace those of" in line) == (name == "embedded")
    if name in ("full", "low"):
        x, t, _, _ = points(job.teacher)
        fresh = plan(recipe_of(fine_tuned, {"student": {"kind": "embedded"}})).teacher
        assert_same(job.student.mean_velocity(x, t, t), fresh.velocity(x, t))
    ours, theirs = job.student.state_dict(), student.state_dict()
    names = [key for key, value in student.named_parameters() if value.requires_grad]
    assert names
    assert all(torch.equal(ours[key], theirs[key]) for key in names)


def test_adapters_of_an_export_also_start_a_student_of_full_rank(tmp_path, folder):
    student, teacher, earlier = saved("export", tmp_path / "earlier", folder, CASES["adapters"])
    job = plan(next_recipe(folder, CASES["embedded"], earlier))
    assert_same(values(job.student, teacher), values(student, teacher))


def test_guidance_that_differs_is_logged_and_has_to_be_regressed(tmp_path, classes):
    settings = {"student": {"kind": "scaled", "regression_steps": 4}, "guidance": {"scale": 2.0}}
    student, _, earlier = saved("export", tmp_path / "earlier", classes, settings)
    other = settings | {"guidance": {"scale": 3.0}}
    line = refused(next_recipe(classes, other, earlier))
    assert "has to be learned at h = 0, and student.regression_steps is 0" in line
    assert line.endswith("it has guidance.scale 2.0); try --set student.regression_steps=500, or student.kind=embedded")
    lines = []
    with logged(lines):
        job = plan(next_recipe(classes, other, earlier, regression_steps=4))
    assert any("it was trained with guidance.scale 2.0" in one for one in lines)
    assert any("the regression starts from the teacher's weights" in one for one in lines)
    x, t, _, cond = points(job.teacher)
    own = job.teacher.parametrization.velocity(job.teacher.network, x, t, cond)
    assert_same(job.student.mean_velocity(x, t, t, cond), own)
    assert torch.equal(*(dict(one.named_parameters())[KEY] for one in (job.student, student)))


KEY = "network.transformer_blocks.0.attn1.to_q.jump_weight"


def test_a_change_at_zero_is_not_put_onto_another_teacher(tmp_path, folder, fine_tuned):
    for name in ("full, v", "low, v"):
        earlier = saved("export", tmp_path / name, folder, CASES[name])[2]
        line = refused(next_recipe(fine_tuned, CASES[name], earlier))
        assert f"its teacher is {folder}); try --set student.regression_steps=500" in line


def test_a_teacher_of_the_same_name_with_other_weights_is_another_one(tmp_path, folder, fine_tuned):
    place = shutil.copytree(folder, tmp_path / "teacher")
    earlier = saved("export", tmp_path / "earlier", place, CASES["full, v"])[2]
    assert plan(next_recipe(place, CASES["full, v"], earlier)).student.network is not None
    shutil.copytree(fine_tuned, place, dirs_exist_ok=True)
    assert f"its teacher is {place}); try" in refused(next_recipe(place, CASES["full, v"], earlier))


REFUSED = {
    "another kind": (
        "full",
        {"kind": "embedded"},
        "kind embedded, full rank, got a student of kind scaled",
        "kind=scaled",
    ),
    "full for adapters": ("embedded", {"lora": {"rank": 2}}, "rank 2, got a student of kind embedded, full", "rank=0"),
    "another rank": ("low", {"lora": {"rank": 3}}, "rank 3, got a student of kind scaled, rank 2", "lora.rank=2"),
    "full for low": ("full", {"lora": {"rank": 3}}, "rank 3, got a student of kind scaled, full rank", "lora.rank=0"),
    "other layers": ("low", {"lora": {"rank": 2, "targets": ["to_q"]}}, "of a student with ", "student.lora.targets"),
    "another prediction": (
        "embedded",
        {"prediction": "v_prediction"},
        "v_prediction, got epsilon",
        "prediction=teacher",
    ),
    "its prediction": ("full, v", {"prediction": "teacher"}, "predicts epsilon, got v", "prediction=v_prediction"),
}


@pytest.mark.parametrize("where", SAVE)
@pytest.mark.parametrize("name", REFUSED)
def test_another_form_is_refused(tmp_path, folder, name, where):
    case, changes, got, advice = REFUSED[name]
    earlier = saved(where, tmp_path / "earlier", folder, CASES[case])[2]
    line = refused(next_recipe(folder, CASES[case], earlier, **changes))
    assert line.startswith(f"student.init {earlier}: expected ")
    assert got in line
    assert advice in line.partition("; try ")[2]


def test_another_architecture_is_refused(tmp_path, folder, classes):
    earlier = saved("export", tmp_path / "earlier", folder, CASES["full"])[2]
    line = refused(next_recipe(classes, CASES["full"], earlier))
    assert "expected a student of DiTTransformer2DModel, got one of UNet2DModel" in line
    wider = save_teacher(tmp_path / "wide", tiny_unet(block_out_channels=(8, 24)), DDPMScheduler())
    line = refused(next_recipe(wider, CASES["full"], earlier))
    assert re.search(r"expected \S+ of shape \[.*\], got \[.*\]; try", line)
    cosine = save_teacher(tmp_path / "cosine", scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    assert "got others (beta_schedule differs)" in refused(next_recipe(cosine, CASES["full"], earlier))
    line = refused(next_recipe(folder, CASES["timesteps"], earlier))
    assert "expected timesteps 400, got null; try --set timesteps=null" in line


def test_another_range_of_guidance_is_refused(tmp_path, classes):
    settings = {"student": {"kind": "embedded"}, "guidance": GUIDED}
    earlier = saved("run", tmp_path / "earlier", classes, settings)[2]
    line = refused(next_recipe(classes, settings | {"guidance": {"scale": 2.0}}, earlier))
    assert "expected guidance.range null, got [1.0, 3.0]; try --set 'guidance.range=[1.0, 3.0]'" in line


def test_a_run_of_another_teacher_is_refused_and_a_moved_teacher_is_not(tmp_path, folder, fine_tuned):
    earlier = saved("run", tmp_path / "earlier", folder, CASES["full"])[2]
    line = refused(next_recipe(fine_tuned, CASES["full"], earlier))
    assert f"expected a run of {fine_tuned}, got one of {folder}; " in line
    assert line.endswith(f"try its exported folder, {earlier / 'student'}")
    shutil.copytree(folder, tmp_path / "moved")
    plan(next_recipe(tmp_path / "moved", CASES["full"], earlier))


def test_what_is_no_student_is_refused(tmp_path, folder):
    for name, found in (("nothing", "nothing there"), ("empty", "a folder without student.json")):
        if name == "empty":
            (tmp_path / name).mkdir()
        line = refused(next_recipe(folder, CASES["full"], tmp_path / name))
        assert line.startswith(f"student.init {tmp_path / name}: expected a run folder, an exported folder or a Hub id")
        assert f"got {found}; " in line
    earlier = saved("run", tmp_path / "run", folder, CASES["full"])[2]
    [file] = earlier.glob("checkpoints/*/ema-0.999.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "expected the file that the run wrote, got a changed one" in refused(
        next_recipe(folder, CASES["full"], earlier)
    )
    shutil.rmtree(earlier / "checkpoints")
    assert "expected a run with a checkpoint" in refused(next_recipe(folder, CASES["full"], earlier))
    recipe = next_recipe(folder, CASES["full"], earlier, init_revision="main")
    assert "student.init_revision: expected none for the folder" in refused(recipe)


def test_a_finished_run_is_the_average_that_its_evaluation_chose(tmp_path, folder):
    recipe = recipe_of(folder, CASES["full"])
    student, teacher = trained(recipe)
    earlier = save_run(tmp_path / "run", recipe, student, teacher)
    [first] = earlier.glob("checkpoints/*/ema-0.999.safetensors")
    (earlier / "evaluation.json").write_text('{"protocol": {"ema": 0.9}, "rows": []}')
    line = refused(next_recipe(folder, CASES["full"], earlier))
    assert "ema-0.9.safetensors" in line
    (earlier / "evaluation.json").write_text('{"protocol": {"ema": 0.999}, "rows": []}')
    assert "(average 0.999 at step 7)" in str(plan(next_recipe(folder, CASES["full"], earlier)))
    assert first.is_file()


def test_a_run_without_checkpoints_is_its_export(tmp_path, folder):
    recipe = recipe_of(folder, CASES["full"])
    student, teacher = trained(recipe)
    earlier = save_run(tmp_path / "run", recipe, student, teacher)
    shutil.rmtree(earlier / "checkpoints")
    save_export(earlier / "student", recipe, student, teacher)
    job = plan(next_recipe(folder, CASES["full"], earlier))
    assert_same(values(job.student, teacher), values(student, teacher))


@pytest.mark.parametrize("name", ["full", "full, v", "low, v", "adapters", "embedded, v"])
def test_it_trains_and_resumes(tmp_path, folder, name):
    """Two steps at once are a step, a stop and another step."""
    earlier = saved("run", tmp_path / "earlier", folder, CASES[name])[2]

    def settings(steps):
        training = {"steps": steps, "batch_size": 4, "checkpoint_every": 1, "lr_schedule": "constant"}
        return next_recipe(folder, CASES[name] | {"training": training}, earlier).model_dump(mode="json")

    start = plan(Recipe.model_validate(settings(2))).student.state_dict()
    both = train(settings(2), tmp_path / "both")
    train(settings(1), tmp_path / "parts")
    parts = train(settings(2), tmp_path / "parts")
    ours, theirs = both.student.state_dict(), parts.student.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(not torch.equal(ours[key], start[key]) for key in start)
    # What is right at h = 0 stays, since no regression trains it.
    if "v" in name and "embedded" not in name:
        x, t, _, _ = points(both.teacher)
        job = plan(Recipe.model_validate(settings(2)))
        assert torch.equal(both.student.mean_velocity(x, t, t), job.student.mean_velocity(x, t, t))


def test_a_run_goes_on_with_the_student_that_it_started_from(tmp_path, folder):
    recipe = recipe_of(folder, CASES["full"])
    student, teacher = trained(recipe)
    place = save_run(tmp_path / "earlier", recipe, student, teacher)
    job = plan(next_recipe(folder, CASES["full"], place))
    run = save_run(tmp_path / "run", job.recipe, job.student, job.teacher)
    assert check_folder(run, job.recipe, fresh=False, seen={}) == []
    moved = shutil.copytree(place, tmp_path / "moved")
    other = next_recipe(folder, CASES["full"], moved)
    [line] = check_folder(run, other, fresh=False, seen={})
    assert line.startswith("student.init: ")
    save_run(place, recipe, trained(recipe, seed=2)[0], teacher)
    with pytest.raises(
        UserError, match=r"student\.init: expected the files that the run in .*ema-0\.999.* has changed"
    ):
        check_folder(run, job.recipe, fresh=False, seen={})
    plain = recipe_of(folder, CASES["full"])
    with pytest.raises(UserError, match=r"is a run of another recipe \(student\.init: expected "):
        check_folder(run, plain, fresh=False, seen={})


def test_the_commit_of_a_student_on_the_hub_is_stored(tmp_path, folder):
    recipe = recipe_of(folder, {"student": {"kind": "scaled", "init": "me/student"}})
    _, teacher = trained(recipe_of(folder, CASES["full"]))
    assert pinned(recipe, tmp_path) == recipe
    store_commits(tmp_path, teacher, "a" * 40)
    assert pinned(recipe, tmp_path).student.init_revision == "a" * 40
    # A run of an earlier version has no such entry.
    (tmp_path / "teacher.json").write_text('{"revision": null, "guidance.weaker_revision": null}')
    assert pinned(recipe, tmp_path) == recipe


def test_a_network_from_python_and_an_earlier_student_are_refused():
    recipe = Recipe.model_validate({"student": {"init": "me/student"}})
    with pytest.raises(UserError, match=r"student\.init: expected none with a network .* got me/student; leave one"):
        Given(student=tiny_unet()).name_in(recipe)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"training": {"steps": 0}}, "expected at least 1 without matching and student.init, got 0; with both"),
        (
            {"training": {"steps": 0}, "matching": MATCHING},
            "expected at least 1 without student.init, got 0; with both, the run",
        ),
        (
            {"training": {"steps": 0}, "student": {"init": "a"}},
            "expected at least 1 without matching, got 0; with both, the run",
        ),
        ({"student": {"init_revision": "a"}}, "student.init_revision: expected student.init with it, got none"),
    ],
)
def test_settings_without_a_sense_are_refused(settings, line):
    with pytest.raises(UserError, match=re.escape(line)):
        parse(settings, "here")


def test_a_run_of_the_second_stage_alone_trains_and_resumes(tmp_path, folder):
    earlier = saved("run", tmp_path / "earlier", folder, CASES["full"])[2]
    plain = {"steps": 0, "batch_size": 4, "checkpoint_every": 1}
    recipe = next_recipe(folder, CASES["full"] | {"training": plain, "matching": MATCHING}, earlier)
    settings, start = recipe.model_dump(mode="json"), plan(recipe).student.state_dict()
    seen, step_of = [], Trainer.train_step

    def step(self, number, request, stop=None):
        if number == stop:
            raise KeyboardInterrupt
        state = self.student.state_dict()
        seen.append(all(torch.equal(state[key], start[key]) for key in start))
        return step_of(self, number, request)

    with patch.object(Trainer, "train_step", step):
        complete = train(settings, tmp_path / "complete")
    # The critic alone for two steps, then three steps of the student.
    assert seen == [True, True, True, False, False]
    for stop in (1, 4):
        with patch.object(Trainer, "train_step", partialmethod(step, stop=stop)), pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "stopped")
    ours, theirs = train(settings, tmp_path / "stopped").student.state_dict(), complete.student.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_of_the_second_stage_alone_has_a_forecast(tmp_path, folder):
    earlier = saved("run", tmp_path / "earlier", folder, CASES["full"])[2]
    extra = {"loss": {"name": "eulerian"}, "fraction": 0.25}
    settings = {"training": {"steps": 0, "batch_size": 8}, "matching": MATCHING, "extra_losses": [extra]}
    job = plan(next_recipe(folder, CASES["full"] | settings, earlier))
    assert (job.recipe.map_steps, job.recipe.total_steps) == (0, 5)
    usual = job.recipe.model_copy(update={"training": job.recipe.training.model_copy(update={"steps": 9})})
    assert forecast_memory(job.student, job.teacher, job.recipe) == forecast_memory(job.student, job.teacher, usual)


def test_another_ip_adapter_is_another_velocity(tmp_path, folder):
    _, teacher, earlier = saved("run", tmp_path / "earlier", folder, CASES["full"])
    recipe = next_recipe(folder, CASES["full"], earlier)
    assert read_earlier(recipe).why_not_at_zero(recipe, teacher) is None
    file = tmp_path / "earlier" / "recipe.yaml"
    adapter = {"source": "some/adapter", "weight_name": "look.safetensors"}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"ip_adapter": adapter}))
    reason = read_earlier(recipe).why_not_at_zero(recipe, teacher)
    assert reason == "it has ip_adapter.weight_name look.safetensors"
