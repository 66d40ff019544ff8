from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.top_k import TopK
from limbeck.core.trace import Trace
from limbeck.objectives.parts.divergences import Divergence
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.reverse_kl import reverse_kl_loss
from limbeck.objectives.response.top_k_kl import TopKKL, top_k_kl_loss
from tests.objectives.reference import kl, mean, softmax


def buckets(student: list[float], teacher: list[float], k: int, temperature: float) -> tuple[list[float], list[float]]:
    """Both predictions over the teacher's first k classes and all others."""
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    first = sorted(range(len(p)), key=lambda c: -p[c])[:k]
    others = [c for c in range(len(p)) if c not in first]
    return [p[c] for c in first] + [sum(p[c] for c in others)], [q[c] for c in first] + [sum(q[c] for c in others)]


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (3, 2.0), (6, 1.0)])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_equals_the_formula(divergence: Divergence, k: int, temperature: float) -> None:
    student, teacher = 3 * torch.randn(2, 5, 7).double()
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = buckets(s, t, k, temperature)
        wanted.append(temperature**2 * (kl(p, q) if divergence == "forward_kl" else kl(q, p)))
    found = top_k_kl_loss(student, teacher, k=k, divergence=divergence, temperature=temperature)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_with_all_classes_it_is_the_whole_divergence_and_never_above_it() -> None:
    student, teacher = 3 * torch.randn(2, 8, 7).double()
    names: tuple[Divergence, ...] = ("forward_kl", "reverse_kl")
    for whole, name in zip((kd_loss, reverse_kl_loss), names, strict=True):
        limit = whole(student, teacher, temperature=2.0, reduction="none")
        values = [
            top_k_kl_loss(student, teacher, k=k, divergence=name, temperature=2.0, reduction="none")
            for k in (1, 3, 5, 7, 99)
        ]
        for value in values:
            assert bool((value <= limit + 1e-12).all())
        torch.testing.assert_close(values[-2], limit)
        torch.testing.assert_close(values[-1], limit)


def test_the_gradient_at_classes_left_out_is_the_tails() -> None:
    """All of them together are one class: the gradient there is the student's probability times one number."""
    student, teacher = 2 * torch.randn(2, 7).double()
    student.requires_grad_()
    top_k_kl_loss(student.unsqueeze(0), teacher.unsqueeze(0), k=3).backward()
    others = teacher.topk(4, largest=False).indices
    assert student.grad is not None
    ratio = student.grad[others] / student.detach().softmax(0)[others]
    torch.testing.assert_close(ratio, ratio[:1].expand(4))


def test_a_tiny_tail_keeps_its_digits() -> None:
    """The student's is e^-40, in float32, where one minus the rest would be nothing and its logarithm infinite."""
    student, teacher = torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    leaf = student.clone().requires_grad_()
    value = top_k_kl_loss(leaf, teacher, k=1)
    wanted = top_k_kl_loss(student.double(), teacher.double(), k=1)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=0)
    value.backward()
    assert leaf.grad is not None
    tail = 2 / (2 + math.e)
    torch.testing.assert_close(leaf.grad, torch.tensor([[tail, -tail / 2, -tail / 2]]))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_sparse_teacher_gives_the_same_as_its_logits(temperature: float) -> None:
    student, teacher = 3 * torch.randn(2, 2, 4, 9).double()
    mask = torch.rand(2, 4) < 0.7
    wanted = top_k_kl_loss(student, teacher, k=3, temperature=temperature, mask=mask)
    top = TopK.of(teacher, 3, temperature)
    torch.testing.assert_close(top_k_kl_loss(student, top, temperature=temperature, mask=mask), wanted)


def test_from_a_record_it_asks_for_no_logits() -> None:
    student, teacher = 3 * torch.randn(2, 2, 4, 9).double()
    top = TopK.of(teacher, 3)
    loss = TopKKL(source="top_k", temperature=2.0)
    assert loss.teacher_taps == ("top_k",)
    found = loss(Trace(student), Trace(None, {"top_k": top}), Batch(student))
    torch.testing.assert_close(found, top_k_kl_loss(student, top.softened(2.0), temperature=2.0))
    dense = top_k_kl_loss(student, top.dense(), k=3, temperature=2.0)  # the tail spread evenly
    torch.testing.assert_close(found, dense)


def test_what_the_student_pads_its_vocabulary_with_does_not_count() -> None:
    student, teacher = torch.randn(3, 7).double(), torch.randn(3, 5).double()
    wanted = top_k_kl_loss(student[:, :5], teacher, k=2)
    torch.testing.assert_close(top_k_kl_loss(student, TopK.of(teacher, 2)), wanted)


def test_what_it_refuses() -> None:
    student: Tensor = torch.randn(3, 5)
    with pytest.raises(TensorError, match=r"teacher_logits.*found \[2, 2\] of 5"):
        top_k_kl_loss(student, TopK.of(torch.randn(2, 5), 2))
    with pytest.raises(TensorError, match=r"of 6 classes"):
        top_k_kl_loss(student, TopK.of(torch.randn(3, 6), 2))
    for options, match in (({"k": 0}, "k"), ({"source": "log"}, "source"), ({"skew": 0.0}, "skew")):
        with pytest.raises(ConfigError, match=match):
            TopKKL(**options)
