from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import UNet2DModel

from fmm_distill.student.two_time import JumpEmbedding, two_time
from tests.conftest import tiny_unet

HOSTS = {"jump_hosts": ["time_embedding.linear_2"], "jump_widths": [32]}


@pytest.fixture
def network():
    stock = tiny_unet()
    config = {key: value for key, value in stock.config.items() if not key.startswith("_")}
    network = two_time(UNet2DModel).from_config(config | HOSTS).eval()
    network.load_state_dict(stock.state_dict(), strict=False)
    return network


def perturb(network, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        network.jump_embedding[0].linear_2.weight.normal_(0, scale, generator=generator)
    return network


@pytest.fixture
def inputs():
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.0, 500.25, 999.0])


def test_state_dict_is_the_stock_one_and_the_jump(network):
    stock = set(tiny_unet().state_dict())
    extra = set(network.state_dict()) - stock
    assert stock <= set(network.state_dict())
    assert extra == {f"jump_embedding.0.{name}" for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight")}


def test_without_h_it_is_the_stock_network(network, inputs):
    with torch.no_grad():
        expected = tiny_unet().eval()(*inputs).sample
        assert torch.equal(perturb(network)(*inputs).sample, expected)
        assert torch.equal(network(*inputs, return_dict=False)[0], expected)


def test_h_of_zero_adds_nothing(network, inputs):
    with torch.no_grad():
        assert torch.equal(perturb(network)(*inputs, h=torch.zeros(3)).sample, network(*inputs).sample)


def test_h_acts_sample_by_sample(network, inputs):
    with torch.no_grad():
        moved = perturb(network)(*inputs, h=torch.tensor([0.0, 0.5, 0.0])).sample - network(*inputs).sample
    assert moved[[0, 2]].abs().max() == 0
    assert moved[1].abs().max() > 1e-3


def test_h_is_forgotten_after_the_call(network, inputs):
    with torch.no_grad():
        waves = torch.ones(3, network.time_embedding.linear_1.in_features)
        before = perturb(network).time_embedding(waves)
        network(*inputs, h=torch.ones(3))
        assert torch.equal(network.time_embedding(waves), before)
        with pytest.raises(RuntimeError):
            network(torch.zeros(3, 2, 8, 8), inputs[1], h=torch.ones(3))
        assert torch.equal(network.time_embedding(waves), before)


def test_copy_has_a_branch_of_its_own(network, inputs):
    # The moving average of the weights is a deep copy: a hook that held on to the original would read its weights.
    h = torch.ones(3)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        before = network(*inputs, h=h).sample
        assert not torch.equal(perturb(twin)(*inputs, h=h).sample, before)
        assert torch.equal(network(*inputs, h=h).sample, before)


def test_save_and_load(network, inputs, tmp_path):
    perturb(network).save_pretrained(tmp_path)
    loaded = two_time(UNet2DModel).from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "TwoTimeUNet2DModel"
    h = torch.tensor([0.2, 0.5, 1.0])
    with torch.no_grad():
        assert torch.equal(loaded(*inputs, h=h).sample, network(*inputs, h=h).sample)
    for key, value in network.config.items():
        # JSON has no tuples.
        assert key.startswith("_") or loaded.config[key] == (list(value) if isinstance(value, tuple) else value)


def test_stock_class_reads_the_stock_part(network, inputs):
    stock = UNet2DModel.from_config({k: v for k, v in network.config.items() if k[0] != "_"}).eval()
    mismatch = stock.load_state_dict(perturb(network).state_dict(), strict=False)
    assert mismatch.missing_keys == []
    with torch.no_grad():
        assert torch.equal(stock(*inputs).sample, network(*inputs).sample)


def test_jump_embedding_is_a_difference_without_bias():
    embedding = JumpEmbedding(16)
    assert embedding.linear_2.bias is None
    assert embedding(torch.rand(4)).abs().max() == 0
    torch.nn.init.normal_(embedding.linear_2.weight)
    out = embedding(torch.tensor([0.0, 1e-3, 0.5]))
    assert out[0].abs().max() == 0
    assert 0 < out[1].norm() < out[2].norm()


def test_jump_embedding_is_slow():
    # Central differences in h at a step of 2e-3 stand on it: nothing in it turns faster than 10 a unit.
    embedding = JumpEmbedding(16)
    h = torch.linspace(0, 1, 2001)
    with torch.no_grad():
        seen = []
        embedding.linear_1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        embedding(h)
    waves = seen[0].double()
    assert (waves.diff(dim=0) / (h[1] - h[0])).abs().max() < 10.1
    # And the slowest still tells a jump of 0 from one of 1.
    assert (waves[-1] - waves[0]).abs().min() > 1e-3
