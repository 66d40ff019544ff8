from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.feature.cwd import CWD, cwd_loss
from tests.objectives.reference import kl, mean, softmax


def written_out(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """The paper's equation over maps ``[B, C, H, W]``, channel by channel."""
    values = []
    for s, t in zip(student.flatten(2).tolist(), teacher.flatten(2).tolist(), strict=True):
        channels = zip(s, t, strict=True)
        values.append(mean([kl(softmax(b, temperature), softmax(a, temperature)) for a, b in channels]))
    return temperature**2 * mean(values)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equals_the_paper(temperature: float) -> None:
    student, teacher = torch.randn(2, 3, 4, 2, 5).double()
    found = cwd_loss(student, teacher, temperature=temperature)
    assert found.item() == pytest.approx(written_out(student, teacher, temperature), rel=1e-9)


def test_a_channel_is_a_distribution_over_places() -> None:
    """A shift of a channel changes nothing, a factor does."""
    student, teacher = torch.randn(2, 2, 3, 4, 4).double()
    shifted = student + torch.randn(2, 3, 1, 1).double()
    torch.testing.assert_close(cwd_loss(shifted, teacher), cwd_loss(student, teacher))
    assert cwd_loss(2 * teacher, teacher) > 0
    one_hot = torch.tensor([[[[200.0, 0.0], [0.0, 0.0]]]])
    torch.testing.assert_close(cwd_loss(torch.zeros(1, 1, 2, 2), one_hot, temperature=1.0), torch.tensor(log(4.0)))


def test_tokens_are_places() -> None:
    student, teacher = torch.randn(2, 3, 6, 4)
    as_maps = cwd_loss(*(f.transpose(1, 2).unsqueeze(2) for f in (student, teacher)))
    torch.testing.assert_close(cwd_loss(student, teacher), as_maps)


def test_masked_places_are_not_there() -> None:
    student, teacher = torch.randn(2, 3, 4, 5, 2).double()
    counts = torch.tensor([[True] * 3 + [False] * 2, [False] * 5, [True] * 3 + [False] * 2])
    student.requires_grad_()
    found = cwd_loss(student, teacher, mask=counts)
    torch.testing.assert_close(found, cwd_loss(student[[0, 2], :, :3], teacher[[0, 2], :, :3]))
    found.backward()
    assert student.grad.isfinite().all()
    assert not student.grad[1].any()
    assert not student.grad[:, :, 3:].any()


def test_reductions() -> None:
    student, teacher = torch.randn(2, 3, 4, 2, 2)
    each = cwd_loss(student, teacher, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(each.mean(), cwd_loss(student, teacher))


def test_another_width_gets_a_projector_and_another_size_is_pooled() -> None:
    student, teacher = Trace(None, {"x": torch.randn(2, 3, 8, 8)}), Trace(None, {"x": torch.randn(2, 5, 4, 4)})
    batch, loss = Batch(torch.zeros(2)), CWD("x")
    loss.setup(student, teacher, batch, DataInfo())
    layer = loss.projectors[0]
    wanted = cwd_loss(layer(torch.nn.functional.avg_pool2d(student["x"], 2)), teacher["x"])
    torch.testing.assert_close(loss(student, teacher, batch), wanted)


def test_refusals() -> None:
    with pytest.raises(TensorError, match=r"student_feature.*\[2, 3, 4, 4\].*\[2, 5, 4, 4\]"):
        cwd_loss(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4))
    with pytest.raises(TensorError, match="student_feature"):
        cwd_loss(torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(ConfigError, match="temperature"):
        CWD(temperature=0.0)
