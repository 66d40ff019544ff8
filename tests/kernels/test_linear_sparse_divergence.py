"""The fused loss of a sparse teacher against its definition on full probabilities, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import limbeck.functional as LF
from limbeck.core.errors import TensorError
from limbeck.core.top_k import TopK
from limbeck.kernels import linear_divergence, linear_sparse_divergence
from tests.kernels.definitions import LOSSES, OPTIONS, logits, sparse_loss


def model(places: int, width: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and bias."""
    sizes = ((places, width), (classes, width), (classes,))
    parts = [(1.5 * torch.randn(*size, dtype=torch.float64)).requires_grad_() for size in sizes]
    return parts[0], parts[1], parts[2]


def grads(loss: Tensor, wanted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 13, 50, None])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_definition(name: str, chunk: int | None, temperature: float) -> None:
    student = model(13, 5, 37)
    top = TopK.of(2 * torch.randn(13, 37, dtype=torch.float64), 6, temperature)
    mask = torch.rand(13) < 0.6
    found = linear_sparse_divergence(
        *student[:2],
        top,
        student_bias=student[2],
        divergence=name,
        temperature=temperature,
        mask=mask,
        chunk=chunk,
        **OPTIONS[name],
    )
    wanted = sparse_loss(name, logits(*student), top, temperature, mask)
    torch.testing.assert_close(found.total, wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.divergence, wanted.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grads(found.total, student), grads(wanted, student), rtol=1e-9, atol=1e-11)
    assert found.cross_entropy == 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_labels_go_through_the_same_pass(name: str, temperature: float) -> None:
    student = model(11, 4, 29)
    top = TopK.of(torch.randn(11, 29, dtype=torch.float64), 5, temperature)
    mask, labels = torch.rand(11) < 0.7, torch.randint(-4, 29, (11,))
    labels[0], labels[1], labels[2] = top.ids[0, 2], 99, -100  # within the buckets, nowhere, and none
    mask[0], mask[1], mask[2] = True, False, True
    found = linear_sparse_divergence(
        *student[:2],
        top,
        divergence=name,
        temperature=temperature,
        mask=mask,
        labels=labels,
        label_weight=0.3,
        weight=0.7,
        chunk=3,
        **OPTIONS[name],
    )
    full = logits(*student[:2])
    divergence = sparse_loss(name, full, top, temperature, mask)
    cross_entropy = LF.cross_entropy_loss(full, labels.masked_fill(~mask, -1), mask=mask)
    torch.testing.assert_close(found.divergence, divergence.detach())
    torch.testing.assert_close(found.cross_entropy, cross_entropy.detach())
    wanted = 0.7 * divergence + 0.3 * cross_entropy
    torch.testing.assert_close(found.total, wanted)
    torch.testing.assert_close(grads(found.total, student[:2]), grads(wanted, student[:2]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_all_classes_are_the_dense_loss(name: str, temperature: float) -> None:
    student, teacher = model(6, 4, 11), model(6, 4, 11)
    top = TopK.of(logits(*teacher[:2]).detach(), 11, temperature)  # a tail of no class and no probability
    options = {"divergence": name, "temperature": temperature, **OPTIONS[name]}
    labels = torch.randint(-1, 11, (6,))
    sparse = linear_sparse_divergence(*student[:2], top, labels=labels, label_weight=0.2, **options)
    dense = linear_divergence(*student[:2], *teacher[:2], labels=labels, label_weight=0.2, **options)
    torch.testing.assert_close(tuple(sparse), tuple(dense))
    torch.testing.assert_close(grads(sparse.total, student[:2]), grads(dense.total, student[:2]))


@pytest.mark.parametrize("name", LOSSES)
def test_padded_vocabularies(name: str) -> None:
    student = model(7, 4, 31)
    fewer = TopK.of(torch.randn(7, 23, dtype=torch.float64), 5)
    found = linear_sparse_divergence(*student[:2], fewer, divergence=name, **OPTIONS[name]).total
    wanted = sparse_loss(name, logits(*student[:2])[:, :23], fewer, 1.0, None)
    torch.testing.assert_close(found, wanted)
    own = grads(found, student[:2])
    torch.testing.assert_close(own, grads(wanted, student[:2]))
    assert not own[1][23:].any()
    more = torch.randn(7, 40, dtype=torch.float64)
    more[:, 31:] -= 20.0  # the teacher's padding never comes first
    top = TopK.of(more, 5)
    assert top.classes == 40
    found = linear_sparse_divergence(*student[:2], top, divergence=name, **OPTIONS[name]).total
    torch.testing.assert_close(found, sparse_loss(name, logits(*student[:2]), top, 1.0, None))


@pytest.mark.parametrize("name", LOSSES)
def test_a_tail_of_next_to_nothing_keeps_its_digits(name: str) -> None:
    # In float32 the student's tail is e^-60, which 1 - sum of its probabilities does not know.
    hidden = torch.tensor([[60.0, 58.0, 0.0, 0.5, -1.0]], requires_grad=True)
    top = TopK.of(torch.tensor([[40.0, 41.0, 0.3, 0.0, 0.1]]), 2)
    found = linear_sparse_divergence(hidden, torch.eye(5), top, divergence=name, **OPTIONS[name]).total
    exact = TopK(top.ids, top.log_probs.double(), top.log_tail.double(), 5)
    wide = hidden.detach().double().requires_grad_()
    wanted = sparse_loss(name, wide, exact, 1.0, None)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    torch.testing.assert_close(grads(found, (hidden,))[0].double(), grads(wanted, (wide,))[0], rtol=1e-4, atol=1e-9)


def test_a_tail_that_neither_has() -> None:
    hidden = torch.tensor([[2.0, 1.0, 0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.0, 0.0, -math.inf, -math.inf], dtype=torch.float64)
    top = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.4, 0.6]]).log(), torch.tensor([-math.inf]), 4)
    for name in LOSSES:
        eye = torch.eye(4, dtype=torch.float64)
        found = linear_sparse_divergence(hidden, eye, top, student_bias=bias, divergence=name, **OPTIONS[name]).total
        wanted = sparse_loss(name, hidden + bias, top, 1.0, None)
        torch.testing.assert_close(found, wanted)
        assert grads(found, (hidden,))[0].isfinite().all()


def test_a_tail_that_only_the_student_has() -> None:
    hidden = torch.tensor([[2.0, 1.0, 0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    top = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.4, 0.6]]).log(), torch.tensor([-math.inf]), 4)
    for name in LOSSES:
        found = linear_sparse_divergence(
            hidden, torch.eye(4, dtype=torch.float64), top, divergence=name, **OPTIONS[name]
        ).total
        if name == "reverse_kl":
            assert found == math.inf  # as its definition is
            continue
        wanted = sparse_loss(name, hidden, top, 1.0, None)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(grads(found, (hidden,)), grads(wanted, (hidden,)))


@pytest.mark.parametrize("name", LOSSES)
def test_places_that_do_not_count_may_hold_anything(name: str) -> None:
    student = model(8, 4, 19)
    top = TopK.of(torch.randn(8, 19, dtype=torch.float64), 3)
    mask = torch.tensor([True, False] * 4)
    clean = linear_sparse_divergence(*student[:2], top, divergence=name, mask=mask, **OPTIONS[name]).total
    with torch.no_grad():
        hidden = student[0].clone()
        hidden[1], hidden[3] = math.nan, math.inf
        ids, log_probs = top.ids.clone(), top.log_probs.clone()
        ids[5], log_probs[7] = 10**6, math.nan
    spoilt = TopK(ids, log_probs, top.log_tail, 19)
    hidden.requires_grad_()
    found = linear_sparse_divergence(
        hidden, student[1], spoilt, divergence=name, mask=mask, chunk=3, **OPTIONS[name]
    ).total
    torch.testing.assert_close(found, clean)
    own, wanted = grads(found, (hidden, student[1])), grads(clean, student[:2])
    torch.testing.assert_close(own, wanted)
    assert not own[0][~mask].any()


def test_nothing_counts() -> None:
    student = model(5, 3, 9)
    top = TopK.of(torch.randn(5, 9, dtype=torch.float64), 3)
    found = linear_sparse_divergence(*student[:2], top, mask=torch.zeros(5, dtype=torch.bool))
    assert [part.item() for part in found] == [0.0, 0.0, 0.0]
    assert not any(gradient.any() for gradient in grads(found.total, student[:2]))


def test_log_probabilities_may_come_in_another_precision() -> None:
    student = model(6, 4, 30)
    top = TopK.of(torch.randn(6, 30), 5)
    half = TopK(top.ids.int(), top.log_probs.half(), top.log_tail.half(), 30)
    found = linear_sparse_divergence(*student[:2], half).total
    same = TopK(half.ids.long(), half.log_probs.double(), half.log_tail.double(), 30)
    torch.testing.assert_close(found, sparse_loss("forward_kl", logits(*student[:2]), same, 1.0, None))


def test_places_of_any_shape() -> None:
    student = model(12, 3, 9)
    top = TopK.of(torch.randn(3, 4, 9, dtype=torch.float64), 2)
    flat = TopK(*(part.flatten(0, 1) for part in top[:3]), 9)  # type: ignore[arg-type]
    shaped = linear_sparse_divergence(student[0].view(3, 4, 3), student[1], top, mask=torch.ones(3, 4).bool())
    torch.testing.assert_close(tuple(shaped), tuple(linear_sparse_divergence(*student[:2], flat)))


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    student = model(3, 2, 7)
    top = TopK.of(torch.randn(3, 7, dtype=torch.float64), 2, 1.7)
    labels = torch.tensor([1, -1, 4])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_sparse_divergence(
            hidden,
            weight,
            top,
            student_bias=bias,
            divergence=name,
            temperature=1.7,
            labels=labels,
            label_weight=0.4,
            chunk=2,
            **OPTIONS[name],
        ).total

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_near_the_definition(name: str, dtype: torch.dtype, temperature: float) -> None:
    student = [(0.3 * part.detach()).to(dtype).requires_grad_() for part in model(40, 16, 70)]
    wide = [part.detach().double().requires_grad_() for part in student]
    top = TopK.of(2 * torch.randn(40, 70), 8, temperature)
    exact = TopK(top.ids, top.log_probs.double(), top.log_tail.double(), 70)
    labels = torch.randint(0, 70, (40,))
    options = {"divergence": name, "temperature": temperature, **OPTIONS[name]}
    found = linear_sparse_divergence(*student[:2], top, labels=labels, label_weight=0.5, chunk=16, **options)
    full = logits(*wide[:2])
    wanted = sparse_loss(name, full, exact, temperature, None) + 0.5 * LF.cross_entropy_loss(full, labels)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.total.item() == pytest.approx(wanted.item(), rel=tolerance)
    for own, true in zip(grads(found.total, tuple(student[:2])), grads(wanted, tuple(wide[:2])), strict=True):
        assert own.dtype == dtype
        assert (own.double() - true).norm() < tolerance * true.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda top: top._replace(ids=top.ids + 8), r"top.ids: .*found 1[0-9].*wanted 0 to 8.*tokenizer"),
        (lambda top: top._replace(ids=top.ids - 9), r"top.ids: .*found -[1-9].*wanted 0 to 8"),
        (lambda top: top._replace(ids=top.ids.flip(1)), "top.ids: .*ascending.*TopK.of"),
        (lambda top: top._replace(ids=top.ids[:, :1].expand(-1, 3)), "top.ids: .*distinct"),
        (lambda top: top._replace(ids=top.ids.float()), "top.ids: .*integers; found torch.float32"),
        (lambda top: top._replace(ids=top.ids[:4]), r"top.ids: .*found \[4\].*wanted \[5\]"),
        (lambda top: top._replace(log_tail=top.log_tail[:4]), r"top.log_tail: .*found \[4\]"),
        (lambda top: top._replace(log_probs=top.log_probs[:, :2]), r"top.log_probs: .*found \[5, 2\].*\[5, 3\]"),
        (lambda top: top._replace(log_probs=top.log_probs.long()), "top.log_probs: .*floating"),
    ],
)
def test_a_teacher_that_does_not_fit_is_named(change, message: str) -> None:  # type: ignore[no-untyped-def]
    student = model(5, 3, 9)
    top = TopK.of(torch.randn(5, 9, dtype=torch.float64), 3)
    with pytest.raises(TensorError, match=message):
        linear_sparse_divergence(*student[:2], change(top))
