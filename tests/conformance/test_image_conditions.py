"""Teachers whose pipelines are called with images: an image per sample is a part of its condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import pytest
import torch

from fmm_distill.config.recipe import parse
from fmm_distill.core.conditioning import Conditioning
from fmm_distill.core.derivatives.engines import choose_engine, derivative_in_r
from fmm_distill.core.time_axis import expand
from fmm_distill.errors import UserError
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.load import load_student
from fmm_distill.export.manifest import make_manifest, write_manifest
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.verify import Exported, verify_all
from fmm_distill.losses import Jump
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.student.lora import default_targets
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.guiders import set_plain_guiders
from fmm_distill.teachers.ip_adapter import IpAdapter
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompted.encoding import encoding_by_mode
from fmm_distill.teachers.prompts import Prompts
from fmm_distill.teachers.recording import record
from tests.conformance.stock_steps import InDouble, check_steps, euler_of
from tests.conformance.test_prompted_export import moved
from tests.scaled import one_by_one, relative, scaled_student
from tests.slow import with_slow
from tests.tables import check_table
from tests.tiny import layouts
from tests.tiny.image_conditions import LARGE, PIPELINES, images_for, picture
from tests.tiny.ip_adapters import WEIGHTS, save_adapter

TEXTS = ("a cat", "two dogs in the snow", "a house")
# Their pipelines take one prompt at a time.
SINGLE = {"wan-image", "wan-first-frame", "flux2-edit", "sd-ip-adapter", "sdxl-ip-adapter", *LARGE}
# Their pipelines call their ControlNet for one of two outputs, or have no guidance by two.
UNGUIDED = {"flux-controlnet", "flux-fill", "flux-control"}
# Their networks are conditioned on the guidance scale.
EMBEDDED = {"flux-kontext"}
# Where the image enters: joined to the sample, with the time 0, or through a network of its own.
FIRST_FRAMES = {"wan-first-frame", "ltx-image"}
WITH_ADAPTERS = ("flux-kontext", "wan-first-frame", "sd-controlnet", "sd-ip-adapter")
CONTROLLED = {name for name in PIPELINES if "controlnet" in name}
ADAPTED = {name for name, tiny in PIPELINES.items() if tiny.ip_adapter}
ALL = PIPELINES | LARGE
# Images enter these as they enter families that are tested by default.
ALIKE = {"sdxl-inpaint", "flux-control", "cogvideox-image", "two-controlnets", "sdxl-controlnet", "sd3-controlnet"}
SLOW = {"sdxl-ip-adapter", "sd-ip-adapter, adapters", *ALIKE, *LARGE}
# Its effect is far above rounding, and the text still has one.
SCALE = 0.6


@dataclass(frozen=True)
class Opened:
    name: str
    folder: str
    prompts: Prompts
    adapter: IpAdapter | None

    @property
    def call(self):
        return dict(ALL[self.name].call)

    def load(self, numbers=(0, 1), **more):
        return self.load_with(self.prompts.some(numbers), **more)

    def load_with(self, prompts, **more):
        return load_teacher(self.folder, prompts=prompts, call=self.call, ip_adapter=self.adapter, **more)

    def stock(self):
        """The pipeline as a user of diffusers opens it."""
        pipeline = diffusers.DiffusionPipeline.from_pretrained(self.folder)
        if self.adapter is not None:
            pipeline.load_ip_adapter(self.adapter.source, subfolder="", weight_name=self.adapter.weight_name)
            pipeline.set_ip_adapter_scale(self.adapter.scale)
        return pipeline


class Lazy(dict):
    """Entries that are made when they are used: by default the slow ones are not."""

    def __init__(self, make: Callable[[str], object]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, name: str) -> object:
        self[name] = self.make(name)
        return self[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    def save(name):
        if name == "longcat-edit":
            pytest.importorskip("torchvision", reason="its processor of videos needs it")
        folder, tiny, adapter = tmp_path_factory.mktemp(name), ALL[name], None
        pipeline = tiny.build()
        pipeline.save_pretrained(folder, safe_serialization=True)
        if tiny.ip_adapter:
            source = save_adapter(tmp_path_factory.mktemp(f"{name}-weights"), pipeline)
            adapter = IpAdapter(str(source), WEIGHTS, scale=SCALE)
        return Opened(name, str(folder), Prompts(TEXTS, images_for(tiny, 3)), adapter)

    return Lazy(save)


@pytest.fixture(scope="module")
def teachers(folders):
    return Lazy(lambda name: folders[name].load())


NAMES = pytest.mark.parametrize("name", with_slow(ALL, set(ALL) - SLOW))
# Its network takes seconds in tests that open it several times.
MOST = pytest.mark.parametrize("name", with_slow(ALL, set(ALL) - SLOW - {"svd"}))


def inputs(teacher):
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t, r = (teacher.schedule.time_at(torch.tensor(times, dtype=torch.float64)) for times in ((0.6, 0.9), (0.2, 0.5)))
    return x, t, r


def frozen_parts(teacher):
    """Networks that are called with the student's, and are not trained."""
    call = teacher.parametrization.call
    return [*(side.network for side in call.sides), *([] if call.adapter is None else [call.adapter])]


def arguments(teacher, prompts):
    takes_prompt = teacher.pipeline.condition == "prompt"
    return prompts.keywords(one=teacher.pipeline.one_prompt, prompt=takes_prompt)


def change(value, other, tolerance=1e-4):
    return ((value - other).flatten(1).norm(dim=1) > tolerance * value.flatten(1).norm(dim=1)).all()


@NAMES
def test_where_the_image_enters(teachers, name):
    teacher = teachers[name]
    call, images = teacher.parametrization.call, teacher.conditions.images
    assert set(images) == set(ALL[name].images)
    assert teacher.pipeline.one_prompt == (name in SINGLE)
    assert bool(call.sides) == (name in CONTROLLED)
    assert (call.adapter is not None) == (name in ADAPTED)
    assert (call.joined is None) == (name in CONTROLLED | ADAPTED)
    assert (call.timed is not None) == (name in FIRST_FRAMES)
    if name in FIRST_FRAMES:
        assert call.joined.start > 0
        assert not call.timed.all()


@NAMES
@torch.no_grad()
def test_one_euler_step_is_one_stock_step(folders, teachers, name):
    source, teacher = folders[name], teachers[name]
    pipeline = source.stock()
    pipeline.scheduler = euler_of(pipeline, teacher)
    set_plain_guiders(pipeline, 1.0)
    numbers = (0,) if teacher.pipeline.one_prompt else (0, 1)
    off = teacher.pipeline.call | teacher.pipeline.unguided() | {"output_type": "latent", "num_inference_steps": 10}
    given = arguments(teacher, source.prompts.some(numbers))
    seen = record(pipeline, teacher.pipeline.component, off | given | {"generator": torch.manual_seed(0)})
    assert len(seen.steps) == 10
    # Pipelines may draw the latents of an image: its condition is that of this run.
    cond = teacher.parametrization.call.conditions_of(seen.calls[0].arguments, len(numbers))
    check_steps(seen, teacher, pipeline.scheduler, cond)


@MOST
@torch.no_grad()
def test_a_sample_depends_on_its_prompt_and_its_image_alone(folders, teachers, name):
    source, teacher = folders[name], teachers[name]
    x, t, _ = inputs(teacher)
    v = teacher.velocity(x, t, teacher.conditions.prompts)
    largest = v.abs().max()
    # Another order of another number.
    more = source.load((2, 1, 0)).conditions.prompts.rows(torch.tensor([2, 1]))
    assert (teacher.velocity(x, t, more) - v).abs().max() < 1e-4 * largest
    alone = teacher.velocity(x[1:], t[1:], teacher.conditions.prompts.rows(torch.tensor([1])))
    assert (alone - v[1:]).abs().max() < 1e-4 * largest
    # The first sample with the image of another one, and the second one with another prompt.
    others = Prompts((source.prompts.texts[0], "a ship"), source.prompts.some((2, 1)).images)
    changed = teacher.velocity(x, t, source.load_with(others).conditions.prompts)
    assert change(v[:1], changed[:1])
    assert change(v[1:], changed[1:]) == (teacher.pipeline.condition is not None)


@MOST
def test_the_student_is_its_teacher_and_moves(teachers, name):
    """The start, the exact derivative against differences in float64, and two steps of training."""
    teacher = teachers[name]
    student, cond = Student.from_teacher(teacher), teacher.conditions.prompts
    x, t, r = inputs(teacher)
    with torch.no_grad():
        v = teacher.velocity(x, t, cond)
        assert (student.mean_velocity(x, t, t, cond) - v).abs().max() <= 1e-6 * v.abs().max()
    optimizer = torch.optim.SGD(student.network.jump_embedding.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        Lagrangian()(student, teacher.velocity, Jump(x, t, r, cond, t)).sum().backward()
        torch.nn.utils.clip_grad_norm_(student.network.jump_embedding.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        assert change(student.mean_velocity(x, t, r, cond), student.mean_velocity(x, t, t, cond), 1e-9)
    assert all(not p.requires_grad for part in frozen_parts(teacher) for p in part.parameters())


@MOST
def test_the_derivative_in_r(folders, name):
    if name == "longcat-edit":
        pytest.skip("one matrix of attention over its 8192 tokens takes a gigabyte in float64")
    teacher = folders[name].load()
    student = moved(Student.from_teacher(teacher))
    x, t, r = inputs(teacher)
    cond = teacher.conditions.prompts
    engine, reason = choose_engine(student, x, t, r, cond)
    assert engine == "exact", reason
    single = derivative_in_r(student, x, t, r, cond=cond)
    student.double()
    for part in frozen_parts(teacher):
        part.double()

    def wide(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    cond = Conditioning(*({k: wide(v) for k, v in values.items()} for values in (cond.inputs, cond.shared)))
    with InDouble(), torch.no_grad():
        exact = derivative_in_r(student, x.double(), t, r, cond=cond)
        h = student.clock.warp(t) - student.clock.warp(r)
        ends = [student.mean_velocity_of_jump(x.double(), t, h + step, cond) for step in (1e-5, -1e-5)]
    central = (ends[0] - ends[1]) / 2e-5 * -expand(student.clock.dwarp_dt(r), x.double())
    assert (exact - central).norm() < 1e-5 * exact.norm()
    assert (single - exact).norm() < 1e-4 * exact.norm()


@NAMES
@torch.no_grad()
def test_guidance_is_the_pipelines_own(folders, teachers, name):
    source, teacher = folders[name], teachers[name]
    if name in UNGUIDED:
        with pytest.raises(UserError, match=r"guidance: .* try guidance\.scale 1"):
            teacher.conditions.check_null()
        return
    teacher = source.load(guidance=Guidance(3.0))
    if name in EMBEDDED:
        assert teacher.guidance is None
        assert teacher.pipeline.network_guidance == 3.0
        return
    pipeline = source.stock()
    pipeline.scheduler = euler_of(pipeline, teacher)
    set_plain_guiders(pipeline, 3.0)
    numbers = (0,) if teacher.pipeline.one_prompt else (0, 1)
    given = teacher.conditions.given.some(numbers)
    run = {"output_type": "latent", "num_inference_steps": 4, "generator": torch.manual_seed(0)}
    run |= teacher.pipeline.call | teacher.pipeline.guided(3.0) | arguments(teacher, given)
    # Draws of an image's latents would be others in both parts of the guidance.
    with encoding_by_mode(pipeline, given):
        seen = record(pipeline, teacher.pipeline.component, run)
    check_steps(seen, teacher, pipeline.scheduler, teacher.conditions.prompts.part(0, len(numbers)))


ADAPTERS = ", adapters"
# Adapters of one joined as tokens, one with a first frame, one with a ControlNet, one with an IP-Adapter.
EXPORTED = [*ALL, *(f"{name}{ADAPTERS}" for name in WITH_ADAPTERS)]


@pytest.fixture(scope="module")
def students(teachers, tmp_path_factory):
    """An exported student of each teacher."""

    def export(name):
        teacher = teachers[name.removesuffix(ADAPTERS)]
        student = scaled_student(teacher, 2) if name.endswith(ADAPTERS) else moved(Student.from_teacher(teacher))
        folder = export_pipeline(student, teacher, tmp_path_factory.mktemp("student") / "student", (2,))
        return Exported(student, exporter_of(teacher), folder, (2,))

    return Lazy(export)


def group_of(name):
    """Which exports are opened together: the large ones alone, of which one needs another package."""
    return name if name in LARGE else name in SLOW


@pytest.fixture(scope="module")
def exports(students):
    def verified(group):
        # One process opens all of them.
        names = [name for name in EXPORTED if group_of(name) == group]
        return dict(zip(names, verify_all([students[name] for name in names]), strict=True))

    return Lazy(verified)


@NAMES
@torch.no_grad()
def test_adapters_that_change_with_the_length_of_the_jump(teachers, name):
    teacher = teachers[name]
    student = scaled_student(teacher, 2)
    x, t, r = inputs(teacher)
    cond = teacher.conditions.prompts
    v = teacher.velocity(x, t, cond)
    assert (student.mean_velocity(x, t, t, cond) - v).abs().max() <= 1e-6 * v.abs().max()
    u = student.mean_velocity(x, t, r, cond)
    assert relative(u, one_by_one(student, x, t, r, cond)) < 1e-5
    assert relative(u, v) > 1e-2


def rows_of(teachers):
    head = ("tried", "pipeline", "images", "where they enter", "guidance", "layers with LoRA")
    lines = [head, ("---",) * len(head)]
    for name in PIPELINES:
        teacher = teachers[name]
        call = teacher.parametrization.call
        joined = "" if call.joined is None else f"joined, axis {call.joined.axis}"
        joined = joined if call.adapter is None else "attention"
        where = (", ".join(side.name for side in call.sides) or joined) + (", time 0" if call.timed is not None else "")
        guided = "an input" if teacher.pipeline.network_guidance is not None else "no"
        by_image = "yes, and by the image" if teacher.conditions.image_guidance is not None else "yes"
        lines.append(
            (
                name,
                f"`{teacher.pipeline.class_name}`",
                ", ".join(f"`{keyword}`" for keyword in teacher.conditions.images),
                where,
                by_image if teacher.conditions.empty is not None and name not in EMBEDDED else guided,
                str(len(default_targets(teacher.network))),
            )
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_list_in_the_docs_is_what_was_tried(teachers):
    check_table("image-conditions.md", rows_of(teachers))


@pytest.mark.parametrize("name", with_slow(EXPORTED, set(EXPORTED) - SLOW))
def test_exports_open_elsewhere_and_are_called_with_images(exports, name):
    found = exports[group_of(name)][name]
    assert sorted(found) == ["any-2", "folded-2"]
    assert all(one.passed for one in found.values()), found


@torch.no_grad()
@MOST
def test_a_student_loads_from_its_folder_with_images(students, folders, name, monkeypatch, tmp_path):
    export, teacher = students[name], students[name].teacher
    recipe = parse({"teacher": "builtin:digits"}, "here")
    write_manifest(export.folder, make_manifest(export.student, teacher, recipe, export.steps))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    loaded = load_student(export.folder, prompts=folders[name].prompts.some((0, 1)))
    noise = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    own = sample(export.student, noise, 2, teacher.first_conditions(2))
    made = loaded.generate(noise, 2, [0, 1])
    assert (made - own).abs().max() <= 1e-5 * own.abs().max()


@torch.no_grad()
@NAMES
def test_samples_decode(teachers, name):
    teacher = teachers[name]
    decoded = teacher.codec.decode(torch.randn(1, *teacher.event_shape, generator=torch.Generator().manual_seed(0)))
    assert decoded.isfinite().all()
    assert decoded.shape[:2] == (1, 3)


@torch.no_grad()
def test_a_list_of_images_may_be_the_images_of_one_sample(tmp_path):
    # In a call for two prompts, this pipeline gives both images to both samples.
    tiny = layouts.PIPELINES["ltx-condition"]
    tiny.build().save_pretrained(tmp_path, safe_serialization=True)
    samples = Prompts(TEXTS, {"image": tuple(picture(seed, (32, 32)) for seed in range(3))})
    one, other = (
        load_teacher(str(tmp_path), prompts=samples.some(numbers), call=dict(tiny.call)) for numbers in ((0, 1), (1, 2))
    )
    assert one.pipeline.one_prompt
    x, t, _ = inputs(one)
    swapped = one.first_conditions(2).rows(torch.tensor([1, 0]))
    v = one.velocity(x, t, swapped)
    assert torch.allclose(v[:1], other.velocity(x, t, other.first_conditions(2))[:1], atol=1e-5)
