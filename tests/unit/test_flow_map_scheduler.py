"""The scheduler that travels with an any-step pipeline: a class of diffusers, for each stock scheduler of an export."""

from __future__ import annotations

import ast
import sys

import diffusers
import pytest
import torch

from fmm_distill.export.remote import scheduler as remote
from fmm_distill.export.remote import stock_pipeline
from fmm_distill.export.remote.scheduler import FlowMapScheduler

LINE = {"slope": 1.0, "offset": 0.0, "flip": None}
EXPLODING = {"kind": "exploding", "network_time": "log", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
FLOW = {"kind": "flow", "shift": 3.0, "unshifted_time": False}
STOCK = {
    "DDIMScheduler": ({"timestep_spacing": "trailing"}, {"kind": "discrete", "total": 1000}),
    "CogVideoXDDIMScheduler": ({"timestep_spacing": "trailing"}, {"kind": "discrete", "total": 1000}),
    "IPNDMScheduler": ({}, {"kind": "angular"}),
    "FlowMatchEulerDiscreteScheduler": ({"shift": 3.0}, FLOW),
    "EDMEulerScheduler": ({}, EXPLODING),
}


def made(name):
    settings, levels = STOCK[name]
    stock = getattr(diffusers, name)(**settings)
    return stock, FlowMapScheduler.from_stock(stock, LINE | levels)


def test_every_stock_scheduler_of_a_pipeline_has_a_class():
    assert remote._CLASSES.keys() == STOCK.keys()


@pytest.mark.parametrize("name", STOCK)
def test_it_is_a_scheduler_of_diffusers_and_leaves_the_stock_one_alone(name):
    stock, scheduler = made(name)
    before = dict(vars(stock))
    assert isinstance(scheduler, (diffusers.SchedulerMixin, diffusers.ConfigMixin))
    assert isinstance(scheduler, getattr(diffusers, name))
    assert type(scheduler) is getattr(remote, f"FlowMap{name}")
    assert {key: scheduler.config[key] for key in stock.config} == dict(stock.config)
    scheduler.set_timesteps(4)
    assert vars(stock) == before
    # Nothing is set on the one object that the class does not have.
    assert not [key for key, value in vars(scheduler).items() if callable(value)]


@pytest.mark.parametrize("name", STOCK)
def test_the_lengths_of_the_jumps_add_up_to_the_way(name):
    _, scheduler = made(name)
    scheduler.set_timesteps(4)
    lengths = [scheduler.jump_length(torch.tensor(time)) for time in scheduler.network_times()]
    assert len(lengths) == 4
    assert min(lengths) > 0
    assert sum(lengths) == pytest.approx(1, abs=1e-6)


def test_the_code_that_is_written_is_one_file_of_torch_and_diffusers(tmp_path):
    stock_pipeline.write_code(tmp_path)
    (file,) = tmp_path.iterdir()
    text = file.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert others == {"torch", "diffusers"}
    assert {node.name for node in nodes if isinstance(node, ast.ClassDef)} >= {"FlowMapScheduler", "_FlowMap"}


@pytest.mark.parametrize("timesteps", [1, 1000])
def test_a_jump_starts_at_a_thousandth_and_above_where_the_time_is_the_level(timesteps):
    flow_map = {"kind": "flow", "unshifted_time": True, "shift": 3.0}
    assert remote.check_starts({"sigmas": [1, 0.001]}, flow_map, timesteps) == {"sigmas": [1.0, 0.001]}
    assert remote.check_starts({"timesteps": [timesteps, 0.001 * timesteps]}, flow_map, timesteps)
    with pytest.raises(ValueError, match=r"numbers that decrease, from at most 1 to at least 0\.001"):
        remote.check_starts({"sigmas": [1, 0.0005]}, flow_map, timesteps)
