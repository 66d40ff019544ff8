from __future__ import annotations

from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.response.wkd_l import WKDL, class_costs, wkd_l_loss
from tests.objectives.reference import mean, softmax
from tests.objectives.test_classes import make_batch

PARITY = Path(__file__).parents[2] / "parity" / "wkd_l_wkd.npz"


def transported(a: list[float], b: list[float], cost: list[list[float]], epsilon: float, iterations: int) -> float:
    """Sinkhorn's iterations on plain numbers, columns first."""
    n = range(len(a))
    kernel = [[exp(-c / epsilon) for c in row] for row in cost]
    u = [1.0] * len(a)
    for _ in range(iterations):
        v = [b[j] / sum(kernel[i][j] * u[i] for i in n) for j in n]
        u = [a[i] / sum(kernel[i][j] * v[j] for j in n) for i in n]
    return sum(u[i] * kernel[i][j] * v[j] * cost[i][j] for i in n for j in n)


def costs(classes: int) -> Tensor:
    return class_costs(torch.randn(classes, 8).double())


@pytest.mark.parametrize(("temperature", "epsilon", "iterations"), [(1.0, 0.05, 10), (4.0, 0.5, 3)])
def test_equals_the_paper(temperature: float, epsilon: float, iterations: int) -> None:
    student, teacher = 2 * torch.randn(2, 4, 6).double()
    labels, cost = torch.randint(0, 6, (4,)), costs(6)
    wanted = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        rest = [c for c in range(6) if c != y]
        a, b = (softmax([z[c] for c in rest], temperature) for z in (s, t))
        between = [[float(cost[i, j]) for j in rest] for i in rest]
        target = -softmax(t)[y] * log(softmax(s)[y])
        wanted.append(target + 3 * transported(a, b, between, epsilon, iterations))
    options: dict[str, Any] = {"temperature": temperature, "epsilon": epsilon, "iterations": iterations}
    found = wkd_l_loss(student, teacher, labels, cost, gamma=3.0, **options)
    assert found.item() == pytest.approx(mean(wanted), rel=1e-9)


def test_a_mistake_among_like_classes_costs_less() -> None:
    """The student believes in a class like the teacher's, or in one unlike it; a divergence could not tell."""
    cost = torch.tensor([[0.0, 0.5, 0.5, 0.5], [0.5, 0.0, 0.05, 0.5], [0.5, 0.05, 0.0, 0.5], [0.5, 0.5, 0.5, 0.0]])
    teacher = torch.tensor([[9.0, 6.0, 0.0, 0.0]])
    like, unlike = (
        wkd_l_loss(torch.tensor([row]), teacher, torch.tensor([0]), cost, temperature=1.0).item()
        for row in ([9.0, 0.0, 6.0, 0.0], [9.0, 0.0, 0.0, 6.0])
    )
    assert like < 0.2 * unlike


def test_costs_are_those_of_the_authors() -> None:
    with np.load(PARITY) as file:
        for i in range(4):
            found = class_costs(torch.from_numpy(file[f"{i}/weight"]))
            torch.testing.assert_close(found, torch.from_numpy(file[f"{i}/input/cost"]), rtol=1e-9, atol=1e-12)
        found = class_costs(torch.from_numpy(file["0/cka/rows"]))
        torch.testing.assert_close(found, torch.from_numpy(file["0/cka/wanted"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_sure_predictions_stay_finite(scale: float) -> None:
    student, teacher = scale * torch.randn(2, 5, 12)
    student.requires_grad_()
    value = wkd_l_loss(student, teacher, torch.arange(5), 1 - torch.eye(12), epsilon=0.005)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_images_of_each_class_are_compared() -> None:
    """Two batches, some samples without a label; the first two images of each of two classes count."""
    features, labels = torch.randn(8, 3), torch.tensor([0, 1, -1, 1, 0, 1, 0, -1])
    batch, logits = make_batch(), torch.zeros(8, 2)

    def answers():  # type: ignore[no-untyped-def]
        for part in (slice(0, 4), slice(4, 8)):
            yield Trace(None, {"penultimate": features[part]}), batch.replace(labels=labels[part])

    objective = WKDL("cka", images=2)
    trace = Trace(None, {"logits": logits, "penultimate": features})
    objective.setup(trace, trace, batch, DataInfo(answers=answers))
    wanted = class_costs(torch.stack([features[[0, 4]], features[[1, 3]]]))
    torch.testing.assert_close(objective.cost, wanted)
    labels[[0, 4]] = -1
    with pytest.raises(ConfigError, match="too few images"):
        WKDL("cka").setup(trace, trace, batch, DataInfo(answers=answers))


def test_what_it_refuses() -> None:
    logits = torch.randn(2, 3)
    with pytest.raises(TensorError, match="cost"):
        wkd_l_loss(logits, logits, torch.tensor([0, 1]), torch.zeros(2, 2))
    with pytest.raises(TensorError, match="labels"):
        wkd_l_loss(logits, logits, None, torch.zeros(3, 3))
    with pytest.raises(ConfigError, match="relations"):
        WKDL("kernel")  # type: ignore[arg-type]
