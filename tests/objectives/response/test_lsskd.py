"""LSSKD: the terms written out in loops, what is a constant, and what is left of the student."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.models.zoo import create
from limbeck.objectives import LSSKD, CrossEntropy
from limbeck.objectives.response.lsskd import lsskd_loss
from tests.objectives import reference

K, B, C, D = 4, 3, 3, 5


def inputs(turns: int = K) -> list:
    torch.manual_seed(0)
    answers = list(torch.randn(2, turns * B, C * turns).double())
    reads = list(torch.randn(2, turns * B, D).double())
    joint, feature = torch.randn(turns * B, C * turns).double(), torch.randn(turns * B, D).double()
    return [answers, reads, joint, feature, torch.randn(B, C).double(), torch.tensor([2, -1, 0])]


def plain(answers, reads, joint, feature, logits, labels, beta, t, turns) -> float:
    values = []
    for b, y in enumerate(labels.tolist()):
        value, aligned = 0.0, [0.0] * C
        for k in range(turns):
            row, target = k * B + b, y * turns + k
            deep = joint[row].tolist()
            for said in (joint, *answers):
                if y >= 0:
                    value -= math.log(reference.softmax(said[row].tolist())[target]) / turns
            for said, read in zip(answers, reads, strict=True):
                both = reference.softmax(deep, t), reference.softmax(said[row].tolist(), t)
                value += t**2 * reference.kl(*both) / turns
                value += (
                    beta
                    * sum((p - q) ** 2 for p, q in zip(read[row].tolist(), feature[row].tolist(), strict=True))
                    / turns
                )
            for c in range(C):
                aligned[c] += deep[c * turns + k] / turns
        value += t**2 * reference.kl(reference.softmax(aligned, t), reference.softmax(logits[b].tolist(), t))
        values.append(value)
    return reference.mean(values)


@pytest.mark.parametrize(("beta", "t", "turns"), [(0.01, 3.0, 4), (0.7, 1.0, 4), (0.3, 2.0, 1)])
def test_equals_its_terms(beta: float, t: float, turns: int) -> None:
    given = inputs(turns)
    found = lsskd_loss(*given, beta=beta, temperature=t)
    assert found.item() == pytest.approx(plain(*given, beta, t, turns), rel=1e-9)


def test_without_turns_stages_learn_classes() -> None:
    """K of 1: deep supervision, and the deepest teaches the shallow ones and the student's head."""
    answers, reads, joint, feature, _, labels = inputs(1)
    alike = lsskd_loss([joint] * 2, [feature] * 2, joint, feature, joint, labels)
    known = labels >= 0
    wanted = 3 * torch.nn.functional.cross_entropy(joint[known], labels[known], reduction="sum") / B
    torch.testing.assert_close(alike, wanted)
    assert lsskd_loss(answers, reads, joint, feature, joint, labels) > alike


def test_the_deepest_learns_class_and_turn_alone() -> None:
    answers, reads, joint, feature, logits, labels = inputs()
    joint.requires_grad_()
    feature.requires_grad_()
    lsskd_loss(answers, reads, joint, feature, logits, labels, beta=1.0).backward()
    assert feature.grad is None
    (own,) = torch.autograd.grad(lsskd_loss([], [], joint, feature, logits, labels), joint)
    torch.testing.assert_close(joint.grad, own)
    assert float(joint.grad.view(K, B, -1)[:, 1].abs().max()) == 0.0  # of the sample without a label


def test_the_heads_target_is_a_distribution_over_classes() -> None:
    """Gradient of the student's head is T (p - q) over B: it sums to zero, and vanishes at q."""
    answers, reads, joint, feature, _, labels = inputs()
    q = joint.view(K, B, C, K).diagonal(dim1=0, dim2=3).mean(-1)
    logits = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(lsskd_loss(answers, reads, joint, feature, logits, labels), logits)
    assert float(gradient.abs().max()) < 1e-12
    torch.testing.assert_close((q / 3).softmax(1).sum(1), torch.ones(B).double())


def batch(size: int = 4) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(size, 3, 8, 8), torch.arange(size) % C)


@pytest.mark.parametrize("turns", [1, 4])
def test_nothing_stays_on_the_student(turns: int) -> None:
    torch.manual_seed(0)
    student, x = create("resnet8", num_classes=C), batch()
    with torch.no_grad():
        before = student.eval()(x.inputs)
    distiller = Distiller(student, CrossEntropy() + LSSKD(turns=turns)).setup(x)
    student.train()
    distiller(x).total.backward()
    helpers = [p for n, p in distiller.named_parameters() if not n.startswith("student.")]
    assert helpers
    assert all(p.grad is not None for p in distiller.parameters())
    distiller.close()
    student.load_state_dict({**student.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(create_like(student)(x.inputs).shape, before.shape)
    assert not any(m._forward_hooks for m in student.modules())


def create_like(student: torch.nn.Module) -> torch.nn.Module:
    """A plain model takes the student's weights: nothing was added to it."""
    model = create("resnet8", num_classes=C)
    model.load_state_dict(student.state_dict())
    return model.eval()


def test_labels_of_the_task_stay_with_upright_images() -> None:
    student, x = create("resnet8", num_classes=C), batch()
    losses = Distiller(student, CrossEntropy() + LSSKD()).setup(x)(x)
    assert losses.logits is not None
    assert len(losses.logits) == 4 * x.size
    wanted = torch.nn.functional.cross_entropy(losses.logits[: x.size], x.labels)
    torch.testing.assert_close(losses.terms["cross_entropy"], wanted)


def test_mistakes() -> None:
    answers, reads, joint, feature, logits, labels = inputs()
    with pytest.raises(TensorError, match="one entry a class and turn"):
        lsskd_loss(answers, reads, joint[:, :-1], feature, logits, labels)
    with pytest.raises(ConfigError, match="turns"):
        LSSKD(turns=3)
    distiller = Distiller(create("resnet8", num_classes=C), LSSKD()).setup(batch())
    with pytest.raises(DataError, match="found 1 views of each sample; wanted 4"):
        distiller.compare(*distiller.traces(distiller.prepare(batch())), batch())


def test_it_learns_what_turns_a_student_sees() -> None:
    """The joint task goes down over a few steps, and so does the gap between the stages' answers."""
    torch.manual_seed(0)
    student, x = create("resnet8", num_classes=C), batch(16)
    distiller = Distiller(student, CrossEntropy() + LSSKD()).setup(x)
    student.train()
    optimizer = torch.optim.SGD(distiller.parameters(), 0.02, momentum=0.9)
    values = []
    for _ in range(12):
        losses = distiller(x)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        values.append(float(losses.terms["lsskd"]))
    assert values[-1] < 0.9 * values[0]


def test_types() -> None:
    assert isinstance(lsskd_loss(*inputs(), reduction="none"), Tensor)
    assert lsskd_loss(*inputs(), reduction="none").shape == (B,)
