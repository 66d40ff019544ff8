"""Schemes: found by name, options checked, stages as the papers say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.data import as_loader
from limbeck.engine import TrainConfig, fit
from limbeck.models import create
from limbeck.objectives import AB, CRD, FSP, FT, KD, CrossEntropy, FitNets
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


@pytest.mark.parametrize(("loss", "tap"), [(AB(), "preactivations"), (FSP(), "stages")], ids=["ab", "fsp"])
def test_losses_that_are_a_first_stage_leave_the_second_to_the_others(models, data, loss, tap):
    stages = build("hint_then_kd").stages(models[0], CrossEntropy() + 3.0 * loss, models[1], TrainConfig(epochs=4))
    hint, distill = stages
    assert weights(hint, 0.5) == {loss.card.key: 1.0}
    assert (hint.learn, hint.learn_to) == (("*",), tap)
    assert weights(distill, 0.5) == {"cross_entropy": 1.0}  # only FitNets' paper asks the teacher there
    before = {k: v.clone() for k, v in models[0].state_dict().items()}
    fit([hint], data, quiet=True)
    changed = {k for k, v in models[0].state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if not k.startswith("linear")}


def test_alone_they_leave_the_second_stage_to_the_labels(models):
    _, distill = build("hint_then_kd").stages(models[0], AB(), models[1], TrainConfig())
    assert weights(distill, 0.5) == {"cross_entropy": 1.0}


def test_hints_of_several_kinds_together(models, data):
    loss = FitNets() + 2.0 * AB() + CrossEntropy() + 500.0 * FT()
    hint, distill = build("hint_then_kd").stages(models[0], loss, models[1], TrainConfig(epochs=2))
    assert weights(hint, 0.5) == {"fitnets": 1.0, "ab": 1.0, "paraphrase": 1.0}
    assert (hint.learn, hint.learn_to) == (("*",), None)
    assert weights(distill, 0.5) == {"cross_entropy": 1.0, "ft": 500.0}
    assert fit([hint, distill], data, quiet=True).steps == 6


def factor_transfer(student: torch.nn.Module, teacher: torch.nn.Module) -> tuple[FT, list]:
    loss = FT()
    stages = build("hint_then_kd", share=0.5).stages(
        student, CrossEntropy() + 5.0 * loss, teacher, TrainConfig(epochs=4, lr=0.01, keep=9, checkpoint_every=3)
    )
    return loss, stages


def test_factor_transfer_goes_on_with_its_paraphraser(models, data):
    student, teacher = models
    loss, stages = factor_transfer(student, teacher)
    hint, _ = stages
    before = {k: v.clone() for k, v in student.state_dict().items()}
    result = fit([hint], data, data, quiet=True)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())  # statistics too: nobody asks it
    losses = [line["total"] for line in result.history if line["split"] == "validation"]
    assert losses[-1] < losses[0]
    learned = {k: v.clone() for k, v in loss.paraphraser.state_dict().items()}
    student.load_state_dict(before)
    loss, stages = factor_transfer(student, teacher)
    fit(stages, data, quiet=True)
    for name, value in loss.paraphraser.state_dict().items():
        torch.testing.assert_close(value, learned[name], msg=name)
    assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())


@pytest.mark.parametrize("at", [6, 9])  # between the stages; within the second
def test_resume_carries_the_paraphraser_over(models, data, tmp_path: Path, at):
    student, teacher = models
    start = {k: v.clone() for k, v in student.state_dict().items()}
    fit(factor_transfer(student, teacher)[1], data, out=tmp_path, quiet=True)
    wanted = {k: v.clone() for k, v in student.state_dict().items()}
    folders = sorted((tmp_path / "checkpoints").glob("step-*"))
    for folder in folders:
        if int(folder.name.removeprefix("step-")) > at:
            shutil.rmtree(folder)
    assert (tmp_path / "checkpoints" / f"step-{at:08}").is_dir()
    student.load_state_dict(start)
    found = fit(factor_transfer(student, teacher)[1], data, out=tmp_path, resume=True, quiet=True)
    assert found.steps == 12
    for name, value in student.state_dict().items():
        assert torch.equal(value, wanted[name]), name
