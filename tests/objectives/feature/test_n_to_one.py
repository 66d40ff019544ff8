from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.feature.n_to_one import NToOne, n_to_one_loss, same_size
from tests.objectives.reference import mean
from tests.objectives.test_classes import Net, make, make_batch

PARITY = Path(__file__).parents[2] / "parity" / "n_to_one_norm.npz"


@pytest.mark.parametrize("number", [1, 3])
def test_equals_the_paper(number: int) -> None:
    student, teacher = torch.randn(4, number * 5).double(), torch.randn(4, 5).double()
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        parts = [s[5 * n : 5 * n + 5] for n in range(number)]
        wanted.append(sum(mean([(a - b) ** 2 for a, b in zip(part, t, strict=True)]) for part in parts))
    assert n_to_one_loss(student, teacher).item() == pytest.approx(mean(wanted), rel=1e-9)


def test_tokens_and_maps_are_places() -> None:
    tokens, told = torch.randn(2, 6, 8), torch.randn(2, 6, 4)
    maps, told_map = (x.transpose(1, 2).unflatten(2, (2, 3)) for x in (tokens, told))
    torch.testing.assert_close(n_to_one_loss(tokens, told), n_to_one_loss(maps, told_map))
    counts = torch.arange(6) < torch.tensor([[4], [2]])
    wanted = (4 * n_to_one_loss(tokens[:1, :4], told[:1, :4]) + 2 * n_to_one_loss(tokens[1:, :2], told[1:, :2])) / 6
    torch.testing.assert_close(n_to_one_loss(tokens, told, mask=counts), wanted)


def test_a_larger_map_of_the_teacher_is_pooled_as_by_the_authors() -> None:
    with np.load(PARITY) as file:
        student, teacher = (torch.from_numpy(file[f"0/pooled/{side}"]) for side in ("student", "teacher"))
        wanted = float(file["0/pooled/wanted"])
    assert n_to_one_loss(*same_size(student, teacher)).item() == pytest.approx(wanted, rel=1e-9)


def test_zero_where_every_segment_is_the_teacher() -> None:
    teacher = torch.randn(2, 3, 4, 4)
    assert n_to_one_loss(teacher.repeat(1, 5, 1, 1), teacher) == 0
    assert n_to_one_loss(teacher.repeat_interleave(5, dim=1), teacher) > 0


def test_objective() -> None:
    loss, teacher, batch = NToOne("layer2", number=3), Net(6), make_batch()
    distiller = make(loss, teacher)
    student, inputs = distiller.student, batch.inputs
    assert isinstance(student, Net)
    student_map, teacher_map = student.layer2(student.layer1(inputs)), teacher.layer2(teacher.layer1(inputs))
    assert loss.projector is not None
    torch.testing.assert_close(distiller(batch).total, n_to_one_loss(loss.projector(student_map), teacher_map))
    assert loss.projector(student_map).shape[1] == 3 * teacher_map.shape[1]


def test_misuse_is_refused() -> None:
    with pytest.raises(TensorError, match="student_feature"):
        n_to_one_loss(torch.randn(2, 7), torch.randn(2, 3))
    with pytest.raises(TensorError, match="student_feature"):
        n_to_one_loss(torch.randn(2, 6, 4, 4), torch.randn(2, 3, 8, 8))
    with pytest.raises(ConfigError, match="number"):
        NToOne(number=0)
