"""The fused loss of two heads against limbeck's losses on full logits: values and all gradients, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import limbeck.functional as LF
from limbeck.kernels import linear_divergence
from tests.kernels.definitions import LOSSES, OPTIONS, logits, padded


def model(places: int, width: int, classes: int, spread: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and bias."""
    sizes = ((places, width), (classes, width), (classes,))
    parts = [(spread * torch.randn(*size, dtype=torch.float64)).requires_grad_() for size in sizes]
    return parts[0], parts[1], parts[2]


def grads(loss: Tensor, wanted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 13, 50, None])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loss_on_full_logits(name: str, chunk: int | None, temperature: float) -> None:
    student, teacher = model(13, 5, 37), model(13, 3, 37)
    mask = torch.rand(13) < 0.6
    found = linear_divergence(
        *student[:2],
        *teacher[:2],
        student_bias=student[2],
        teacher_bias=teacher[2],
        divergence=name,
        temperature=temperature,
        mask=mask,
        chunk=chunk,
        **OPTIONS[name],
    )
    wanted = LOSSES[name][1](logits(*student), logits(*teacher), temperature=temperature, mask=mask)
    torch.testing.assert_close(found.total, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.divergence, wanted.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads(found.total, student), grads(wanted, student), rtol=1e-10, atol=1e-12)
    assert not any(part.requires_grad for part in found[1:])
    assert found.cross_entropy == 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_labels_go_through_the_same_pass(name: str, temperature: float) -> None:
    student, teacher = model(11, 4, 29), model(11, 6, 29)
    mask, labels = torch.rand(11) < 0.7, torch.randint(-4, 29, (11,))
    labels[0], mask[0] = -100, True
    labels[1], mask[1] = 99, False  # of a place that does not count nothing is asked
    found = linear_divergence(
        *student[:2],
        *teacher[:2],
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
    divergence = LOSSES[name][1](full, logits(*teacher[:2]), temperature=temperature, mask=mask)
    cross_entropy = LF.cross_entropy_loss(full, labels.masked_fill(~mask, -1), mask=mask)
    torch.testing.assert_close(found.divergence, divergence.detach())
    torch.testing.assert_close(found.cross_entropy, cross_entropy.detach())
    wanted = 0.7 * divergence + 0.3 * cross_entropy
    torch.testing.assert_close(found.total, wanted)
    torch.testing.assert_close(grads(found.total, student[:2]), grads(wanted, student[:2]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", [(23, 31), (31, 23)])
def test_padded_vocabularies(name: str, sizes: tuple[int, int]) -> None:
    student, teacher = model(7, 4, sizes[0]), model(7, 4, sizes[1])
    shared = min(sizes)
    found = linear_divergence(
        *student[:2],
        *teacher[:2],
        student_bias=student[2],
        teacher_bias=teacher[2],
        divergence=name,
        **OPTIONS[name],
    ).total
    rows = [padded(logits(*m)[:, :shared], max(sizes)) for m in (student, teacher)]
    wanted = LOSSES[name][1](*rows, temperature=1.0)
    torch.testing.assert_close(found, wanted)
    own = grads(found, student)
    torch.testing.assert_close(own, grads(wanted, student), rtol=1e-10, atol=1e-12)
    assert not own[1][shared:].any()
    assert not own[2][shared:].any()


@pytest.mark.parametrize("name", LOSSES)
def test_classes_that_biases_rule_out(name: str) -> None:
    student, teacher = model(6, 4, 9), model(6, 4, 9)
    with torch.no_grad():
        for part in (student, teacher):
            part[2][-2:] = -math.inf
    found = linear_divergence(
        *student[:2],
        *teacher[:2],
        student_bias=student[2],
        teacher_bias=teacher[2],
        divergence=name,
        **OPTIONS[name],
    ).total
    rows = [padded(logits(*m)[:, :-2], 9) for m in (student, teacher)]
    wanted = LOSSES[name][1](*rows, temperature=1.0)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grads(found, student), grads(wanted, student), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_places_that_do_not_count_may_hold_anything(name: str) -> None:
    student, teacher = model(8, 4, 19), model(8, 4, 19)
    mask = torch.tensor([True, False] * 4)
    clean = linear_divergence(*student[:2], *teacher[:2], divergence=name, mask=mask, **OPTIONS[name]).total
    with torch.no_grad():
        spoilt = [m[0].clone() for m in (student, teacher)]
        spoilt[0][1], spoilt[0][3], spoilt[1][1], spoilt[1][5] = math.nan, math.inf, math.nan, -math.inf
    hidden = spoilt[0].requires_grad_()
    found = linear_divergence(
        hidden, student[1], spoilt[1], teacher[1], divergence=name, mask=mask, chunk=3, **OPTIONS[name]
    ).total
    torch.testing.assert_close(found, clean)
    own, wanted = grads(found, (hidden, student[1])), grads(clean, student[:2])
    torch.testing.assert_close(own, wanted)
    assert not own[0][~mask].any()


def test_a_place_that_counts_is_not_silenced() -> None:
    student, teacher = model(4, 3, 9), model(4, 3, 9)
    with torch.no_grad():
        student[0][2] = math.nan
    for name in LOSSES:
        assert linear_divergence(*student[:2], *teacher[:2], divergence=name).total.isnan()


def test_nothing_counts() -> None:
    student, teacher = model(5, 3, 9), model(5, 3, 9)
    labels = torch.full((5,), -100)
    found = linear_divergence(
        *student[:2], *teacher[:2], mask=torch.zeros(5, dtype=torch.bool), labels=labels, label_weight=1.0
    )
    assert [part.item() for part in found] == [0.0, 0.0, 0.0]
    assert not any(gradient.any() for gradient in grads(found.total, student[:2]))
    none = linear_divergence(student[0][:0], student[1], teacher[0][:0], teacher[1])
    assert none.total.item() == 0.0
    assert not grads(none.total, student[1:2])[0].any()


def test_the_callers_count_is_taken() -> None:
    student, teacher = model(6, 3, 9), model(6, 3, 9)
    labels, mask = torch.tensor([1, -1, 3, 4, -1, 5]), torch.tensor([True] * 5 + [False])
    given = {"mask": mask, "labels": labels, "label_weight": 0.5}
    own = linear_divergence(*student[:2], *teacher[:2], **given)
    for normalizer in (20, 20.0, torch.tensor(20), torch.tensor([20.0])):
        found = linear_divergence(*student[:2], *teacher[:2], normalizer=normalizer, **given)
        assert float(found.divergence) == pytest.approx(float(own.divergence) * 5 / 20)
        assert float(found.cross_entropy) == pytest.approx(float(own.cross_entropy) * 3 / 20)
        assert found.total.item() == pytest.approx((found.divergence + 0.5 * found.cross_entropy).item())
    full = logits(*student[:2])
    wanted = LF.kd_loss(full, logits(*teacher[:2]), temperature=1.0, mask=mask, reduction="sum")
    wanted = (wanted + 0.5 * LF.cross_entropy_loss(full, labels, mask=mask, reduction="sum")) / 20
    torch.testing.assert_close(grads(found.total, student[:2]), grads(wanted, student[:2]))


def test_micro_batches_add_up_with_one_count() -> None:
    student, teacher = model(10, 3, 9), model(10, 3, 9)
    whole = linear_divergence(*student[:2], *teacher[:2], divergence="jsd").total
    halves = [
        linear_divergence(student[0][p], student[1], teacher[0][p], teacher[1], divergence="jsd", normalizer=10).total
        for p in (slice(0, 7), slice(7, 10))
    ]
    torch.testing.assert_close(grads(sum(halves), student[:2]), grads(whole, student[:2]))


def test_places_of_any_shape() -> None:
    student, teacher = model(12, 3, 9), model(12, 3, 9)
    mask, labels = torch.rand(3, 4) < 0.5, torch.randint(0, 9, (3, 4))
    flat = linear_divergence(*student[:2], *teacher[:2], mask=mask.flatten(), labels=labels.flatten(), label_weight=1)
    shaped = linear_divergence(
        student[0].view(3, 4, 3),
        student[1],
        teacher[0].view(3, 4, 3),
        teacher[1],
        mask=mask,
        labels=labels,
        label_weight=1,
    )
    torch.testing.assert_close(tuple(shaped), tuple(flat))


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    student, teacher = model(3, 2, 5), model(3, 2, 5)
    labels = torch.tensor([1, -1, 4])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_divergence(
            hidden,
            weight,
            *teacher[:2],
            student_bias=bias,
            divergence=name,
            temperature=1.7,
            labels=labels,
            label_weight=0.4,
            chunk=2,
            **OPTIONS[name],
        ).total

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_near_the_definition(name: str, dtype: torch.dtype) -> None:
    student, teacher = model(40, 16, 70, spread=0.5), model(40, 16, 70, spread=0.5)
    half = [[part.detach().to(dtype).requires_grad_() for part in m] for m in (student, teacher)]
    wide = [[part.detach().double().requires_grad_() for part in m] for m in half]
    labels = torch.randint(0, 70, (40,))
    found = linear_divergence(
        *half[0][:2], *half[1][:2], divergence=name, labels=labels, label_weight=0.5, chunk=16, **OPTIONS[name]
    )
    assert found.total.dtype == torch.float32
    full = logits(*wide[0][:2])
    wanted = LOSSES[name][1](full, logits(*wide[1][:2]), temperature=1.0) + 0.5 * LF.cross_entropy_loss(full, labels)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.total.item() == pytest.approx(wanted.item(), rel=tolerance)
    for own, true in zip(grads(found.total, tuple(half[0][:2])), grads(wanted, tuple(wide[0][:2])), strict=True):
        assert own.dtype == dtype
        assert (own.double() - true).norm() < tolerance * true.norm()


def test_many_places_do_not_overflow_float16() -> None:
    hidden = torch.full((9000, 1), 30.0, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], dtype=torch.float16, requires_grad=True)
    # The sum over places is 270,000, which float16 does not hold; their mean is 30.
    linear_divergence(hidden, weight, -hidden, weight).total.backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[30.0], [-30.0]], dtype=torch.float16))


def test_only_what_is_wanted_has_a_gradient() -> None:
    student, teacher = model(6, 3, 9), model(6, 3, 9)
    whole = linear_divergence(*student[:2], *teacher[:2], student_bias=student[2]).total
    wanted = grads(whole, student)
    for place in range(3):
        parts = [part.detach().requires_grad_(number == place) for number, part in enumerate(student)]
        loss = linear_divergence(parts[0], parts[1], *teacher[:2], student_bias=parts[2]).total
        torch.testing.assert_close(grads(loss, (parts[place],))[0], wanted[place])
    linear_divergence(*student[:2], *teacher[:2], teacher_bias=teacher[2]).total.backward()
    assert all(part.grad is None for part in teacher)
