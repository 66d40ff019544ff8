"""DHO against its own training step: the loss, every gradient, its prediction, and its search for alpha and beta."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.models import put_head
from limbeck.models.heads import dual_log_probabilities, search_dual
from limbeck.objectives.response.cross_entropy import CrossEntropy
from limbeck.objectives.response.dho import DHO

FILE = Path(__file__).parent / "dho_dho.npz"
with np.load(FILE, allow_pickle=False) as loaded:
    NUMBERS = dict(loaded)
CASES = ["0", "1"]


def part(prefix: str) -> dict[str, Tensor]:
    """The numbers below a prefix; parameters by the names they have here."""
    found = {k.removeprefix(prefix): v for k, v in NUMBERS.items() if k.startswith(prefix) and v.dtype.kind != "U"}
    for theirs, ours in (("ce_head", "2.ce"), ("kd_head", "2.kd"), ("body", "0")):
        found = {k.replace(theirs, ours): v for k, v in found.items()}
    return {k: torch.from_numpy(np.asarray(v)) for k, v in found.items()}


class Known(nn.Module):
    """A teacher whose answers are given."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, x: Tensor) -> Tensor:
        return self.answers[: len(x)]


@pytest.mark.parametrize("case", CASES)
def test_one_step(case: str) -> None:
    """As many samples with labels as without, so that the code's two means are twice the mean over all."""
    given, state = part(f"{case}/"), part(f"{case}/state/")
    features, classes = state["0.weight"].shape[0], state["2.ce.weight"].shape[0]
    student = nn.Sequential(nn.Linear(state["0.weight"].shape[1], features), nn.Tanh(), nn.Linear(features, classes))
    student.double()
    inputs = torch.cat([given["labelled"], given["unlabelled"]])
    labels = torch.cat([given["labels"], torch.full((len(given["unlabelled"]),), -1)])
    batch = Batch(inputs, labels)
    put_head(student, "dual", example=batch)
    student.load_state_dict({**student.state_dict(), **state})
    teacher = Known(torch.cat([given["teacher_labelled"], given["teacher_unlabelled"]]))
    losses = Distiller(student.train(), 0.5 * CrossEntropy() + 1.0 * DHO(), teacher).setup(batch)(batch)
    assert losses.total.item() == pytest.approx(float(NUMBERS[f"{case}/loss"]), rel=1e-6)
    losses.total.backward()
    for name, wanted in part(f"{case}/grad/").items():
        torch.testing.assert_close(student.get_parameter(name).grad, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_prediction_and_search(case: str) -> None:
    held = part(f"{case}/val/")
    ce, kd, labels = held["ce"], held["kd"], held["labels"]
    for alpha, beta, wanted in held["accuracies"].tolist():
        right = dual_log_probabilities(ce, kd, alpha, beta).argmax(dim=1) == labels
        assert 100 * right.double().mean().item() == pytest.approx(wanted)
    accuracy, alpha, beta = held["chosen"].tolist()
    assert search_dual(ce, kd, labels) == pytest.approx((alpha, beta))
    right = dual_log_probabilities(ce, kd, alpha, beta).argmax(dim=1) == labels
    assert 100 * right.double().mean().item() == pytest.approx(accuracy)
