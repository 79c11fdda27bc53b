"""Our rules of forward mode against torch's own where it has one, and against differences; in reverse mode too."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmm_distill.core.derivatives import attention as forward_attention
from fmm_distill.core.derivatives import dual as duals
from fmm_distill.core.derivatives.forward_mode import StockNetworks, jvp
from fmm_distill.training.memory import _Live


def draws(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


BOOLEAN = torch.tensor([[True, False, True, True, False], [True, True, True, True, True], [False] * 4 + [True]])


@pytest.fixture(params=[forward_attention.BLOCK, 40, 5], ids=["whole", "heads", "queries"])
def blocks(request, monkeypatch):
    """All at once; a few heads, or few queries of one, at a time."""
    monkeypatch.setattr(forward_attention, "BLOCK", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"attn_mask": BOOLEAN},
        {"attn_mask": torch.linspace(-3, 3, 15, dtype=torch.float64).reshape(3, 5)},
        {"attn_mask": torch.zeros(3, 5, dtype=torch.float64).masked_fill(~BOOLEAN, float("-inf"))},
        {"is_causal": True},
    ],
    ids=["plain", "scale", "boolean", "float", "minus-infinity", "causal"],
)
def test_attention_is_torchs(options):
    query, key, value = draws((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6))
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(moved(query, key, value, **options), expected)


@pytest.mark.usefixtures("blocks")
def test_attention_with_grouped_queries_is_torchs():
    query, key, value = draws((2, 6, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(moved(query, key, value, enable_gqa=True), expected)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", [(1, 4, 5, 8), (2, 1, 5, 8), (4, 5, 8)])
def test_attention_with_fewer_keys_is_torchs(shape):
    query, key, value = draws((2, 4, 3, 8), shape, shape)
    torch.testing.assert_close(moved(query, key, value), F.scaled_dot_product_attention(query, key, value))


def test_passes_without_a_backward_pass_leave_nothing():
    query = draws((1, 2, 3, 4))[0].requires_grad_()

    def attend(query):
        return F.scaled_dot_product_attention(query, query, query).tanh()

    def one():
        jvp(attend, (query,), (query.detach(),), detached=True)

    def count():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    one()
    before = count()
    for _ in range(5):
        one()
    assert count() == before


def test_where_tangents_would_vanish():
    x = draws((2, 3))[0]
    with torch.inference_mode(), pytest.raises(RuntimeError, match="expected torch"):
        jvp(torch.sin, (x,), (x,))


def test_a_compiled_network_is_differentiated_as_it_was_written():
    x, network = draws((2, 3))[0], torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()).double()
    expected = jvp(network, (x,), (x,), detached=True)
    network.compile(backend="aot_eager")
    torch.testing.assert_close(jvp(network, (x,), (x,), detached=True), expected)


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_softmax_chooses_its_dimension():
    x, dx = draws((3, 4), (3, 4))
    found, expected = (jvp(torch.nn.Softmax(dim), (x,), (dx,)) for dim in (None, 1))
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("blocks")
def test_attention_is_stable_for_large_scores():
    query, key, value = draws((1, 1, 3, 8), (1, 1, 5, 8), (1, 1, 5, 8))
    expected = F.scaled_dot_product_attention(1e3 * query, key, value)
    torch.testing.assert_close(moved(1e3 * query, key, value), expected)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", ["boolean", "minus-infinity"])
def test_a_row_without_keys_stays_finite_in_reverse_over_forward(kind):
    query, key, value = draws((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4))
    mask = BOOLEAN.clone()
    mask[1] = False
    if kind == "minus-infinity":
        mask = torch.zeros(3, 5, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    query.requires_grad_()

    def attention(query):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    with StockNetworks():
        out, tangent = torch.func.jvp(attention, (query,), (torch.ones_like(query),))
    (gradient,) = torch.autograd.grad(tangent.square().sum(), query)
    assert out.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[:, :, 0].abs().max() > 0


@pytest.mark.usefixtures("blocks")
def test_attention_second_derivative():
    query, key, value = draws((1, 1, 2, 4), (1, 1, 3, 4), (1, 1, 3, 4))
    direction = torch.ones_like(query)

    def tangent(query):
        with StockNetworks():
            return torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, key, value), (query,), (direction,))[1]

    query.requires_grad_()
    (gradient,) = torch.autograd.grad(tangent(query).square().sum(), query)
    push = draws((9,), query.shape)[1]
    above, below = (tangent(query.detach() + shift * push).square().sum() for shift in (1e-5, -1e-5))
    torch.testing.assert_close((gradient * push).sum(), (above - below) / 2e-5, rtol=1e-6, atol=1e-9)


def moved(*inputs, **options):
    """The value of attention whose inputs all have a tangent."""
    with StockNetworks():
        return torch.func.jvp(
            lambda *given: F.scaled_dot_product_attention(*given, **options),
            inputs,
            tuple(map(torch.ones_like, inputs)),
        )[0]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"attn_mask": BOOLEAN}, {"is_causal": True}], ids=["plain", "boolean", "causal"]
)
def test_attention_against_differences(moving, options):
    inputs = draws((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6))
    directions = draws((9,), *(inputs[i].shape for i in moving))[1:]

    def attention(*some):
        given = list(inputs)
        for i, tensor in zip(moving, some, strict=True):
            given[i] = tensor
        return F.scaled_dot_product_attention(*given, **options)

    at = tuple(inputs[i] for i in moving)
    with StockNetworks():
        tangent = torch.func.jvp(attention, at, tuple(directions))[1]
    above, below = (attention(*(x + step * d for x, d in zip(at, directions, strict=True))) for step in (1e-5, -1e-5))
    torch.testing.assert_close(tangent, (above - below) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("graph", [False, True], ids=["detached", "graph"])
def test_memory_of_attention_grows_as_the_tokens_do(monkeypatch, graph):
    monkeypatch.setattr(forward_attention, "CPU_BLOCK", 2**14)

    def peak(tokens):
        given = [tensor.float() for tensor in draws(*[(1, 2, tokens, 8)] * 3)]
        query = given[0].requires_grad_(graph)
        live = _Live()
        with torch.set_grad_enabled(graph), StockNetworks(), live:
            tangent = torch.func.jvp(F.scaled_dot_product_attention, (query, *given[1:]), tuple(given))[1]
            if graph:
                tangent.square().sum().backward()
        return max(moment.live for moment in live.moments)

    # Linear: less than twice. All weights at once take four times.
    assert peak(1024) < 2.2 * peak(512)
    monkeypatch.setattr(forward_attention, "BLOCK", 2**30)
    monkeypatch.setattr(forward_attention, "CPU_BLOCK", 2**30)
    assert peak(1024) > 3 * peak(512)


@pytest.mark.usefixtures("blocks")
def test_a_network_is_the_same_in_blocks():
    query, key, value = (tensor.requires_grad_() for tensor in draws((2, 2, 6, 4), (2, 2, 5, 4), (2, 2, 5, 4)))
    mask = draws((2, 1, 1, 5))[0].requires_grad_()

    def attention(*given):
        return F.scaled_dot_product_attention(*given[:3], attn_mask=given[3])

    given = (query, key, value, mask)
    with StockNetworks():
        out, tangent = torch.func.jvp(attention, given, tuple(tensor.detach() for tensor in given))
    found = torch.autograd.grad((out * tangent).sum(), given)
    with sdpa_kernel(SDPBackend.MATH):
        out, tangent = torch.func.jvp(attention, given, tuple(tensor.detach() for tensor in given))
    expected = torch.autograd.grad((out * tangent).sum(), given)
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torchs)


LAYERS = {
    "linear": (torch.nn.Linear(6, 5), (3, 4, 6)),
    "conv1d": (torch.nn.Conv1d(6, 5, 3), (3, 6, 7)),
    "conv2d": (torch.nn.Conv2d(6, 5, 3, stride=2, padding=1), (3, 6, 7, 7)),
    "grouped": (torch.nn.Conv2d(6, 4, 3, groups=2, bias=False), (3, 6, 7, 7)),
    "conv3d": (torch.nn.Conv3d(2, 5, 3), (3, 2, 4, 4, 4)),
    "group norm": (torch.nn.GroupNorm(3, 6), (3, 6, 5, 4)),
    "group norm of vectors": (torch.nn.GroupNorm(3, 6), (3, 6)),
    "plain group norm": (torch.nn.GroupNorm(3, 6, affine=False), (3, 6, 5)),
    "layer norm": (torch.nn.LayerNorm(6), (3, 4, 6)),
    "plain layer norm": (torch.nn.LayerNorm(6, elementwise_affine=False), (3, 4, 6)),
    "layer norm of images": (torch.nn.LayerNorm((4, 6)), (3, 4, 6)),
    "silu": (torch.nn.SiLU(), (3, 4, 6)),
    "softmax": (torch.nn.Softmax(1), (3, 4, 6)),
    "gelu": (torch.nn.GELU(), (3, 4, 6)),
    "gelu by tanh": (torch.nn.GELU("tanh"), (3, 4, 6)),
}


def plain(layer, x):
    """The same from operations whose derivatives torch has right: not those of ``layer_norm``'s tangent."""
    if not isinstance(layer, torch.nn.LayerNorm):
        return layer(x)
    axes = tuple(range(-len(layer.normalized_shape), 0))
    centered = x - x.mean(axes, keepdim=True)
    normal = centered / (centered.square().mean(axes, keepdim=True) + layer.eps).sqrt()
    return normal if layer.weight is None else normal * layer.weight + layer.bias


def answers(layer, x, direction, rules):
    """Value, tangent, and the gradients of their product with other numbers: in the input, its tangent, the weights."""
    inputs = [x.clone().requires_grad_(), direction.clone().requires_grad_()]
    if rules:
        out, tangent = jvp(layer, *((each,) for each in inputs))
    else:
        out, tangent = torch.func.jvp(lambda x: plain(layer, x), *((each,) for each in inputs))
    weights = draws((5,), out.shape, out.shape)[1:]
    loss = (out * weights[0]).sum() + (tangent * weights[1]).square().sum()
    return out, tangent, *torch.autograd.grad(loss, [*inputs, *layer.parameters()])


@pytest.mark.parametrize("name", LAYERS)
def test_rules_are_exact(name):
    layer, shape = LAYERS[name]
    layer = layer.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, direction = draws(shape, shape)
    ours, theirs = (answers(layer, 3 + 2 * x, direction, rules) for rules in (True, False))
    assert len(ours) == 4 + len(list(layer.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        detached = jvp(layer, (3 + 2 * x,), (direction,))
    torch.testing.assert_close(detached, theirs[:2], rtol=1e-9, atol=1e-10)


ARITHMETIC = {
    "sum": lambda x, y: x + y,
    "sum of fewer dimensions": lambda x, y: x[0] + y,
    "sum with a number": lambda x, y: 2 + x + 3,
    "sum with what rests": lambda x, y: x + y.detach() + x.detach() * 2 + x,
    "difference": lambda x, y: x - y,
    "difference from what rests": lambda x, y: y.detach() - x,
    "scaled": lambda x, y: x.add(y, alpha=2).sub(y, alpha=3),
    "product": lambda x, y: x * y,
    "product of fewer dimensions": lambda x, y: y[:, :1] * x,
    "product with a number": lambda x, y: 3 * x * 2,
    "product of another precision": lambda x, y: x.float() * torch.full((4, 1), 2.0, dtype=torch.float64) + y,
    "quotient": lambda x, y: x / (3 + y.square()),
    "quotient by a number": lambda x, y: x / 3 + 1 / (4 + x.square()),
    "softmax": lambda x, y: x.softmax(-1) + torch.softmax(y.float(), -1, y.dtype) + F.softmax(x, 1, 3, y.dtype),
    "quotient by what rests": lambda x, y: x.div(y.detach()),
    "rounded": lambda x, y: x.div(2, rounding_mode="floor") + x,
    "in place": lambda x, y: (x * 2).add_(y).mul_(y).div_(3),
    "sum with a number in place": lambda x, y: (x + 1).mul_(2) * x + (x - y.detach()).mul_(y),
    "norm in place": lambda x, y: F.group_norm(x, 2).mul_(2) * F.silu(F.group_norm(y, 1), inplace=True),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_exact(name):
    x, y, dx, dy = draws((3, 4, 5), (4, 5), (3, 4, 5), (4, 5))
    found = []
    for rules in (True, False):
        given = [tensor.clone().requires_grad_() for tensor in (x, y, dx, dy)]
        differentiate = jvp if rules else torch.func.jvp
        out, tangent = differentiate(ARITHMETIC[name], tuple(given[:2]), tuple(given[2:]))
        gradients = torch.autograd.grad((out * tangent).square().sum(), given, allow_unused=True)
        found.append([out, tangent, *(gradient for gradient in gradients if gradient is not None)])
        if rules:
            with torch.no_grad():
                alone = jvp(ARITHMETIC[name], (x, y), (dx, dy))
            beside = jvp(ARITHMETIC[name], tuple(given[:2]), (dx, dy), detached=True)
            for other in (alone, beside):
                torch.testing.assert_close(other, (out.detach(), tangent.detach()), check_dtype=True)
            assert beside[0].requires_grad
    assert len(found[0]) == len(found[1]) > 2
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


class Everything(torch.nn.Module):
    """A layer of each rule, joined by operations that have none."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv1d(4, 4, 3, padding=1), torch.nn.Linear(6, 6)
        self.norm, self.other = torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm(6)

    def forward(self, x):
        h = F.silu(self.norm(torch.cat((self.first(x), x.sin()), 1)))
        heads = h.unflatten(-1, (2, 3)).transpose(1, 2)
        h = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2) + h
        return F.gelu(self.second(self.other(h)), approximate="tanh") * h.softmax(-1) / 3


def of_everything(detached):
    """Value, tangent, and the gradients of their weighted sum."""
    network = Everything().double()
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x, dx = draws((2, 4, 6), (2, 4, 6))
    out, tangent = jvp(network, (x,), (dx,), detached=detached)
    return out, tangent, torch.autograd.grad((out * out.detach()).sum(), list(network.parameters()))


@pytest.mark.usefixtures("blocks")
def test_a_value_with_a_graph_has_a_tangent_without_one():
    out, tangent, gradients = of_everything(detached=True)
    value, expected, theirs = of_everything(detached=False)
    assert expected.requires_grad
    assert not tangent.requires_grad
    torch.testing.assert_close((out, tangent), (value, expected.detach()))
    assert len(gradients) == 8
    for ours, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, other)


def test_tangents_without_a_graph_are_gone_by_the_next_layer():
    x, layers = torch.randn(256, 64), [torch.nn.Linear(64, 64) for _ in range(8)]

    def network(x):
        for layer in layers:
            x = torch.cat((x, F.silu(layer(x))), 1)[:, 32:96].clone()
        return x

    def peak(run):
        with _Live() as live:
            run()
        return max(moment.live for moment in live.moments) / (4 * x.numel())

    def both(detached):
        saved = duals.without_tangents() if detached else contextlib.nullcontext()
        with StockNetworks(detached=detached), forward_ad.dual_level(), saved:
            network(forward_ad.make_dual(x, x))

    value = peak(lambda: network(x))
    assert peak(lambda: both(detached=True)) <= value + 5
    assert peak(lambda: both(detached=False)) > 1.9 * value


def test_what_a_network_changes_in_place():
    x, dx = draws((3, 6), (3, 6))
    x.requires_grad_()

    def tangent(scale):
        def network(x):
            return F.silu(scale(F.layer_norm(x, (6,))))

        with StockNetworks():
            out = torch.func.jvp(network, (x,), (dx,))[1]
        return torch.autograd.grad(out.square().sum(), x)[0]

    torch.testing.assert_close(tangent(lambda y: y.mul_(2)), tangent(lambda y: 2 * y))


def test_a_moving_weight_is_left_to_torch():
    x, weight, dx, dw = draws((3, 6), (5, 6), (3, 6), (5, 6))
    with StockNetworks():
        out, tangent = torch.func.jvp(F.linear, (x, weight), (dx, dw))
    torch.testing.assert_close((out, tangent), (x @ weight.T, dx @ weight.T + x @ dw.T))


def test_a_convolution_of_the_weights_tangent_is_not_made():
    calls = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    x, weight = draws((1, 2, 4, 4), (3, 2, 3, 3))
    with torch.no_grad(), StockNetworks(), Watched():
        torch.func.jvp(lambda x: F.conv2d(x, weight), (x,), (x,))
    assert calls.count("convolution") == 2
