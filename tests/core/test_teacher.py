"""Teachers: frozen for good, fed what is meant for them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ModelError
from limbeck.core.teacher import FrozenTeacher, Teacher, as_teacher
from limbeck.core.trace import Trace


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("whole_in_evaluation", [False, True], ids=["train", "a part in training"])
def test_it_is_in_evaluation_whatever_it_was_given_in(whole_in_evaluation: bool) -> None:
    model, batch = net(), Batch(torch.randn(6, 4))
    if whole_in_evaluation:
        model.eval()
        model[1].train()
    teacher = FrozenTeacher(model)
    teacher.attach(("0", "logits"), batch)
    state = copy.deepcopy(model.state_dict())
    first, second = teacher(batch).logits, teacher(batch).logits
    assert torch.equal(first, second)
    model.train()  # somebody else's mistake, during training
    assert torch.equal(teacher(batch).logits, first)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_nothing_it_says_carries_a_gradient_and_its_flags_are_its_own() -> None:
    model, batch = net(), Batch(torch.randn(6, 4, requires_grad=True))
    model[0].requires_grad_(False)
    teacher = FrozenTeacher(model)
    teacher.attach(("0", "penultimate", "logits"), batch)
    trace = teacher(batch)
    assert not any(trace[tap].requires_grad for tap in ("0", "penultimate", "logits"))
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]


def test_it_sees_its_own_inputs_where_there_are_any() -> None:
    model = net()
    teacher, batch = FrozenTeacher(model), Batch(torch.randn(6, 4), teacher_inputs=(torch.randn(6, 4),))
    teacher.attach(("logits",), batch)
    assert torch.equal(teacher(batch).logits, model(batch.teacher_inputs[0]))


def test_attached_anew_it_listens_elsewhere_and_only_there() -> None:
    model, batch = net(), Batch(torch.randn(6, 4))
    teacher = FrozenTeacher(model)
    with pytest.raises(ModelError, match=r"not attached to any taps yet; call attach\(taps, batch\) first"):
        teacher(batch)
    teacher.attach(("0", "3"), batch)
    teacher.attach(("1",), batch)
    assert set(teacher(batch).taps) == {"1"}
    assert sum(len(m._forward_hooks) for m in model.modules()) == 1


def test_logits_are_where_one_says() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"aux": x, "main": x + 1}

    teacher, batch = FrozenTeacher(Two(), logits="main"), Batch(torch.zeros(2, 3))
    teacher.attach(("logits",), batch)
    assert torch.equal(teacher(batch).logits, torch.ones(2, 3))


def test_anything_that_answers_like_a_teacher_is_one() -> None:
    class Table:
        """What a cache would do: answers by sample id."""

        def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
            assert set(taps) <= {"logits"}

        def __call__(self, batch: Batch) -> Trace:
            return Trace(torch.eye(4)[batch.require("index")])

        def to(self, device: torch.device | str) -> Table:
            return self

    table = Table()
    assert isinstance(table, Teacher)
    assert as_teacher(table) is table
    assert isinstance(as_teacher(net()), FrozenTeacher)
    with pytest.raises(ModelError, match="teacher: not a teacher; found function; wanted a torch module, or an object"):
        as_teacher(lambda batch: batch)  # type: ignore[arg-type]
