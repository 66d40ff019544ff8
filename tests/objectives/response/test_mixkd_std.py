from __future__ import annotations

from math import log, sqrt

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.objectives.response.cross_entropy import CrossEntropy
from limbeck.objectives.response.logit_std import logit_std_loss
from limbeck.objectives.response.mixkd_std import MixKDStd, mixkd_std_loss
from tests.objectives.reference import kl, mean, softmax


@pytest.mark.parametrize(("alpha", "gamma"), [(0.9, 0.1), (0.0, 1.0), (1.0, 0.0)])
def test_equals_the_paper(alpha: float, gamma: float) -> None:
    student, teacher = 3 * torch.randn(2, 5, 6).double() + 1
    labels = torch.rand(5, 6).double().softmax(-1)
    wanted = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        q, p = (softmax(row, sqrt(sum((z - mean(row)) ** 2 for z in row) / (len(row) - 1))) for row in (s, t))
        wanted.append(-gamma * sum(a * log(b) for a, b in zip(y, q, strict=True)) + alpha * kl(p, q))
    found = mixkd_std_loss(student, teacher, labels, alpha=alpha, gamma=gamma)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_the_size_of_the_logits_does_not_matter() -> None:
    student, teacher, labels = *torch.randn(2, 5, 6).double(), torch.arange(5)
    torch.testing.assert_close(
        mixkd_std_loss(7 * student, 0.1 * teacher, labels), mixkd_std_loss(student, teacher, labels)
    )
    alike = mixkd_std_loss(3 * teacher + 2, teacher, labels, gamma=0.0)
    assert alike.item() == pytest.approx(0, abs=1e-12)


def test_its_teacher_part_is_logit_standardisation_at_temperature_1() -> None:
    student, teacher, labels = *torch.randn(2, 5, 6).double(), torch.arange(5)
    torch.testing.assert_close(
        mixkd_std_loss(student, teacher, labels, alpha=1.0, gamma=0.0),
        logit_std_loss(student, teacher, temperature=1.0, unbiased=True),
    )


def test_the_gradient_runs_through_the_deviation() -> None:
    """So it cannot change the logits' size: it is orthogonal to them about their mean, and not that of a constant."""
    student, teacher, labels = *torch.randn(2, 5, 6).double(), torch.arange(5)
    student.requires_grad_()
    mixkd_std_loss(student, teacher, labels, gamma=0.0).backward()
    attached = student.grad
    assert attached is not None
    centred = (student - student.mean(-1, keepdim=True)).detach()
    torch.testing.assert_close((attached * centred).sum(-1), torch.zeros(5).double(), rtol=0, atol=1e-12)
    sigma = student.std(-1, keepdim=True).detach()
    p = (teacher / teacher.std(-1, keepdim=True)).softmax(-1)
    detached = 0.9 / 5 * ((student / sigma).softmax(-1) - p).detach() / sigma
    assert float((attached - detached).norm()) > 0.1 * float(detached.norm())


def test_a_sample_without_a_label_still_has_its_teacher() -> None:
    student, teacher = torch.randn(2, 3, 4).double()
    labels = torch.tensor([1, -100, 2])
    each = mixkd_std_loss(student, teacher, labels, reduction="none")
    whole = mixkd_std_loss(student, teacher, torch.tensor([1, 0, 2]), gamma=0.0, reduction="none")
    torch.testing.assert_close(each[1], whole[1])
    assert each[0] > whole[0]


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x.detach()
        return self.fc(x)


def test_both_models_see_one_mixed_batch() -> None:
    student, teacher = Seen(), Seen()
    batch = Batch(torch.rand(20, 6), labels=torch.arange(20) % 4)
    distiller = Distiller(student, MixKDStd(clean=0.5) + CrossEntropy(), teacher).setup(batch)
    torch.testing.assert_close(student.last, batch.inputs)  # nothing is mixed before the classes are known
    distiller(batch).total.backward()
    torch.testing.assert_close(student.last, teacher.last)
    unmixed = (student.last == batch.inputs).all(1)
    assert 10 <= int(unmixed.sum()) < 18
    assert torch.equal(batch.require("labels"), torch.arange(20) % 4)
    distiller.eval()
    distiller(batch)
    torch.testing.assert_close(student.last, batch.inputs)


def test_what_it_refuses() -> None:
    for options in ({"clean": 1.5}, {"clean": -0.1}, {"beta": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            MixKDStd(**options)
    with pytest.raises(TensorError, match="labels"):
        mixkd_std_loss(torch.randn(2, 3), torch.randn(2, 3))
    tokens = Batch(torch.zeros(4, 6, dtype=torch.long), labels=torch.zeros(4, dtype=torch.long))
    embed = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(18, 4))
    teacher = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(18, 4))
    with pytest.raises(DataError, match="only numbers"):
        Distiller(embed, MixKDStd(), teacher).setup(tokens)
