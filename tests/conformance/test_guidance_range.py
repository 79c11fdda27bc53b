"""Students that are told the scale of their guidance."""

from __future__ import annotations

import copy

import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline

from fmm_distill.cli import command as cli
from fmm_distill.config.recipe import parse
from fmm_distill.core.draws import draw
from fmm_distill.data.starting_points import StartingPoints
from fmm_distill.errors import UserError
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.verify import Exported, verify_all
from fmm_distill.losses import Jump
from fmm_distill.losses.time_sampling import sample_times
from fmm_distill.run.distill import distill
from fmm_distill.run.plan import open_teacher, plan
from fmm_distill.run.reopen import open_run
from fmm_distill.student.fold import fold
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training.objective import Objective
from tests.conformance.test_prompted import FAMILIES, PROMPTS
from tests.conformance.test_prompted_edges import recipe_of
from tests.conftest import save_teacher, tiny_unet
from tests.logs import logged
from tests.tiny.diffusion import PIPELINES

# Discrete levels, latents of classes, and a flow whose guidance is off at 0.
NAMES = ("sd1", "dit", "z-image")
RANGE = Guidance(3.0, (0.0, 1.0), (1.0, 7.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in NAMES:
        made[name] = tmp_path_factory.mktemp(name) / "teacher"
        (PIPELINES["dit"] if name == "dit" else FAMILIES[name]).build().save_pretrained(made[name])
    return made


def opened(folder, name, guidance=RANGE):
    told = {} if name == "dit" else {"prompts": PROMPTS, "call": dict(FAMILIES[name].call)}
    return load_teacher(str(folder), guidance=guidance, **told)


def moved(student):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for embedding in student.network.jump_embedding:
            torch.nn.init.normal_(embedding.linear_2.weight, std=0.3)
            torch.nn.init.normal_(embedding.guidance.linear_2.weight, std=0.3)
    return student.eval()


def inputs(teacher, count=3):
    x = torch.randn(count, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.linspace(0.5, 1, count, dtype=torch.float64))
    return x, t, teacher.schedule.time_at(torch.zeros(count, dtype=torch.float64)), torch.linspace(0, 0.9, count)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_sample_is_guided_by_its_own_scale(folders, name):
    teacher, plain = opened(folders[name], name), opened(folders[name], name, None)
    x, t, _, places = inputs(teacher)
    cond, scales = plain.conditions.pick(places), torch.tensor([1.0, 2.5, 6.0])
    v, null = plain.velocity(x, t, cond), plain.velocity(x, t, plain.conditions.null(cond))
    wanted = null + scales.reshape(-1, *[1] * (v.ndim - 1)) * (v - null)
    torch.testing.assert_close(teacher.velocity(x, t, cond.guided(scales)), wanted, atol=1e-4, rtol=1e-4)
    fixed = opened(folders[name], name, Guidance(3.0))
    assert torch.equal(teacher.velocity(x, t, teacher.conditioned_on(places)), fixed.velocity(x, t, cond))
    # Its parts and rows keep their scales.
    assert cond.guided(scales).part(1, 3).rows(torch.tensor([1])).guidance.tolist() == [6.0]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_student_starts_as_the_unguided_teacher_and_then_depends_on_the_scale(folders, name):
    teacher = opened(folders[name], name)
    x, t, r, places = inputs(teacher)
    cond = teacher.conditions.pick(places)
    low, high = cond.guided(1.0), cond.guided(7.0)
    student = Student.from_teacher(teacher)
    torch.testing.assert_close(student.mean_velocity(x, t, r, high), teacher.velocity(x, t, low), atol=1e-6, rtol=1e-5)
    moved(student)
    assert (student(x, t, r, high) - student(x, t, r, low)).abs().max() > 1e-3
    # The diagonal depends on it too: the velocity that it learns is the guided one.
    assert (student.mean_velocity(x, t, t, high) - student.mean_velocity(x, t, t, low)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"expects w in .*1.*7.* with h"):
        student(x, t, r, cond)


@torch.no_grad()
def test_in_training_student_and_teacher_are_told_the_same_scales(folders):
    recipe = parse({"loss": {"name": "lagrangian"}, "time_sampling": {"prior": 0.25}}, "here")
    teacher = opened(folders["dit"], "dit")
    student = moved(Student.from_teacher(teacher))
    draws = draw(0, 0, 16, teacher.event_shape)
    losses, *_ = Objective(student, teacher, recipe, recipe.losses)(draws, None, 0)
    t, r = sample_times(recipe.time_sampling, teacher.schedule, draws, 0)
    cond = teacher.conditions.pick(draws.condition).guided(1 + 6 * draws.guidance)
    assert 1 < cond.guidance.min() < 2
    assert 6 < cond.guidance.max() < 7
    x_t = StartingPoints(teacher, student)(draws, t, cond)
    by_hand = recipe.loss(student, teacher.velocity, Jump(x_t, t, r, cond, draws.uniform))
    torch.testing.assert_close(losses, by_hand)
    wrong = recipe.loss(student, teacher.velocity, Jump(x_t, t, r, cond.guided(3.0), draws.uniform))
    assert (wrong - by_hand).abs().max() > 1e-3 * by_hand.max()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_folds_to_the_teachers_scale(folders, name):
    teacher = opened(folders[name], name)
    student = moved(Student.from_teacher(teacher))
    times = student.schedule.grid(1)
    network = fold(student, teacher, times)
    x, _, _, places = inputs(teacher)
    t = times[:1].expand(3)
    v = student.parametrization.velocity(network, x, t, teacher.conditions.pick(places))
    told = student.mean_velocity(x, t, times[1:].expand(3), teacher.conditioned_on(places))
    torch.testing.assert_close(v, told, atol=1e-4, rtol=1e-4)
    other = student.mean_velocity(x, t, times[1:].expand(3), teacher.conditioned_on(places).guided(5.0))
    assert (v - other).abs().max() > 1e-3


@pytest.fixture(scope="module")
def exports(folders, tmp_path_factory):
    made = {}
    for name in NAMES:
        teacher = opened(folders[name], name)
        student, folder = moved(Student.from_teacher(teacher)), tmp_path_factory.mktemp("out") / "student"
        made[name] = Exported(student, exporter_of(teacher), export_pipeline(student, teacher, folder, (2,)), (2,))
    return made, dict(zip(made, verify_all(list(made.values())), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_exports_agree_at_the_teachers_scale(exports, name):
    assert exports[1][name].keys() == {"any-2", "folded-2"}
    assert all(one.passed for one in exports[1][name].values())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_any_step_pipeline_takes_a_scale_by_the_stock_keyword(exports, name, caplog):
    made = exports[0][name]
    pipeline = DiffusionPipeline.from_pretrained(made.folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    call = made.exporter.verification_call(2)
    noise, cond = made.exporter.start(call, 2, 0)
    own = sample(made.student, noise, 2, cond.guided(6.0))
    del call["guidance_scale"]

    def run(**more):
        given = call | {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "return_dict": False}
        # Some pipelines change the lists that they are given.
        return torch.as_tensor(pipeline(**copy.deepcopy(given | more))[0])

    if name == "dit":
        own = (made.teacher.codec.decode(own) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    shown = run(guidance_scale=6.0)
    torch.testing.assert_close(shown, own.reshape(shown.shape), atol=1e-4, rtol=1e-4)
    assert "adds to it" not in caplog.text
    assert torch.equal(run(), run(guidance_scale=3.0))
    assert (run() - shown).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"guidance_scale must be 1 to 7, .* got 7\.5"):
        run(guidance_scale=7.5)


def test_a_run_is_sampled_evaluated_and_exported_at_any_scale_of_its_range(folders, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    recipe = recipe_of(str(folders["sd1"]), prompts, guidance={"scale": 2.0, "range": [1.0, 5.0]})
    lines = []
    with logged(lines):
        measured = distill(recipe, tmp_path / "run")
    assert measured.protocol["guidance"] == 2.0
    assert "2 prompts, guided by 2 (an input: 1 to 5)" in "\n".join(lines)
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "guidance from 1 to 5 is an input of the any-step pipeline. In the pipelines of a fixed number" in card
    assert "guidance_scale=2.0)[0]" in card
    assert "guidance_scale=1.0)[0]" in card
    assert open_run(tmp_path / "run", 4.0).teacher.guidance.scale == 4.0
    command = ["export", str(tmp_path / "run"), str(tmp_path / "at4"), "--guidance", "4"]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "reloaded with stock diffusers" in result.output
    biases = []
    for folder in (tmp_path / "run" / "student", tmp_path / "at4"):
        unet = DiffusionPipeline.from_pretrained(folder / "steps-1").unet
        biases.append(unet.time_embedding.linear_2.bias.detach())
    assert not torch.equal(*biases)
    with pytest.raises(UserError, match=r"--guidance: expected a scale from 1 to 5, got 6"):
        open_run(tmp_path / "run", 6.0)


def test_ranges_that_can_not_be(folders, tmp_path):
    for wrong in ([3.0, 2.0], [2.5, 5.0], [2.0, 2.0]):
        with pytest.raises(
            UserError, match=r"guidance\.range: expected two increasing scales .* with guidance\.scale: 2"
        ):
            parse({"guidance": {"scale": 2.0, "range": wrong}}, "here")
    with pytest.raises(UserError, match=r"guidance\.range\.0: Input should be greater than or equal to 0"):
        parse({"guidance": {"scale": 2.0, "range": [-1.0, 4.0]}}, "here")
    ranged = {"scale": 2.0, "range": [1.0, 5.0]}
    plain = save_teacher(tmp_path / "plain", tiny_unet(num_class_embeds=3))
    with pytest.raises(UserError, match=r"expected a label for no class"):
        plan(parse({"teacher": str(plain), "guidance": ranged}, "here"))
    with pytest.raises(
        UserError, match=r"guidance\.range: expected a teacher whose pipeline is called with a guidance_scale"
    ):
        open_teacher(parse({"teacher": str(plain), "guidance": ranged | {"weaker": str(plain)}}, "here"))
    flux = FAMILIES["flux"]
    flux.build().save_pretrained(tmp_path / "flux")
    with pytest.raises(UserError, match=r"guidance\.range: expected none for a network that is conditioned"):
        load_teacher(str(tmp_path / "flux"), call=dict(flux.call), guidance=RANGE)


@torch.no_grad()
def test_away_from_a_weaker_teacher_too(folders, tmp_path):
    pipeline = PIPELINES["dit"].build()
    pipeline.transformer.proj_out_2.weight.mul_(0.5)
    pipeline.save_pretrained(tmp_path / "weak")
    guidance = {"scale": 3.0, "range": [1.0, 7.0], "weaker": str(tmp_path / "weak")}
    teacher = open_teacher(parse({"teacher": str(folders["dit"]), "guidance": guidance}, "here"))
    x, t, _, places = inputs(teacher)
    cond, scales = teacher.conditions.pick(places), torch.tensor([1.0, 2.5, 6.0])
    better, worse = (load_teacher(str(f)).velocity(x, t, cond) for f in (folders["dit"], tmp_path / "weak"))
    wanted = worse + scales.reshape(-1, 1, 1, 1) * (better - worse)
    torch.testing.assert_close(teacher.velocity(x, t, cond.guided(scales)), wanted, atol=1e-5, rtol=1e-4)
