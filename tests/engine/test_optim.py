"""Optimizers and schedules by name or import path, and the settings that name them."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from limbeck.core.errors import ConfigError
from limbeck.engine import TrainConfig
from limbeck.engine.optim import build_optimizer, build_scheduler


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("name", ["sgd", "AdamW", "rmsprop", "nadam", "torch.optim.Adam", "torch.optim:Adagrad"])
def test_by_name_or_path(name):
    module = layer()
    optimizer = build_optimizer(name, module.named_parameters(), lr=0.1, weight_decay=0.01, fused=True)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
    assert [tuple(p.shape) for p in optimizer.param_groups[0]["params"]] == [(4, 3)]
    module(torch.randn(5, 3)).square().sum().backward()
    before = module[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(module[0].weight, before)


def test_everything_may_decay():
    (group,) = build_optimizer("sgd", layer().named_parameters(), lr=0.1, weight_decay=0.01, decay="all").param_groups
    assert (len(group["params"]), group["momentum"]) == (4, 0.9)


def test_fused_where_there_is_one():
    fused = [
        build_optimizer(n, layer().named_parameters(), lr=0.1, fused=True).defaults.get("fused")
        for n in ("adam", "nadam")
    ]
    assert fused == [True, None]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamv", {}, "did you mean 'adam"),
        ("lbfgs", {}, "no such optimizer"),
        ("no.such:Thing", {}, "ModuleNotFoundError"),
        ("collections:Counter", {}, "not a Optimizer"),
        ("sgd", {"momentun": 0.9}, "did you mean 'momentum'"),
        ("sgd", {"lr": 0.9}, "beside it, not in it"),
        ("sgd", {"momentum": -1.0}, "refuses this"),
    ],
)
def test_what_cannot_be_built(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(name, layer().named_parameters(), lr=0.1, options=options)
    with pytest.raises(ValidationError, match=message):
        TrainConfig(optimizer=name, optimizer_options=options)


def rates(schedule, options=None, total=8, warmup=0.0) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, schedule, options or {}, total=total, warmup=warmup)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules():
    assert rates("constant") == [1.0] * 8
    assert rates("linear") == pytest.approx([1 - k / 8 for k in range(8)])
    assert rates("cosine") == pytest.approx(rates("CosineAnnealingLR"), abs=1e-6)  # torch's own, over all steps
    assert rates("step") == pytest.approx([1.0] * 5 + [0.1, 0.01, 0.001])
    assert rates({"exponential": {"start": 1, "end": 0.01}}, total=2) == pytest.approx([1.0, 0.1])
    assert rates("torch.optim.lr_scheduler:StepLR", {"step_size": 3})[::3] == pytest.approx([1.0, 0.1, 0.01])


def test_a_warm_up_rises_from_above_zero():
    assert rates("constant", warmup=0.5) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ("cosinus", {}, "did you mean 'cosine'"),
        ({"cosine": {"stat": 1}}, {}, "did you mean 'start'"),
        ("cosine", {"T_max": 3}, "options belong to scheduler classes"),
        ("StepLR", {}, "refuses this"),
        ("StepLR", {"step_sise": 1}, "did you mean 'step_size'"),
        ("LambdaLR", {}, "no such schedule"),
    ],
)
def test_what_is_no_schedule(schedule, options, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(schedule=schedule, schedule_options=options)


def test_length():
    assert TrainConfig().total_steps(7) == 70
    assert TrainConfig(steps=5).total_steps(None) == 5
    assert TrainConfig(epochs=None, steps=5).epochs is None
    with pytest.raises(ConfigError, match="say steps"):
        TrainConfig(epochs=2).total_steps(None)
    with pytest.raises(ValidationError, match="not both"):
        TrainConfig(epochs=2, steps=3)
    again = TrainConfig.model_validate(TrainConfig(steps=3).model_dump(mode="json"))
    assert again == TrainConfig(steps=3)


@pytest.mark.parametrize(
    "wrong", [{"epoch": 3}, {"epochs": 0}, {"epochs": "3"}, {"lr": float("nan")}, {"precision": "int8"}]
)
def test_strict(wrong):
    with pytest.raises(ValidationError):
        TrainConfig(**wrong)
