"""The Triton kernels against float64 definitions, on a GPU or through Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from torch import Tensor

import limbeck.functional as LF
from limbeck.core.top_k import TopK
from limbeck.kernels import linear_divergence, linear_sparse_divergence, operator, triton_rows
from tests.kernels.definitions import LOSSES, OPTIONS, logits, padded, sparse_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not triton_rows.AVAILABLE:
    pytest.skip("triton is not installed", allow_module_level=True)
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no GPU: set TRITON_INTERPRET=1 to run Triton's interpreter", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken whatever the device, in blocks so small that rows take several."""
    for name in ("linear_divergence", "linear_sparse_divergence"):
        monkeypatch.setattr(importlib.import_module(f"limbeck.kernels.{name}"), "rows_module", lambda _: triton_rows)
    monkeypatch.setattr(triton_rows, "BLOCK", 16)


def model(places: int, width: int, classes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Hidden states and head."""
    return [torch.randn(size, width, device=DEVICE).to(dtype).requires_grad_() for size in (places, classes)]


def check(found: Tensor, wanted: Tensor, own: list[Tensor], wide: list[Tensor], tolerance: float = 1e-5) -> None:
    """Value and gradients."""
    assert found.item() == pytest.approx(wanted.item(), rel=tolerance)
    pairs = zip(torch.autograd.grad(found, own), torch.autograd.grad(wanted, wide), strict=True)
    for gradient, true in pairs:
        assert (gradient.double() - true).norm() < tolerance * true.norm()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", LOSSES)
def test_dense(name: str, temperature: float, labelled: bool) -> None:
    student, teacher = model(9, 5, 37), model(9, 3, 41)
    wide = [part.detach().double().requires_grad_() for part in student]
    mask = torch.rand(9, device=DEVICE) < 0.7
    labels = torch.randint(-3, 37, (9,), device=DEVICE) if labelled else None
    options = {"divergence": name, "temperature": temperature, **OPTIONS[name]}
    found = linear_divergence(
        *student, *teacher, mask=mask, labels=labels, label_weight=0.4 * labelled, weight=0.7, chunk=4, **options
    )
    full = logits(*wide)
    other = padded(logits(*[part.detach().double() for part in teacher])[:, :37], 37)
    wanted = 0.7 * LOSSES[name][1](full, other, temperature=temperature, mask=mask)
    if labels is not None:
        wanted = wanted + 0.4 * LF.cross_entropy_loss(full, labels, mask=mask)
    check(found.total, wanted, student, wide)
    with torch.no_grad():
        again = linear_divergence(*student, *teacher, mask=mask, labels=labels, **options)
    torch.testing.assert_close(again.divergence, found.divergence)
    torch.testing.assert_close(again.cross_entropy, found.cross_entropy)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", LOSSES)
def test_sparse(name: str, temperature: float, labelled: bool) -> None:
    student = model(9, 5, 37)
    wide = [part.detach().double().requires_grad_() for part in student]
    top = TopK.of(2 * torch.randn(9, 35, device=DEVICE), 6, temperature)
    mask = torch.rand(9, device=DEVICE) < 0.7
    labels = torch.randint(-3, 35, (9,), device=DEVICE) if labelled else None
    if labels is not None:
        labels[0], mask[0] = top.ids[0, 1], True
    options = {"divergence": name, "temperature": temperature, **OPTIONS[name]}
    found = linear_sparse_divergence(
        *student, top, mask=mask, labels=labels, label_weight=0.4 * labelled, weight=0.7, chunk=4, **options
    )
    full = logits(*wide)[:, :35]
    exact = TopK(top.ids, top.log_probs.double(), top.log_tail.double(), 35)
    wanted = 0.7 * sparse_loss(name, full, exact, temperature, mask)
    if labels is not None:
        wanted = wanted + 0.4 * LF.cross_entropy_loss(full, labels, mask=mask)
    check(found.total, wanted, student, wide)


@pytest.mark.parametrize("name", LOSSES)
def test_classes_that_are_ruled_out_and_tails_of_none(name: str) -> None:
    student, teacher = model(4, 3, 20), model(4, 3, 20)
    bias = torch.zeros(20, device=DEVICE)
    bias[15:] = -torch.inf
    options = {"divergence": name, **OPTIONS[name]}
    wide = [part.detach().double().requires_grad_() for part in student]
    teacher_logits = logits(*[part.detach().double() for part in teacher])[:, :15]
    wanted = LOSSES[name][1](logits(*wide)[:, :15], teacher_logits, temperature=1.0)
    found = linear_divergence(*student, *teacher, student_bias=bias, teacher_bias=bias, **options).total
    check(found, wanted, student, wide)
    top = TopK.of(padded(teacher_logits, 20).float(), 15)
    wanted = LOSSES[name][1](logits(*wide)[:, :15], teacher_logits, temperature=1.0)
    found = linear_sparse_divergence(*student, top, student_bias=bias, **options).total
    check(found, wanted, student, wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_half_precision_stays_where_it_is(kind: str, dtype: torch.dtype) -> None:
    student, teacher = model(12, 4, 50, dtype), model(12, 4, 50, dtype)
    wide = [part.detach().double().requires_grad_() for part in student]
    labels = torch.randint(0, 50, (12,), device=DEVICE)
    options = {"labels": labels, "label_weight": 0.5, "chunk": 5}
    other = logits(*[part.detach().double() for part in teacher])
    if kind == "dense":
        found = linear_divergence(*student, *teacher, **options).total
        wanted = LOSSES["forward_kl"][1](logits(*wide), other, temperature=1.0)
    else:
        top = TopK.of(other, 4)
        found = linear_sparse_divergence(*student, top, **options).total
        wanted = sparse_loss("forward_kl", logits(*wide), top, 1.0, None)
    wanted = wanted + 0.5 * LF.cross_entropy_loss(logits(*wide), labels)
    check(found, wanted, student, wide, tolerance=0.02)


def test_float64_and_the_cpu_are_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert operator.rows_module(torch.zeros(1)).__name__.endswith("torch_rows")
    if torch.cuda.is_available():
        assert operator.rows_module(torch.zeros(1, device="cuda")) is triton_rows
        assert operator.rows_module(torch.zeros(1, device="cuda").double()) is not triton_rows
