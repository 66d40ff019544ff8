from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import TensorError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.feature.fitnets import FitNets, fitnets_loss


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (3, 5, 2, 4), (3, 5, 2, 2, 2)])
def test_equals_the_paper(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(2, *shape).double()
    squares = [0.5 * (s - t) ** 2 for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    assert fitnets_loss(student, teacher).item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)


def test_equal_features_cost_nothing() -> None:
    feature = torch.randn(2, 3, 4, 4)
    assert fitnets_loss(feature, feature) == 0


def test_mask_over_the_places_of_a_map() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 4).double()
    counts = torch.rand(2, 4, 4) < 0.5
    squares = 0.5 * (student - teacher).square().permute(0, 2, 3, 1)[counts]
    torch.testing.assert_close(fitnets_loss(student, teacher, mask=counts), squares.mean())


def test_regressor_is_the_callers_affair() -> None:
    with pytest.raises(TensorError, match=r"student_feature.*\[2, 3, 8, 8\].*\[2, 6, 8, 8\]"):
        fitnets_loss(torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8))


def test_a_map_and_tokens_meet_as_maps() -> None:
    """A convolutional student learns a transformer's tokens as a map, and the other way round."""
    loss = FitNets("layer")
    student = Trace(None, {"layer": torch.randn(2, 4, 6, 6)})
    teacher = Trace(None, {"layer": torch.randn(2, 17, 8)})
    loss.setup(student, teacher, Batch(torch.zeros(2, 1)), DataInfo())
    assert isinstance(loss.regressor, nn.Conv2d)
    hint = teacher["layer"][:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    wanted = fitnets_loss(loss.regressor(student["layer"]), hint)
    torch.testing.assert_close(loss(student, teacher, Batch(torch.zeros(2, 1))), wanted)
    loss.setup(teacher, student, Batch(torch.zeros(2, 1)), DataInfo())
    assert loss(teacher, student, Batch(torch.zeros(2, 1))).isfinite()  # the smaller map: the hint is pooled
