"""SSKD against the paper's equations written out, on networks, and in two stages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.core.views import quarter_turns
from limbeck.engine.config import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.objectives.parts.pretext import Pretext, affinity
from limbeck.objectives.relation.sskd import SSKD, sskd_loss
from limbeck.schemes.in_steps.hint_then_kd import HintThenKD


def reference(student: Tensor, teacher: Tensor, temperature: float, share: float) -> float:
    """Section 3 with plain loops: cosines, error levels, selection, divergence."""
    size = len(student) // 4

    def row(z: Tensor, copy: int) -> list[float]:
        return [float(z[copy] @ z[j] / (z[copy].norm() * z[j].norm())) for j in range(size)]

    def softmax(values: list[float]) -> list[float]:
        exps = [math.exp(v / temperature) for v in values]
        return [e / sum(exps) for e in exps]

    levels, losses = [], []
    for copy in range(size, 4 * size):
        t = row(teacher, copy)
        levels.append(sorted(t, reverse=True).index(t[copy % size]))
        p, q = softmax(t), softmax(row(student, copy))
        losses.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    wrong = sum(level > 0 for level in levels)
    kept = sorted(range(len(levels)), key=lambda i: levels[i])[: len(levels) - wrong + int(share * wrong)]
    return temperature**2 * sum(losses[i] for i in kept) / len(kept)


@pytest.mark.parametrize(("temperature", "share"), [(0.5, 0.75), (1.3, 0.0), (0.7, 1.0)])
def test_it_is_the_papers_equation(temperature: float, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    teacher = torch.randn(20, 9, generator=generator, dtype=torch.float64)
    found = sskd_loss(student, teacher, temperature=temperature, share=share)
    assert found.item() == pytest.approx(reference(student, teacher, temperature, share), rel=1e-12)
    assert sskd_loss(student, 3 * student, temperature=temperature, share=share).item() == pytest.approx(0, abs=1e-12)


def test_reductions_and_mask() -> None:
    student, teacher = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    each = sskd_loss(student, teacher, share=1.0, reduction="none")
    assert each.shape == (9,)
    torch.testing.assert_close(sskd_loss(student, teacher, share=1.0, reduction="sum"), each.sum())
    mask = torch.arange(9) < 4
    torch.testing.assert_close(sskd_loss(student, teacher, share=1.0, mask=mask), each[:4].mean())
    kept = sskd_loss(student, teacher, share=0.0, reduction="none") > 0
    scores, source = affinity(teacher, "teacher")
    assert torch.equal(kept, scores.argmax(dim=1) == source)  # no share of the wrong ones: those the teacher got right


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU())
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def batch(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.randn(size, 3, 8, 8, generator=generator), labels=torch.arange(size) % 5)


def test_labels_stay_with_the_upright_samples() -> None:
    plain, student, teacher = batch(), Net(4), Net(6)
    losses = Distiller(student, 0.1 * CrossEntropy() + SSKD(), teacher).setup(plain)(plain)
    wanted = nn.functional.cross_entropy(student(plain.inputs), plain.labels)
    torch.testing.assert_close(losses.terms["cross_entropy"], wanted)
    assert set(losses.terms) == {"cross_entropy", *(f"sskd/{p}" for p in ("upright", "turned", "contrast", "head"))}


def test_the_copies_are_turned_for_both() -> None:
    plain = batch(2)
    turned = quarter_turns(plain.replace(teacher_inputs=plain.inputs[:, :, ::2, ::2]))
    for i in range(4):
        torch.testing.assert_close(turned.inputs[2 * i], torch.rot90(plain.inputs[0], i, (1, 2)))
        torch.testing.assert_close(turned.teacher_inputs[2 * i], torch.rot90(plain.inputs[0, :, ::2, ::2], i, (1, 2)))


def test_what_its_parts_train() -> None:
    plain, student = batch(), Net(4)
    distiller = Distiller(student, SSKD(), Net(6)).setup(plain)
    loss = next(iter(distiller.loss))
    prepared = distiller.prepare(plain)
    parts = loss(*distiller.traces(prepared), prepared)
    head, own = list(loss.pretext.parameters()), list(student.parameters())
    grads = torch.autograd.grad(parts["contrast"], [*head, *own], allow_unused=True, retain_graph=True)
    assert all(g is None for g in grads[: len(head)])
    assert any(g is not None and bool(g.any()) for g in grads[len(head) :])
    grads = torch.autograd.grad(parts["head"], [*head, *own], allow_unused=True)
    assert all(g is not None for g in grads[: len(head)])
    assert all(g is None for g in grads[len(head) :])


def test_the_papers_two_stages() -> None:
    """First the teacher's head alone, then the student with the head as it is."""
    plain, student, teacher, loss = batch(), Net(4), Net(6), SSKD()
    opening = loss.opening()
    assert isinstance(opening, Pretext)
    first = Distiller(student, opening, teacher).setup(plain)
    optimizer = torch.optim.Adam([p for p in first.parameters() if p.requires_grad], lr=0.01)
    seen = []
    for _ in range(30):
        optimizer.zero_grad()
        total = first(plain).total
        total.backward()
        optimizer.step()
        seen.append(total.item())
    assert seen[-1] < 0.9 * seen[0]
    trained = {k: v.clone() for k, v in opening.state_dict().items()}
    first.close()
    second = Distiller(student, CrossEntropy() + loss, teacher).setup(plain)
    assert "sskd/head" not in second(plain).terms
    second(plain).total.backward()
    assert all(p.grad is None or not p.requires_grad for p in opening.parameters())
    assert not any(p.requires_grad for p in opening.parameters())
    for name, value in opening.state_dict().items():
        assert torch.equal(value, trained[name])


def test_a_scheme_runs_the_two_stages() -> None:
    first, second = HintThenKD().stages(Net(4), CrossEntropy() + SSKD(), Net(6), TrainConfig(epochs=4))
    opening, main = next(iter(first.distiller.loss)), list(second.distiller.loss)[1]
    assert isinstance(opening, Pretext)
    assert main.pretext is opening
    assert main.opened
    assert first.learn == ()  # nothing of the student


def test_errors() -> None:
    with pytest.raises(DataError, match="square"):
        Distiller(Net(4), SSKD(), Net(6)).setup(Batch(torch.zeros(2, 3, 8, 6)))
    with pytest.raises(TensorError, match="four views"):
        sskd_loss(torch.zeros(6, 2), torch.zeros(6, 2))
    with pytest.raises(ConfigError, match="temperature"):
        SSKD(contrast_temperature=0.0)
    plain = batch()
    distiller = Distiller(Net(4), SSKD(), Net(6)).setup(plain)
    with pytest.raises(DataError, match="prepare"):
        next(iter(distiller.loss))(*distiller.traces(plain), plain)
