from __future__ import annotations

from math import exp, log, sqrt

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import TensorError
from limbeck.core.trace import Trace
from limbeck.objectives import TRG
from limbeck.objectives.relation.trg import trg_loss

Rows = list[list[float]]


def softmax(row: list[float]) -> list[float]:
    powers = [exp(v - max(row)) for v in row]
    return [p / sum(powers) for p in powers]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def context(x: Rows) -> Rows:
    return [softmax([dot(p, q) / sqrt(len(p)) for q in x]) for p in x]


def squares(x: Rows) -> Rows:
    return [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in x] for p in x]


def adjacency(x: Rows, by: Rows, k: int) -> Rows:
    """A_ij where i is of the k nearest to j in the graph of ``by``."""
    d, near, n = squares(x), squares(by), len(x)
    sigma = sum(map(sum, d)) / (n * (n - 1))
    chosen = [sorted((i for i in range(n) if i != j), key=lambda i: near[i][j])[:k] for j in range(n)]
    return [[exp(-d[i][j] / (2 * sigma)) if i in chosen[j] else 0.0 for j in range(n)] for i in range(n)]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(("own", "from_teacher"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("batch", "places", "k"), [(3, 4, 3), (2, 3, 16)])
def test_equals_its_equations(batch: int, places: int, k: int, own: bool, from_teacher: bool) -> None:
    s, t = torch.randn(batch, places, 5).double(), torch.randn(batch, places, 3).double()
    z = torch.randn(batch, places, 4).double(), torch.randn(batch, places, 4).double()
    gaps = [
        (a - b) ** 2
        for x, y in zip(s.tolist(), t.tolist(), strict=True)
        for p, q in zip(context(x), context(y), strict=True)
        for a, b in zip(p, q, strict=True)
    ]
    nodes, others = s.flatten(0, 1).tolist(), t.flatten(0, 1).tolist()
    graphs = adjacency(nodes, nodes if own else others, k), adjacency(others, others, k)
    rows = zip(*(reversed(graphs) if from_teacher else graphs), strict=True)
    local = [kl(softmax(p), softmax(q)) for p, q in rows]
    a, b = (torch.nn.functional.normalize(v.flatten(0, 1), dim=1).tolist() for v in z)
    contrast = [-log(softmax([dot(p, q) / 0.2 for q in b])[i]) for i, p in enumerate(a)]
    wanted = [sum(v) / len(v) for v in (gaps, local, contrast)]
    options = {"neighbours": k, "own_neighbours": own, "from_teacher": from_teacher, "tau": 0.2}
    for i, value in enumerate(wanted):
        weights = tuple(float(i == j) for j in range(3))
        assert trg_loss(s, t, z, weights=weights, **options).item() == pytest.approx(value, rel=1e-9)  # type: ignore[arg-type]
    total = 0.3 * wanted[0] + 2.0 * wanted[1] + 0.7 * wanted[2]
    assert trg_loss(s, t, z, weights=(0.3, 2.0, 0.7), **options).item() == pytest.approx(total, rel=1e-9)  # type: ignore[arg-type]


def test_equal_tokens_cost_nothing_but_the_contrast_with_themselves() -> None:
    s, z = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 6).double()
    assert trg_loss(s, s).item() == pytest.approx(0.0, abs=1e-12)
    costs = [trg_loss(s, s, (z, z), tau=tau).item() for tau in (1.0, 0.5, 0.1)]
    assert costs[0] > costs[1] > costs[2] > 0


def test_rotated_student_tokens_have_the_same_context() -> None:
    s, t = torch.randn(2, 4, 5).double(), torch.randn(2, 4, 3).double()
    turned = s @ torch.linalg.qr(torch.randn(5, 5).double())[0]
    torch.testing.assert_close(trg_loss(turned, t), trg_loss(s, t))


def test_a_far_token_changes_other_rows_by_their_normalisation_only() -> None:
    """It is nobody's neighbour, so it adds exp(0) to each row; rows then differ from before by that alone."""
    near = torch.randn(1, 5, 2).double()
    far = torch.cat([near, torch.full((1, 1, 2), 100.0).double()], dim=1)
    t = torch.randn(1, 6, 2).double()
    t[0, 5] = 100.0
    options = {"neighbours": 2, "sigma": 1.0, "weights": (0.0, 1.0, 0.0), "own_neighbours": True}

    def rows(x: Tensor, extra: int) -> Tensor:
        d = torch.cdist(x[0, :5], x[0, :5]).square()
        close = torch.zeros(5, 5, dtype=torch.bool)
        close.scatter_(1, (d + 1e9 * torch.eye(5)).topk(2, dim=1, largest=False).indices, True)
        a = (-d / 2).exp() * close.T
        return torch.cat([a, torch.zeros(5, extra)], dim=1).log_softmax(dim=1)

    for extra, (s, teacher) in ((0, (near, t[:, :5])), (1, (far, t))):
        a, b = rows(s, extra), rows(teacher, extra)
        wanted = (a.exp() * (a - b)).sum() / (5 + extra)
        # The far token's own row is that of the teacher's: its two nearest have e^-10000 = 0.
        torch.testing.assert_close(trg_loss(s, teacher, **options), wanted, rtol=1e-9, atol=1e-12)


def test_masked_tokens_are_left_out() -> None:
    s, t = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 3).double()
    z = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 4).double()
    mask = torch.tensor([[True, False, True, True, True]] * 2)
    kept = mask[0]
    wanted = trg_loss(s[:, kept], t[:, kept], (z[0][:, kept], z[1][:, kept]), neighbours=3)
    torch.testing.assert_close(trg_loss(s, t, z, neighbours=3, mask=mask), wanted)
    one = trg_loss(s[:1], t[:1], (z[0][:1], z[1][:1]), neighbours=3)
    torch.testing.assert_close(trg_loss(s, t, z, neighbours=3, mask=torch.tensor([True, False])), one)


def test_the_same_places_of_both_are_drawn_and_maps_are_aligned() -> None:
    student, teacher = torch.randn(2, 4, 3, 3), torch.randn(2, 6, 6, 6)
    traces = Trace(None, {"stages:-1": student}), Trace(None, {"stages:-1": teacher})
    objective, batch = TRG(samples=4, neighbours=2, weights=(1.0, 1.0, 1.0)), Batch(student, progress=1.0)
    objective.setup(*traces, batch, None)  # type: ignore[arg-type]
    torch.manual_seed(0)
    found = objective(*traces, batch)
    torch.manual_seed(0)
    drawn = torch.randperm(9)[:4]
    s = student.flatten(2).transpose(1, 2)
    t = torch.nn.functional.avg_pool2d(teacher, 2).flatten(2).transpose(1, 2)
    to_s, to_t = objective.ready("embed")
    wanted = trg_loss(s, t, (to_s(s), to_t(t)), positions=drawn, neighbours=2, tau=0.07, weights=(1.0, 1.0, 1.0))
    torch.testing.assert_close(found, wanted)


def test_without_weights_nothing_is_left_but_what_stands_beside_it() -> None:
    student, teacher = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 6, 3, 3)
    traces = Trace(None, {"stages:-1": student}), Trace(None, {"stages:-1": teacher})
    objective, batch = TRG(weights=(0.0, 0.0, 0.0)), Batch(student)
    objective.setup(*traces, batch, None)  # type: ignore[arg-type]
    value = objective(*traces, batch)
    value.backward()
    assert value == 0
    assert not student.grad.any()
    assert objective.card.with_labels == {"cross_entropy": 1.0, "kd": 1.0}


def test_other_places_are_refused() -> None:
    with pytest.raises(TensorError, match="differ in shape"):
        trg_loss(torch.randn(2, 4, 3), torch.randn(2, 5, 3))
