from __future__ import annotations

from math import exp, sqrt

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.objectives.feature.proc_kd import ProCKD, proc_kd_loss
from limbeck.objectives.parts.prototypes import Prototypes, vlad
from limbeck.objectives.response.cross_entropy import cross_entropy_loss
from tests.objectives.reference import dot
from tests.objectives.test_classes import Net, make, make_batch

LAYERS = ["layer1", "layer2", "layer3"]


def test_the_sum_written_out() -> None:
    mine, told = torch.randn(2, 3, 5).double()
    labels = torch.tensor([0, 4, 2])
    student, teacher = torch.randn(2, 3, 4, 6).double()
    distance = 0.0
    for s, t in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True):
        distance += sum((a / sqrt(dot(s, s)) - b / sqrt(dot(t, t))) ** 2 for a, b in zip(s, t, strict=True)) / 12
    wanted = cross_entropy_loss(mine, labels) + cross_entropy_loss(told, labels) + 0.7 * distance
    torch.testing.assert_close(proc_kd_loss(mine, told, labels, student, teacher, features=0.7), wanted)


def test_vlad_written_out() -> None:
    rows, centres = torch.randn(2, 5, 3).double(), torch.randn(4, 3).double()
    assignment = torch.randn(2, 5, 4).double().softmax(-1)
    for i in range(2):
        vectors = []
        for k in range(4):
            v = [
                sum(float(assignment[i, n, k]) * float(rows[i, n, d] - centres[k, d]) for n in range(5))
                for d in range(3)
            ]
            vectors += [x / sqrt(dot(v, v)) for x in v]
        wanted = torch.tensor([x / sqrt(dot(vectors, vectors)) for x in vectors]).double()
        torch.testing.assert_close(vlad(rows, centres, assignment)[i], wanted)


def test_vlad_of_one_centre_is_the_sum_of_the_gaps() -> None:
    rows, centre = torch.randn(2, 5, 3), torch.randn(1, 3)
    wanted = (rows - centre).sum(1)
    torch.testing.assert_close(vlad(rows, centre, torch.ones(2, 5, 1)), wanted / wanted.norm(dim=1, keepdim=True))


def test_places_are_rebuilt_from_prototypes_like_them() -> None:
    prototypes, places = Prototypes(6, 4, 3).double(), torch.randn(2, 7, 4).double()
    asked, rebuilt = prototypes.recall(places)
    known = prototypes.encode(prototypes.centres)
    weights = [exp(float((asked[0, 0] @ m).detach())) for m in known]
    wanted = sum(w / sum(weights) * m for w, m in zip(weights, known, strict=True))
    torch.testing.assert_close(rebuilt[0, 0], wanted)
    torch.testing.assert_close(torch.softmax(asked @ known.T, -1).sum(-1), torch.ones(2, 7).double())
    assert prototypes.augment(places).shape == places.shape


def test_equal_prototypes_rebuild_every_place_alike() -> None:
    prototypes = Prototypes(6, 4, 5)
    with torch.no_grad():
        prototypes.centres.copy_(torch.randn(1, 4).expand(5, 4))
    _, rebuilt = prototypes.recall(torch.randn(2, 7, 4))
    wanted = prototypes.encode(prototypes.centres[:1])
    torch.testing.assert_close(rebuilt, wanted.expand(2, 7, 4))


@pytest.mark.parametrize("number", [1, 3, 72])
def test_any_number_of_prototypes(number: int) -> None:
    assert make(ProCKD(teacher_tap=LAYERS, number=number))(make_batch()).total.isfinite()


class Wide(Net):
    """A teacher of 40 classes."""

    def __init__(self) -> None:
        super().__init__(6)
        self.fc = nn.Linear(24, 40)


def test_the_teacher_may_know_other_classes() -> None:
    """Nothing of its answers is used, so it stops before them."""
    loss = ProCKD(teacher_tap=LAYERS)
    distiller = Distiller(Net(4), loss, Wide()).setup(make_batch())
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.01)
    seen = []
    for _ in range(20):
        optimizer.zero_grad()
        total = distiller(make_batch()).total
        total.backward()
        optimizer.step()
        seen.append(total.item())
    assert seen[-1] < 0.8 * seen[0]
    assert distiller.student.fc.weight.grad.any()
    assert distiller.student.layer1[0].weight.grad.any()


def test_three_layers_are_taken_evenly_spaced() -> None:
    loss = ProCKD("layer3", ["layer1", "layer1.0", "layer2", "layer2.0", "layer3.0", "layer3"])
    distiller = make(loss)
    student, teacher = distiller.traces(make_batch())
    own, other = loss._places(student, teacher)
    assert [tuple(t.shape) for t in (own, *other)] == [(8, 4, 16), (8, 4, 6), (8, 4, 12), (8, 4, 24)]
    torch.testing.assert_close(other[2], teacher["layer3"].flatten(2).mT)


def test_samples_without_a_label_do_not_count() -> None:
    loss = ProCKD(teacher_tap=LAYERS)
    distiller, batch = make(loss), make_batch()
    some = batch.replace(labels=torch.tensor([0, 1, 2, 3, -1, -1, -1, -1]))
    fewer = Batch(batch.inputs[:4], labels=some.labels[:4])
    distiller.eval()
    torch.testing.assert_close(distiller(some).total, distiller(fewer).total)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="number"):
        ProCKD(number=0)
    distiller = make(ProCKD(teacher_tap=LAYERS))
    with pytest.raises(DataError, match=r"batch\.labels.*\[7\]"):
        distiller(make_batch().replace(labels=torch.zeros(7, dtype=torch.long)))
    with pytest.raises(TensorError, match="names no class"):
        distiller(make_batch().replace(labels=torch.full((8,), 9)))
