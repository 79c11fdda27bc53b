"""Layers whose weights change with the length of the jump, against products with each sample's own weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fmm_distill.student.scaled_layers import Call, can_be_scaled, product_of, scale_layers, scaled_layers
from tests.scaled import randomize, relative

H = (0.0, 0.25, 1.0, 0.5)


class Packed(nn.Linear):
    """A linear layer that stores its weight in eight bits, as quantized layers do."""

    def __init__(self, *widths):
        super().__init__(*widths)
        packed = (self.weight.detach() * 100).round().clamp(-128, 127).to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, input):
        return nn.functional.linear(input, self.weight.to(input.dtype) / 100, self.bias)


def stored(layer):
    """The weight that a layer computes with."""
    return layer.weight / 100 if isinstance(layer, Packed) else layer.weight


# A layer, the shape of its input, and the call of torch that is its product.
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "tokens": (lambda: nn.Linear(6, 5, bias=False), (4, 3, 6)),
    "rows of tokens": (lambda: nn.Linear(6, 5), (12, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, padding=1), (4, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (4, 3, 6, 6)),
    "conv2d of frames": (lambda: nn.Conv2d(3, 5, (1, 3), dilation=2, padding=2), (8, 3, 6, 6)),
    "conv2d circular": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), (4, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (3, 1, 1), padding=(1, 0, 0)), (4, 2, 3, 4, 4)),
    "grouped": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=3), (4, 6, 5, 5)),
    "parametrized": (lambda: weight_norm(nn.Linear(6, 5)), (4, 6)),
    "quantized": (lambda: Packed(6, 5), (4, 6)),
}
RANKS = dict.fromkeys(LAYERS, (0, 2)) | {"grouped": (0,), "quantized": (2,)}
CASES = [(name, rank) for name, ranks in RANKS.items() for rank in ranks]


class Network(nn.Module):
    """One layer in a network, so that it has a name."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.call_state = layer, Call()

    def forward(self, x, h=None):
        before, self.call_state.jump = self.call_state.jump, self.call_state.of(h, None)
        try:
            return self.layer(x)
        finally:
            self.call_state.jump = before


def scaled(name, rank, **options):
    """A network with a scaled layer and random changes, the stock one, and an input; in float64."""
    make, shape = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = Network(make())
    network = copy.deepcopy(stock)
    scale_layers(network, {"layer": rank}, network.call_state, **options)
    if name != "quantized":
        stock, network = stock.double(), network.double()
    randomize(network, 0.5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return network, stock, x.to(network.layer.bias.dtype if name == "quantized" else torch.float64)


def by_hand(network, stock, x, h):
    """The products with each sample's own weight, as the stock layer computes them."""
    weight, change, outputs = stored(stock.layer), network.layer.change(), []
    for part, length in zip(x.chunk(len(h)), h, strict=True):
        layer = copy.deepcopy(stock.layer)
        summed = weight + length * change[0]
        bias = layer.bias if change[1] is None else layer.bias + length * change[1]
        if isinstance(layer, nn.Linear):
            outputs.append(nn.functional.linear(part, summed, bias))
        else:
            outputs.append(layer._conv_forward(part, summed, bias))
    return torch.cat(outputs)


@pytest.mark.parametrize(("name", "rank"), CASES)
@torch.no_grad()
def test_each_sample_has_the_weights_of_its_length(name, rank):
    network, stock, x = scaled(name, rank)
    h = torch.tensor(H, dtype=x.dtype)
    torch.testing.assert_close(network(x, h), by_hand(network, stock, x, h))
    # The samples alone, with one length as a sampler passes it, are those of the batch.
    alone = torch.cat([network(part, length[None]) for part, length in zip(x.chunk(4), h, strict=True)])
    torch.testing.assert_close(network(x, h), alone)
    assert relative(alone, stock(x)) > 1e-3


@pytest.mark.parametrize(("name", "rank"), CASES)
@torch.no_grad()
def test_without_a_length_and_at_length_zero_it_is_the_stock_layer(name, rank):
    network, stock, x = scaled(name, rank)
    assert torch.equal(network(x), stock(x))
    assert torch.equal(network(x, torch.zeros(4, dtype=x.dtype)), stock(x))
    assert torch.equal(network(x, torch.zeros(1, dtype=x.dtype)), stock(x))


@pytest.mark.parametrize("group", [2, 0])
@pytest.mark.parametrize(("name", "rank"), CASES)
@torch.no_grad()
def test_groups_are_their_samples(name, rank, group):
    network, _, x = scaled(name, rank)
    h = torch.tensor([0.3, 0.3, 0.9, 0.9] if group else [0.7] * 4, dtype=x.dtype)
    expected = network(x, h)
    network.call_state.group = group
    torch.testing.assert_close(network(x, h), expected)
    # Twice the batch, as both sides of a difference are computed.
    other = h + 0.1 if group else h
    torch.testing.assert_close(network(torch.cat([x, x]), torch.cat([h, other]))[: len(expected)], expected)


@pytest.mark.parametrize("group", [2, 4, 0])
def test_samples_of_a_group_with_different_lengths_fail(group):
    network, _, x = scaled("tokens", 0)
    network.call_state.group = group
    with pytest.raises(RuntimeError, match="one length of the jump for all samples"):
        network(x, torch.tensor(H))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("name", "rank"), CASES)
def test_a_length_with_a_tangent(name, rank, group):
    network, _, x = scaled(name, rank, diagonal=rank > 0)
    h = torch.tensor([0.3, 0.3, 0.9, 0.9], dtype=x.dtype)
    network.call_state.group = group
    speed, direction = torch.ones_like(h), torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(network(x, forward_ad.make_dual(h, speed)))
    functional = torch.func.jvp(lambda length: network(x, length), (h,), (speed,))
    with torch.no_grad():
        torch.testing.assert_close(value, network(x, h))
        # A product is linear in the length: the difference of two of them is the derivative.
        change = network(x, torch.ones_like(h)) - network(x, torch.zeros_like(h))
        torch.testing.assert_close(tangent, change)
        torch.testing.assert_close(functional[1], change)
    # Along the flow the input moves too, and then the length's own derivative does not enter.
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(network(forward_ad.make_dual(x, direction), h)).tangent
    with torch.no_grad():
        torch.testing.assert_close(moved, network(x + direction, h) - network(x, h))


@pytest.mark.parametrize("rank", [0, 2])
@torch.no_grad()
def test_samples_with_different_numbers_of_rows(rank):
    network, stock, x = scaled("rows of tokens", rank)
    # Twelve rows of five samples: only the length that all of them have is known.
    same = network(x, torch.full((5,), 0.5, dtype=x.dtype))
    torch.testing.assert_close(same, by_hand(network, stock, x, torch.tensor([0.5], dtype=x.dtype)))
    # One row for all.
    assert network(x[:1], torch.full((5,), 0.5, dtype=x.dtype)).shape == (1, 5)
    with pytest.raises(RuntimeError, match="one length of the jump for all samples"):
        network(x, torch.linspace(0, 1, 5, dtype=x.dtype))


@pytest.mark.parametrize("rank", [0, 2])
@torch.no_grad()
def test_the_input_by_keyword(rank):
    network, _, x = scaled("linear", rank)
    network.call_state.jump = network.call_state.of(torch.tensor(H), None)
    assert torch.equal(network.layer(input=x), network.layer(x))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("rank", [0, 2])
@torch.no_grad()
def test_attention(rank, group):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network(Attention(8, heads=2, dim_head=4, cross_attention_dim=6)).double()
    ranks = {name: rank for name, module in network.named_modules() if can_be_scaled(module, rank)}
    assert len(ranks) == 4
    scale_layers(network, ranks, network.call_state)
    randomize(network, 0.5)
    layer, draw = network.layer, torch.Generator().manual_seed(1)
    tokens, words = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((4, 5, 8), (4, 3, 6)))

    def call(rows, h):
        network.call_state.jump = network.call_state.of(h, None)
        return layer(tokens[rows], encoder_hidden_states=words[rows])

    h = torch.tensor([0.1, 0.1, 0.8, 0.8] if group == 2 else H)
    alone = torch.cat([call(slice(i, i + 1), h[i : i + 1]) for i in range(4)])
    network.call_state.group = group
    torch.testing.assert_close(call(slice(0, 4), h), alone)


def test_which_layers_are_taken():
    grouped, packed = nn.Conv2d(4, 4, 3, groups=2), Packed(4, 4)
    taken = (nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1))
    assert all(can_be_scaled(layer, rank) for layer in (*taken, weight_norm(nn.Linear(2, 2))) for rank in (0, 4))
    assert can_be_scaled(grouped, 0)
    assert not can_be_scaled(grouped, 4)
    # Its weight has no change of any rank, but its output has one of low rank.
    assert can_be_scaled(packed, 4)
    assert not can_be_scaled(packed, 0)
    others = (nn.ConvTranspose2d(2, 2, 1), nn.Embedding(2, 2), nn.LayerNorm(2), nn.GroupNorm(1, 2))
    assert not any(can_be_scaled(layer, rank) for layer in others for rank in (0, 4))


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_gradients_reach_the_change_and_in_a_regression_the_diagonal(name, rank):
    network, _, x = scaled(name, rank, diagonal=rank > 0)
    if name != "quantized":
        network.layer.requires_grad_()
    h = torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=x.dtype)

    def with_gradient(**calls):
        network.zero_grad(set_to_none=True)
        vars(network.call_state).update({"group": 1, "regression": False} | calls)
        network(x, h).square().sum().backward()
        return {key for key, p in network.layer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    new = (
        {"jump_A", "jump_B"} if rank else {"jump_weight"} | ({"jump_bias"} if network.layer.bias is not None else set())
    )
    own = {key for key, _ in network.layer.named_parameters() if not key.startswith(("jump_", "diagonal_"))}
    packed = {"weight"} if name == "quantized" else set()
    # The weights of a low rank are frozen by the student, not by the layer.
    rest = own - packed if rank else set()
    assert with_gradient() == with_gradient(group=2) == new | rest
    diagonal = {"diagonal_A", "diagonal_B"} if rank else own
    assert with_gradient(regression=True) == with_gradient(regression=True, group=2) == diagonal | rest


def test_the_output_has_the_dtype_of_the_stock_layer():
    for name, rank in CASES:
        network, stock, x = scaled(name, rank)
        network, stock, x = network.float(), stock.float(), x.float()
        for group, lengths in ((1, H), (2, (0.5, 0.5, 1.0, 1.0)), (1, (0.5,))):
            network.call_state.group = group
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                assert network(x, torch.tensor(lengths)).dtype == stock(x).dtype, (name, rank, group)


@torch.no_grad()
def test_a_length_is_not_rounded_to_the_dtype_of_the_weights():
    network = Network(nn.Linear(1, 64, bias=False))
    scale_layers(network, {"layer": 0}, network.call_state)
    network.layer.weight.zero_()
    network.layer.jump_weight.copy_(torch.linspace(1, 2, 64)[:, None])
    network.bfloat16()
    # A third is 0.33398 in bfloat16: every product with it is rounded twice.
    found = network(torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([1 / 3]))
    expected = (network.layer.jump_weight[:, 0].double() / 3).bfloat16()
    assert torch.equal(found[0], expected)


def test_names_and_initial_values():
    for rank in (0, 2):
        network, _, _ = scaled("conv2d", rank, diagonal=True)
        fresh = Network(nn.Conv2d(3, 5, 3))
        before = dict(fresh.named_parameters())
        scale_layers(fresh, {"layer": rank}, fresh.call_state, diagonal=True)
        added = {name: p for name, p in fresh.named_parameters() if name not in before}
        last = {name.rpartition(".")[2] for name in added}
        assert last == ({"jump_A", "jump_B", "diagonal_A", "diagonal_B"} if rank else {"jump_weight", "jump_bias"})
        assert all(p.abs().max() == 0 for name, p in added.items() if not name.endswith("_A"))
        assert list(scaled_layers(fresh)) == ["layer"]
        assert network.layer.change()[0].shape == network.layer.weight.shape
    network, _, _ = scaled("conv2d", 2)
    first, second = network.layer.jump_A, network.layer.jump_B
    expected = torch.einsum("or,rihw->oihw", second[..., 0, 0], first)
    torch.testing.assert_close(product_of(first, second), expected)
