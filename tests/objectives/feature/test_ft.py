"""Factor transfer: its distance, its paraphraser, and its two stages or one."""

from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TapError, TensorError
from limbeck.data import as_loader
from limbeck.engine import TrainConfig, fit
from limbeck.models import create
from limbeck.objectives.feature.ft import FT, ft_loss
from limbeck.objectives.parts.paraphraser import Paraphrase, Paraphraser
from limbeck.schemes.in_steps.hint_then_kd import HintThenKD


def test_the_papers_distance() -> None:
    student, teacher = torch.randn(3, 2, 2, 2).double(), torch.randn(3, 2, 2, 2).double()
    for p in (1.0, 2.0, 1.5):
        each = []
        for s, t in zip(student, teacher, strict=True):
            s_list, t_list = s.flatten().tolist(), t.flatten().tolist()
            s_norm, t_norm = (math.sqrt(sum(x * x for x in values)) for values in (s_list, t_list))
            each.append(sum(abs(a / s_norm - b / t_norm) ** p for a, b in zip(s_list, t_list, strict=True)) / 8)
        assert ft_loss(student, teacher, p=p, reduction="none").tolist() == pytest.approx(each, rel=1e-12)
        assert ft_loss(student, 7 * teacher, p=p).item() == pytest.approx(sum(each) / 3, rel=1e-12)


def make(loss: FT) -> tuple[Distiller, Batch]:
    batch = Batch(torch.randn(6, 1, 8, 8), labels=torch.arange(6))
    student, teacher = create("resnet8", in_channels=1), create("wrn_10_2", in_channels=1)
    return Distiller(student, loss, teacher).setup(batch), batch


def test_one_stage_learns_the_paraphraser_by_its_own_loss_alone() -> None:
    loss = FT()
    distiller, batch = make(loss)
    student, teacher = distiller.traces(batch)
    parts = loss(student, teacher, batch)
    assert set(parts) == {"factor", "paraphrase"}
    gradients = torch.autograd.grad(parts["factor"], list(loss.paraphraser.parameters()), allow_unused=True)
    assert all(g is None for g in gradients)
    parts["paraphrase"].backward()
    assert all(p.grad is not None for p in loss.paraphraser.parameters())
    assert all(p.grad is None for p in loss.translator.parameters())


def test_two_stages_share_the_paraphraser_and_freeze_it_in_the_second() -> None:
    loss = FT()
    opening = loss.opening()
    assert isinstance(opening, Paraphrase)
    assert (opening.student_taps, opening.teacher_taps) == ((), ("stages:-1",))
    batch = Batch(torch.randn(6, 1, 8, 8), labels=torch.arange(6))
    student, teacher = create("resnet8", in_channels=1), create("resnet14", in_channels=1)
    first = Distiller(student, opening, teacher).setup(batch)
    optimizer = torch.optim.Adam(opening.parameters(), lr=1e-2)
    errors = []
    for _ in range(20):
        optimizer.zero_grad()
        total = first(batch).total
        total.backward()
        optimizer.step()
        errors.append(total.item())
    assert errors[-1] < 0.7 * errors[0]
    learned = {k: v.clone() for k, v in opening.paraphraser.state_dict().items()}
    second = Distiller(student, loss, teacher).setup(batch)
    assert loss.paraphraser is opening.paraphraser
    assert all(torch.equal(v, learned[k]) for k, v in loss.paraphraser.state_dict().items())
    losses = second(batch)
    assert list(losses.terms) == ["ft"]
    losses.total.backward()
    assert not any(p.requires_grad for p in loss.paraphraser.parameters())
    assert all(p.grad.abs().sum() > 0 for p in loss.translator.parameters())


def test_the_first_stage_runs_the_teacher_alone() -> None:
    """Four steps of each stage: the student is called in the second alone, and unchanged by the first."""
    student, teacher = create("resnet8", in_channels=1), create("resnet14", in_channels=1)
    first, second = HintThenKD(share=0.5).stages(student, FT(), teacher, TrainConfig(steps=8, compile="off"))
    before, calls = {k: v.clone() for k, v in student.state_dict().items()}, {"student": 0, "teacher": 0}
    for name, model in (("student", student), ("teacher", teacher)):
        model.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    train = as_loader((torch.randn(24, 1, 8, 8), torch.arange(24) % 6), batch_size=6, train=True)
    fit([first], train, quiet=True)
    assert calls["student"] == 0
    assert calls["teacher"] >= 4
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    with pytest.raises(TapError, match="list 'logits' among the objective's taps"):
        first.distiller.setup(train.example(2)).traces(train.example(2))[0].logits  # noqa: B018
    fit([second], train, quiet=True)
    assert calls["student"] >= 4
    assert not all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_sizes() -> None:
    paraphraser = Paraphraser(0.5)
    assert paraphraser.size(torch.zeros(1, 6, 4, 4)) == 3
    encoder = paraphraser.encoder
    assert paraphraser.size(torch.zeros(2, 6, 8, 8)) == 3
    assert paraphraser.encoder is encoder
    assert paraphraser.size(torch.zeros(1, 8, 4, 4)) == 4
    assert paraphraser.encoder is not encoder
    factor, error = paraphraser(torch.randn(2, 8, 3, 3))
    assert (factor.shape, error.shape) == ((2, 4, 3, 3), (2,))
    assert Paraphraser(0.1).size(torch.zeros(1, 4, 2, 2)) == 1
    layers = [tuple(m.weight.shape[:2]) for m in paraphraser.encoder if hasattr(m, "weight")]
    assert layers == [(8, 8), (4, 8), (4, 4)]


def test_mistakes_are_named() -> None:
    factor = torch.randn(2, 3, 2, 2)
    with pytest.raises(TensorError, match="student_feature"):
        ft_loss(factor[:, :2], factor)
    with pytest.raises(ConfigError, match="p: must be above zero"):
        ft_loss(factor, factor, p=0.0)
    with pytest.raises(ConfigError, match="rate"):
        FT(rate=0.0)
    with pytest.raises(ConfigError, match="paraphraser: not set up yet"):
        Paraphraser(0.5)(factor)
