"""Schemes: found by name, options checked, stages as the papers say."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.data import as_loader
from limbeck.engine import TrainConfig, fit
from limbeck.models import create
from limbeck.objectives import CRD, KD, CrossEntropy, FitNets
from limbeck.schemes import build, options, schemes


@pytest.fixture
def models():
    torch.manual_seed(0)
    return tuple(create(name, num_classes=3, in_channels=1) for name in ("resnet8", "resnet14"))


@pytest.fixture
def data():
    return as_loader((torch.randn(48, 1, 8, 8), torch.arange(48) % 3), batch_size=16, train=True)


def test_found_by_name():
    assert {"offline", "hint_then_kd"} <= set(schemes())
    assert set(options("hint_then_kd").model_fields) == {"share", "tap", "teacher_tap", "temperature"}
    for key in schemes():
        assert build(key)  # every scheme has defaults


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("ofline", {}, "did you mean 'offline'"),
        ("hint_then_kd", {"shar": 0.5}, "did you mean 'share'"),
        ("hint_then_kd", {"share": "half"}, "valid number"),
        ("hint_then_kd", {"share": 1.0}, "between 0 and 1"),
        ("hint_then_kd", {"temperature": 0.0}, "above zero"),
        ("offline", {"share": 0.5}, "no such option"),
    ],
)
def test_mistakes_are_named(key, given, message):
    with pytest.raises(ConfigError, match=message):
        build(key, **given)


def test_offline_is_one_stage(models):
    (stage,) = build("offline").stages(models[0], CrossEntropy() + KD(), models[1], TrainConfig(steps=5))
    assert (stage.config.steps, stage.learn, stage.learn_to) == (5, ("*",), None)
    assert stage.distiller.student is models[0]


@pytest.mark.parametrize("length", [{"epochs": 2}, {"epochs": 10}, {"steps": 7}])
def test_both_stages_together_take_the_whole_length(models, length):
    config = TrainConfig(**length)
    hint, distill = build("hint_then_kd", share=0.3).stages(models[0], FitNets(), models[1], config)
    name = next(iter(length))
    assert getattr(hint.config, name) + getattr(distill.config, name) == length[name]
    assert (hint.config.monitor, distill.config.monitor) == ("total", "auto")


def test_one_step_cannot_be_two_stages(models):
    with pytest.raises(ConfigError, match="two epochs or more"):
        build("hint_then_kd").stages(models[0], FitNets(), models[1], TrainConfig(epochs=1))
    with pytest.raises(ConfigError, match="hints need a teacher"):
        build("hint_then_kd").stages(models[0], FitNets(), None, TrainConfig())


def weights(stage, progress: float) -> dict[str, float]:
    return {n: float(w(progress)) for n, _, w in stage.distiller.loss.items()}


def test_second_stage_is_the_papers_where_the_loss_says_nothing_else(models):
    for loss in (None, FitNets(), CrossEntropy() + 200.0 * FitNets()):
        hint, distill = build("hint_then_kd").stages(models[0], loss, models[1], TrainConfig())
        assert weights(hint, 0.5) == {"fitnets": 1.0}
        assert weights(distill, 0.0) == pytest.approx({"cross_entropy": 1.0, "kd": 4 / 9})
        assert weights(distill, 1.0) == pytest.approx({"cross_entropy": 1.0, "kd": 1 / 9})
        assert next(o for n, o, _ in distill.distiller.loss.items() if n == "kd").temperature == 3.0


def test_second_stage_as_it_is_asked_for(models):
    loss = FitNets("layer2") + CrossEntropy() + 0.8 * CRD(memory="batch")
    hint, distill = build("hint_then_kd").stages(models[0], loss, models[1], TrainConfig())
    assert hint.learn_to == "layer2"
    assert weights(distill, 0.3) == pytest.approx({"cross_entropy": 1.0, "crd": 0.8})


def test_the_hint_stage_moves_the_lower_part_only(models, data):
    student, teacher = models
    before = {k: v.clone() for k, v in student.state_dict().items()}
    hint, _ = build("hint_then_kd").stages(student, FitNets("layer2"), teacher, TrainConfig(epochs=64))
    ran = []
    student.layer3.register_forward_hook(lambda *_: ran.append(student.training))
    result = fit([hint], data, data, quiet=True)
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if not k.startswith(("layer3", "linear"))}
    assert True not in ran  # it stops at its tap
    assert result.validation.keys() == {"total", "terms"}
    losses = [line["total"] for line in result.history if line["split"] == "train"]
    assert losses[-1] < 0.6 * losses[0]


def test_both_stages_train(models, data):
    stages = build("hint_then_kd").stages(*(models[0], None, models[1]), TrainConfig(epochs=4))
    result = fit(stages, data, data, quiet=True)
    assert result.steps == 12
    assert [line["stage"] for line in result.history if line["split"] == "validation"] == ["hint"] + ["distill"] * 3
    assert "accuracy" in result.validation
