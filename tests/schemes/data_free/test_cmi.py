"""CMI: rounds lessen their loss, images of different rounds are told apart, and the head's memory survives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from limbeck.core.errors import ConfigError
from limbeck.core.teacher import as_teacher
from limbeck.data.resident import ResidentLoader
from limbeck.schemes import build
from limbeck.schemes.data_free.cmi import disagreement
from limbeck.schemes.data_free.views import Bank, resized_crops
from tests.schemes.data_free.scene import cast, mlp

SMALL = {"size": 12, "every": 2, "iterations": 25, "latent": 8, "width": 8, "head": 8, "lr": 0.01, "bank": 30}


def inverting(**options):
    (training,) = build("cmi", **{**SMALL, **options}).trainings(cast())
    distiller = training.stages[0].distiller
    return distiller.setup(training.train.example()), training.train.example(12).inputs


def test_a_round_lessens_what_it_should():
    distiller, like = inverting(adversarial=0.0)
    losses = []
    whole = distiller.round_loss

    def noted(images, targets):
        found = whole(images, targets)
        losses.append(float(found[0].detach()))
        return found

    distiller.round_loss = noted
    images, _ = distiller.make(like)
    assert images.shape == like.shape
    assert len(losses) == 25
    assert min(losses[-5:]) < 0.7 * losses[0]
    assert distiller.pool.size == 12
    assert distiller.bank.added == 12


def test_what_is_kept_are_the_images_of_the_least_loss():
    distiller, like = inverting(iterations=6, padding=0, flip=False)
    seen = []
    distiller.round_loss = lambda images, targets: (
        seen.append(images.detach().clone()) or (images.sum() * 0 + [3.0, 2.0, 5.0, 1.0, 4.0, 6.0][len(seen) - 1]),
        torch.full((12, 2, distiller.bank.rows.shape[2]), float(len(seen))),
    )
    best = distiller.synthesise(like)
    assert torch.equal(best, seen[3])
    assert distiller.bank.rows[:12].unique().tolist() == [4.0]


def test_the_head_goes_on_where_the_last_round_left_it():
    """Two rounds of one optimizer, and two with what it knows kept in buffers between, give the same head."""
    torch.manual_seed(0)
    bank, x = Bank(4, 5, nn.Linear(5, 2)), torch.randn(7, 5)
    other = Bank(4, 5, nn.Linear(5, 2))
    other.load_state_dict(bank.state_dict())
    optimizer = torch.optim.Adam(other.head.parameters(), lr=0.1)
    for _ in range(2):
        resumed = Bank(4, 5, nn.Linear(5, 2))
        resumed.load_state_dict(bank.state_dict())
        bank, own = resumed, resumed.optimizer(0.1)
        for _ in range(3):
            for one, moving in ((bank, own), (other, optimizer)):
                moving.zero_grad()
                (one.head(x) ** 4).mean().backward()
                moving.step()
        bank.keep_moments(own)
    assert all(torch.equal(a, b) for a, b in zip(bank.head.parameters(), other.head.parameters(), strict=True))


def test_the_bank_is_a_ring():
    bank = Bank(5, 1, nn.Linear(1, 1))
    bank.add(torch.arange(4.0).view(4, 1, 1).expand(4, 2, 1))
    assert sorted(bank.some(9)[:, 0, 0].tolist()) == [0, 1, 2, 3]
    bank.add(torch.arange(4.0, 7).view(3, 1, 1).expand(3, 2, 1))
    assert sorted(bank.some(9)[:, 1, 0].tolist()) == [2, 3, 4, 5, 6]
    assert len(bank.some(3)) == 3


def test_the_head_is_no_part_of_the_students_training():
    distiller, _ = inverting()
    own = {id(p) for p in distiller.bank.parameters()}
    trained = {id(p) for p in distiller.parameters_of("student")}
    assert own
    assert not own & trained
    assert {id(p) for p in distiller.student.parameters()} <= trained


def test_disagreement_counts_where_both_name_one_class():
    student, teacher = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    p, q = teacher.softmax(1), student.softmax(1)
    values = [float((a * (a / b).log()).sum()) if a.argmax() == b.argmax() else 0.0 for a, b in zip(p, q, strict=True)]
    assert 0 < sum(v > 0 for v in values) < 50
    assert float(disagreement(student, teacher)) == pytest.approx(sum(values) / 50)


def test_crops_show_a_part_of_the_image():
    torch.manual_seed(2)
    ramp = torch.arange(8.0).expand(30, 1, 8, 8).contiguous().requires_grad_()
    found = resized_crops(ramp, flip=False)
    spans = found[:, 0, 0, -1] - found[:, 0, 0, 0]
    assert found.min() >= 0
    assert found.max() <= 7
    assert 0 < spans.min() < 4 < spans.max() < 7.01
    assert ((found[:, :, :, 1:] - found[:, :, :, :-1]) >= -1e-5).all()
    found.sum().backward()
    assert ramp.grad.abs().sum() > 0
    torch.testing.assert_close(resized_crops(ramp, 1.0, flip=False, ratio=(1.0, 1.0)), ramp)
    mirrored = resized_crops(ramp, 1.0, ratio=(1.0, 1.0))[:, 0, 0, 0].detach().round()
    assert set(mirrored.tolist()) == {0.0, 7.0}


def test_vectors_are_refused():
    data = ResidentLoader(torch.zeros(40, 5), torch.arange(40) % 3, batch_size=10, classes=3)
    with pytest.raises(ConfigError, match="views are of images"):
        list(build("cmi").trainings(replace(cast(data), student=mlp(4, 1), teacher=as_teacher(mlp(8, 2)))))
