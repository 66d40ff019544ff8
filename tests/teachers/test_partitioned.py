"""Who teaches which sample, against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.teachers.partitioned import PartitionedTeachers, surest


def said(members: int = 3, size: int = 30, classes: int = 4) -> torch.Tensor:
    return torch.randn(members, size, classes, generator=torch.Generator().manual_seed(3))


def test_the_choice_is_that_of_plain_loops() -> None:
    logits, labels = said(), torch.arange(30) % 4
    p = logits.softmax(-1)
    for i in range(30):
        of_label = [float(p[k, i, labels[i]]) for k in range(3)]
        of_any = [float(p[k, i].max()) for k in range(3)]
        assert int(surest(logits, labels)[i]) == of_label.index(max(of_label))
        assert int(surest(logits)[i]) == of_any.index(max(of_any))
    assert torch.equal(surest(logits, nn.functional.one_hot(labels, 4).float()), surest(logits, labels))


def test_of_equals_and_of_samples_without_a_label_the_first_counts() -> None:
    logits = said(members=1).expand(3, -1, -1)
    assert surest(logits).max() == 0
    assert surest(said(), torch.full((30,), -1)).max() == 0


def test_the_logits_are_the_chosen_members() -> None:
    torch.manual_seed(0)
    members = [nn.Linear(5, 4) for _ in range(3)]
    teacher, batch = PartitionedTeachers(members), Batch(torch.randn(9, 5), torch.arange(9) % 4)
    teacher.attach(("logits",), batch)
    trace = teacher(batch)
    for i, chosen in enumerate(trace.taps["chosen"].tolist()):
        torch.testing.assert_close(trace.logits[i], members[chosen](batch.inputs[i]).detach())
    with pytest.raises(DataError, match="labels"):
        teacher(batch.replace(labels=None))
    teacher.supervised = False
    assert teacher(batch.replace(labels=None)).logits.shape == (9, 4)
    with pytest.raises(DataError, match="whole samples"):
        teacher(Batch(torch.randn(2, 3, 5)))
