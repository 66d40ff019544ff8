from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.pairing import pair_layers
from limbeck.core.trace import Trace
from limbeck.objectives import PKD
from limbeck.objectives.feature.pkd import pkd_loss


def reference(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for s_sample, t_sample in zip(student.tolist(), teacher.tolist(), strict=True):
        for s, t in zip(s_sample, t_sample, strict=True):
            s_size, t_size = sqrt(sum(v * v for v in s)), sqrt(sum(v * v for v in t))
            total += sum((a / s_size - b / t_size) ** 2 for a, b in zip(s, t, strict=True))
    return total / len(student)


@pytest.mark.parametrize("shape", [(1, 1, 3), (4, 5, 6)])
def test_equals_the_paper(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape).double(), torch.randn(shape).double()
    assert pkd_loss(student, teacher).item() == pytest.approx(reference(student, teacher), rel=1e-12)


def test_length_does_not_matter() -> None:
    states = torch.randn(3, 2, 4)
    assert pkd_loss(7 * states, states).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("mapping", "wanted"), [("skip", [2, 4, 6, 8, 10]), ("last", [7, 8, 9, 10, 11])])
def test_layers_are_those_of_the_paper(mapping: str, wanted: list[int]) -> None:
    """Six student layers, twelve teacher layers; the last of both is not compared."""
    assert [j + 1 for _, j in pair_layers(6, 12, mapping)][:-1] == wanted  # type: ignore[arg-type]
    student = [torch.randn(2, 4, 8) for _ in range(6)]
    teacher = [torch.randn(2, 4, 8) for _ in range(12)]
    objective, batch = PKD(mapping=mapping), Batch(torch.zeros(2, 4))  # type: ignore[arg-type]
    traces = Trace(None, {"blocks": student}), Trace(None, {"blocks": teacher})
    objective.setup(*traces, batch, None)  # type: ignore[arg-type]
    states = [torch.stack([f[:, 0] for f in fs], dim=1) for fs in (student[:-1], [teacher[j - 1] for j in wanted])]
    torch.testing.assert_close(objective(*traces, batch), pkd_loss(*states))


def test_a_padded_front_is_skipped() -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[False, True, True], [True, True, False]])

    def loss(s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        objective, batch = PKD(["a", "b"]), Batch(torch.zeros(2, 3), mask=mask)
        traces = Trace(None, {"a": s, "b": s}), Trace(None, {"a": t, "b": t})
        objective.setup(*traces, batch, None)  # type: ignore[arg-type]
        return objective(*traces, batch)

    shifted = [torch.stack([f[0, [1, 2, 0]], f[1]]) for f in (student, teacher)]
    torch.testing.assert_close(loss(student, teacher, mask), loss(*shifted, None))


def test_other_widths_get_a_projector_and_one_block_is_refused() -> None:
    def model(width: int, depth: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), *(nn.Linear(width, width) for _ in range(depth)))

    objective, batch = PKD(["0", "1"], ["0", "3"]), Batch(torch.randn(5, 3))
    Distiller(model(4, 1), objective, model(6, 3)).setup(batch)(batch).total.backward()
    assert [tuple(p.shape) for p in objective.parameters()] == [(6, 4), (6,)]
    with pytest.raises(ConfigError, match="there is no other"):
        Distiller(model(4, 1), PKD("1"), model(6, 3)).setup(batch)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(TensorError, match="differ in shape"):
        pkd_loss(torch.randn(2, 3, 4), torch.randn(2, 3, 5))
