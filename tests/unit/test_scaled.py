"""Students whose weights change with the length of the jump: the network, its derivatives and its training."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from fmm_distill.config.recipe import Recipe
from fmm_distill.config.settings import TrainingSettings
from fmm_distill.core.derivatives.engines import (
    choose_engine,
    value_and_derivative_along_flow,
    value_and_derivative_in_r,
)
from fmm_distill.core.draws import draw
from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import FlowMatching
from fmm_distill.core.time_axis import expand
from fmm_distill.errors import UserError
from fmm_distill.losses import Jump
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.student.fold import fold
from fmm_distill.student.scaled import ScaledWeights, scaled_ranks
from fmm_distill.student.scaled_adapters import merge_diagonal, share_network
from fmm_distill.student.scaled_layers import scaled_layers
from fmm_distill.student.student import Student, is_new
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training.checkpoint import load as load_checkpoint
from fmm_distill.training.compile import accelerate_networks, checkpoint_blocks
from fmm_distill.training.objective import Objective
from tests.conformance.test_prompted import InDouble
from tests.conftest import save_teacher, tiny_unet
from tests.logs import logged
from tests.scaled import one_by_one, points, randomize, relative, scaled_student, train

RANKS = (0, 2)
TRAINING = {"steps": 4, "batch_size": 8, "checkpoint_every": 100, "lr_schedule": "constant"}
SETTINGS = {"loss": {"name": "lagrangian", "stop_gradient": "target"}, "training": TRAINING}


def recipe_of(folder, rank, **changes):
    student = {"kind": "scaled", "lora": {"rank": rank}} | changes.pop("student", {})
    return {"teacher": str(folder)} | SETTINGS | {"student": student} | changes


@pytest.fixture(params=RANKS)
def rank(request):
    return request.param


@pytest.fixture(scope="module")
def epsilon_folder(tmp_path_factory):
    """A teacher whose prediction the student changes, which a regression has to learn."""
    return save_teacher(tmp_path_factory.mktemp("epsilon"), scheduler=DDPMScheduler(prediction_type="epsilon"))


@torch.no_grad()
def test_without_a_length_it_is_the_stock_network(teacher, rank):
    network = scaled_student(teacher, rank, diagonal=rank > 0).network
    x, time = points(teacher)[0], torch.tensor([3.0, 700.5])
    assert isinstance(network, UNet2DModel)
    assert torch.equal(network(x, time).sample, tiny_unet().eval()(x, time).sample)
    assert torch.equal(network(x, time, return_dict=False)[0], tiny_unet().eval()(x, time).sample)
    assert not torch.equal(network(x, time, h=torch.ones(2)).sample, network(x, time).sample)
    # A call that fails leaves no length behind.
    with pytest.raises(RuntimeError):
        network(torch.zeros(2, 3, 8, 8), time, h=torch.ones(2))
    assert network.call_state.jump.h is None


def test_every_layer_that_is_called_has_a_change(teacher, rank):
    student = Student.from_teacher(teacher, scaled=ScaledWeights(rank=rank))
    called = [n for n, m in tiny_unet().named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert scaled_ranks(student.network) == dict.fromkeys(called, rank)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in student.named_parameters() if is_new(name)}
    assert len(trained) >= 2 * len(called)


@torch.no_grad()
def test_the_diagonal_is_the_teacher_to_the_last_bit(teacher, rank):
    student = Student.from_teacher(teacher, scaled=ScaledWeights(rank=rank))
    x, t, r, _ = points(teacher, 5)
    v = teacher.velocity(x, t)
    # Untrained, the jumps are too.
    assert torch.equal(student.mean_velocity(x, t, r), v)
    randomize(student, 3.0)
    assert torch.equal(student.mean_velocity(x, t, t), v)
    u = student.mean_velocity(x, t, r)
    assert relative(u, v) > 0.1
    # And u - v is of the order of h.
    distances = [relative(student.mean_velocity_of_jump(x, t, torch.full((5,), h)), v) for h in (1e-3, 2e-3)]
    assert distances[1] == pytest.approx(2 * distances[0], rel=0.02)


@torch.no_grad()
def test_a_batch_is_its_samples_and_groups_are_their_samples(teacher, rank):
    student = scaled_student(teacher, rank)
    x, t, r, _ = points(teacher, 6)
    batch = student.mean_velocity(x, t, r)
    torch.testing.assert_close(batch, one_by_one(student, x, t, r), rtol=1e-4, atol=1e-5)
    t, r = (times[::2].repeat_interleave(2) for times in (t, r))
    expected = student.mean_velocity(x, t, r)
    student.network.call_state.group = 2
    torch.testing.assert_close(student.mean_velocity(x, t, r), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="one length of the jump"):
        student.mean_velocity(x, *points(teacher, 6)[1:3])


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("functional", [False, True])
def test_forward_mode_is_what_differences_are(teacher, rank, group, functional):
    """In r and along the flow: forward mode, central differences, and numeric differences in float64."""
    student = scaled_student(teacher, rank)
    student.needs_functional_jvp = functional
    x, t, r, _ = points(teacher, 4)
    if group == 2:
        t, r = (times[::2].repeat_interleave(2) for times in (t, r))
    student.network.call_state.group = group
    engine, reason = choose_engine(student, x, t, r)
    assert engine == "exact", reason
    v = teacher.velocity(x, t)

    def both(of_engine, x, v, **options):
        in_r = value_and_derivative_in_r(student, x, t, r, engine=of_engine, **options)
        return *in_r, *value_and_derivative_along_flow(student, x, t, r, v, engine=of_engine, **options)

    exact, central = both("exact", x, v), both("central", x, v)
    detached = both("exact", x, v, detached=True)
    student.double()
    x, v = x.double(), v.double()
    with InDouble(), torch.no_grad():
        truth = both("exact", x, v)
        h, step = student.clock.warp(t) - student.clock.warp(r), 1e-5
        ends = [student.mean_velocity_of_jump(x, t, h + side) for side in (step, -step)]
        in_r = (ends[0] - ends[1]) / (2 * step) * -expand(student.clock.dwarp_dt(r), x)
        # A short step in t: the noise levels are steep.
        ends = [student.mean_velocity(x + side * v, t + side, r) for side in (step / 100, -step / 100)]
        along = (ends[0] - ends[1]) / (2 * step / 100)
    assert relative(truth[1], in_r) < 1e-6
    assert relative(truth[3], along) < 1e-5
    for values, tolerance in ((exact, 1e-4), (detached, 1e-4), (central, 2e-3)):
        assert all(relative(one, other) < tolerance for one, other in zip(values, truth, strict=True))
    assert not detached[1].requires_grad
    assert exact[1].requires_grad


def test_the_gradient_reaches_the_change_and_not_the_weights(teacher, rank):
    student = scaled_student(teacher, rank)
    x, t, r, _ = points(teacher)
    teacher = share_network(student, teacher)
    loss = Lagrangian(stop_gradient="nowhere", derivative="exact")
    loss(student, teacher.velocity, Jump(x, t, r, None, t)).sum().backward()
    with_gradient = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert with_gradient == {name for name, _ in student.named_parameters() if is_new(name)}


def test_the_gradient_is_the_difference_of_the_loss(teacher, rank):
    """In float64: along a random direction of all changes, reverse mode is what numeric differences are."""
    student = scaled_student(teacher, rank).double()
    x, t, r, _ = points(teacher)
    x = x.double()
    changes = [p for p in student.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in changes]

    def loss():
        with InDouble():
            return student.mean_velocity(x, t, r).square().sum()

    gradients = torch.autograd.grad(loss(), changes)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    ends = []
    for side in (1e-6, -2e-6):
        with torch.no_grad():
            torch._foreach_add_(changes, directions, alpha=side)
            ends.append(float(loss()))
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_training_moves_the_jumps_and_leaves_the_diagonal(tmp_path, teacher, teacher_folder, rank):
    trainer = train(recipe_of(teacher_folder, rank), tmp_path)
    x, t, r, _ = points(teacher, 4)
    for student in (trainer.student, trainer.averaged_student(0.999)):
        with torch.no_grad():
            v = teacher.velocity(x, t)
            assert torch.equal(student.mean_velocity(x, t, t), v)
            assert relative(student.mean_velocity(x, t, r), v) > 1e-4
            # The teacher of the run is the same network without a length.
            assert torch.equal(trainer.teacher.velocity(x, t), v)
    assert not list(trainer.teacher.network.parameters())


@pytest.mark.parametrize(
    "loss",
    [{"name": "lagrangian", "velocity": "self"}, {"name": "progressive", "target": "average"}],
    ids=lambda loss: loss["name"],
)
def test_a_loss_of_consistency_alone_needs_no_velocity_of_its_own(tmp_path, teacher, teacher_folder, rank, loss):
    settings = recipe_of(teacher_folder, rank, loss=loss)
    assert Recipe.model_validate(settings).loss.needs_velocity_term
    trainer = train(settings, tmp_path)
    x, t, r, _ = points(teacher)
    with torch.no_grad():
        v = teacher.velocity(x, t)
        assert torch.equal(trainer.student.mean_velocity(x, t, t), v)
        assert relative(trainer.student.mean_velocity(x, t, r), v) > 1e-4


@pytest.mark.parametrize("groups", [0, 4])
def test_the_phases_of_a_run_train_one_change_each(tmp_path, epsilon_folder, rank, groups):
    """The regression trains G alone, the losses after it dW alone: weights, optimizer, averages and checkpoints."""
    student = {"prediction": "v_prediction", "regression_steps": 3}
    training = TRAINING | {"steps": 3, "checkpoint_every": 3, "checkpoints_total_limit": 9}
    settings = {"student": student, "training": training, "time_sampling": {"groups": groups}}
    trainer = train(recipe_of(epsilon_folder, rank, **settings), tmp_path)
    start = Student.from_teacher(
        load_teacher(str(epsilon_folder)),
        "v_prediction",
        scaled=ScaledWeights(rank=rank, diagonal=True),
    )
    regressed, trained = (load_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}") for step in (3, 6))
    names = {name for name, p in trainer.student.named_parameters() if p.requires_grad}
    jumps = {name for name in names if name.rpartition(".")[2].startswith("jump_")}
    diagonal = names - jumps
    assert len(diagonal) >= 100
    assert (rank > 0) == all(name.rpartition(".")[2].startswith("diagonal_") for name in diagonal)
    states = [start.state_dict(), regressed.tensors["student"], trained.tensors["student"]]
    assert set(states[1]) == set(states[2]) == names

    def moved(one, other):
        return {name for name in names if not torch.equal(one[name], other[name])}

    assert moved(states[0], states[1]) == diagonal
    assert moved(states[1], states[2]) == jumps
    # The average of the diagonal follows; no optimizer state of another phase is made or changed.
    averages = [stored.tensors["ema-0.999"] for stored in (regressed, trained)]
    assert moved(states[0], averages[0]) == diagonal
    assert jumps <= moved(*averages)
    order = [name for name, p in trainer.student.named_parameters() if p.requires_grad]
    everything = [name for name, _ in trainer.student.named_parameters()]

    def stepped(stored):
        return {everything[int(key.partition(".")[0])] for key in stored.tensors["optimizer"]}

    assert stepped(regressed) == diagonal
    assert stepped(trained) == set(order)
    moments = regressed.tensors["optimizer"]
    assert all(torch.equal(value, trained.tensors["optimizer"][key]) for key, value in moments.items())


def test_a_copy_has_a_state_and_changes_of_its_own(teacher, rank):
    student = scaled_student(teacher, rank)
    twin = copy.deepcopy(student)
    assert twin.network.call_state is not student.network.call_state
    states = {id(layer.call) for layer in scaled_layers(twin.network).values()}
    assert states == {id(twin.network.call_state)}
    x, t, r, _ = points(teacher)
    with torch.no_grad():
        before = student.mean_velocity(x, t, r)
        assert torch.equal(twin.mean_velocity(x, t, r), before)
        randomize(twin, 1.0)
        assert not torch.equal(twin.mean_velocity(x, t, r), before)
        # In a call of the one, the other is stock.
        with student.network.jumping(student.network.call_state.of(torch.ones(2), None)):
            assert torch.equal(twin.mean_velocity(x, t, t), teacher.velocity(x, t))
        assert torch.equal(student.mean_velocity(x, t, r), before)


def test_initial_changes_follow_the_seed_and_leave_the_generator_alone(teacher):
    def changes(seed):
        student = Student.from_teacher(teacher, scaled=ScaledWeights(rank=2, diagonal=True), seed=seed)
        return {name: value for name, value in student.state_dict().items() if is_new(name)}

    before = torch.random.get_rng_state()
    one, same, other = changes(1), changes(1), changes(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    factors = [name for name in one if name.endswith("_A")]
    assert factors
    assert not any(torch.equal(one[name], other[name]) for name in factors)
    assert all(not value.any() for name, value in one.items() if name.endswith("_B"))


class OwnNetwork(nn.Module):
    """A network that is no diffusers model, of frames: one layer sees them first, one is not called, one is shared."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
        self.space, self.frames, self.unused = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.table = nn.Linear(3, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x, time):
        hidden = self.space(x) + self.time(time[:, None] / 1000)[:, None]
        # Rows are frames of all samples, [frames, batch], and the rows of a table that samples share.
        hidden = hidden + self.frames(hidden.transpose(0, 1).flatten(0, 1)).unflatten(0, (3, -1)).transpose(0, 1)
        hidden = hidden + self.table(torch.eye(3, dtype=x.dtype))
        return type("Output", (), {"sample": self.last(torch.tanh(hidden))})()


def own_teacher(network=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = network or OwnNetwork()
    network = network.eval().requires_grad_(False)
    return Teacher(network, Parametrization(FlowMatching(), "flow_prediction"), (3, 4), "here", "own", {})


def test_layers_without_rows_of_samples_are_left_out(rank):
    teacher, lines = own_teacher(), []
    with logged(lines):
        student = scaled_student(teacher, rank)
    assert list(scaled_ranks(student.network)) == ["time.0", "time.2", "space", "last"]
    assert lines == [
        "frames, table: 2 of 6 layers do not change with the length of the jump, since their rows are not grouped by "
        "sample"
    ]
    x, t, r, _ = points(teacher, 3)
    with torch.no_grad():
        batch, v = student.mean_velocity(x, t, r), teacher.velocity(x, t)
        torch.testing.assert_close(batch, one_by_one(student, x, t, r))
        assert relative(batch, v) > 1e-3
        assert torch.equal(student.mean_velocity(x, t, t), v)


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(UserError, match="none that the network calls with rows that are grouped by sample; try other"):
        Student.from_teacher(own_teacher(), scaled=ScaledWeights(targets=("frames", "table")))
    with pytest.raises(
        UserError, match=r"for unused, nowhere, got none that the network calls; try other student\.lora"
    ):
        Student.from_teacher(own_teacher(), scaled=ScaledWeights(targets=("unused", "nowhere")))


def test_the_regression_of_a_parametrized_layer_trains_what_it_is_made_of(rank):
    network = OwnNetwork()
    nn.utils.parametrizations.weight_norm(network.space)
    teacher = own_teacher(network)
    student = Student.from_teacher(teacher, scaled=ScaledWeights(rank=rank, diagonal=True))
    student.network.call_state.regression = True
    x, t, _, _ = points(teacher)
    student.mean_velocity(x, t, t).square().sum().backward()
    reached = {name for name, p in student.network.network.space.named_parameters() if p.grad is not None}
    made_of = {"bias", "parametrizations.weight.original0", "parametrizations.weight.original1"}
    assert reached == ({"diagonal_A", "diagonal_B"} if rank else made_of)


def test_blocks_that_are_computed_again_have_their_own_jump(teacher, rank):
    student = scaled_student(teacher, rank)
    x, t, r, _ = points(teacher)

    def gradients():
        student.zero_grad()
        # The second call is another jump, of which the first one's blocks must not learn.
        u, other = student.mean_velocity(x, t, r), student.mean_velocity(x, t, t)
        (u.square().mean() + (u * other.detach()).mean()).backward()
        return [p.grad.clone() for p in student.parameters() if p.grad is not None]

    plain = gradients()
    checkpoint_blocks(student)
    assert student.network.is_gradient_checkpointing
    again = gradients()
    assert len(plain) == len(again) > 100
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "option",
    [{"gradient_checkpointing": True}, pytest.param({"compile": "eager"}, marks=pytest.mark.slow)],
    ids=lambda option: next(iter(option)),
)
@pytest.mark.parametrize("shared", [False, True])
def test_options_of_the_training_are_compared_with_the_plain_network(teacher, rank, option, shared):
    # After some networks of the same code, torch compiles no more.
    torch.compiler.reset()
    student, lines = scaled_student(teacher, rank), []
    teacher = share_network(student, teacher) if shared else teacher
    x, t, r, _ = points(teacher)
    with logged(lines):
        accelerate_networks(TrainingSettings(**option), student, teacher, (x, t, r, None))
    assert len(lines) == 1
    assert "compared with the plain networks" in lines[0]


@pytest.mark.parametrize("groups", [0, 4])
def test_half_precision_gives_the_losses_and_gradients_of_single_precision(teacher, teacher_folder, rank, groups):
    recipe = Recipe.model_validate(recipe_of(teacher_folder, rank, time_sampling={"groups": groups}))
    student = scaled_student(teacher, rank)
    objective = Objective(student, share_network(student, teacher), recipe, recipe.losses).eval()
    found = []
    for half in (False, True):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            losses, weighted, _ = objective(draw(0, 0, 8, teacher.event_shape, groups=groups), None, 0)
        weighted.mean().backward()
        gradients = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        found.append((losses.detach(), torch.cat(gradients)))
    (losses, gradient), (half_losses, half_gradient) = found
    assert len(gradient) == len(half_gradient) > 1000
    assert not torch.equal(losses, half_losses)
    assert relative(half_losses, losses) < 0.05
    assert relative(half_gradient, gradient) < 0.1


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_fold_is_the_map_at_one_length(teacher, rank, steps):
    student = scaled_student(teacher, rank, diagonal=True)
    x, t, _, _ = points(teacher)
    with torch.no_grad():
        expected = student.mean_velocity_of_jump(x, t, torch.full((2,), 1 / steps))
        plain = merge_diagonal(student)
        stock = fold(plain, teacher, teacher.schedule.grid(steps))
        assert type(stock) is UNet2DModel
        assert set(stock.state_dict()) == set(tiny_unet().state_dict())
        assert relative(student.parametrization.velocity(stock, x, t), expected) < 1e-5
        assert relative(plain.mean_velocity_of_jump(x, t, torch.full((2,), 1 / steps)), expected) < 1e-5
    # The student that was passed has its adapters still.
    assert any(hasattr(layer, "diagonal_A") for layer in scaled_layers(student.network).values()) == (rank > 0)
