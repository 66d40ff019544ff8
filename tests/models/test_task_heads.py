"""Heads of several tasks: what they answer, what bars a class, and how a model gets them."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import ModelError
from limbeck.models import load_model
from limbeck.models.task_heads import TaskHeads, several_tasks


def test_each_head_answers_and_classes_a_task_does_not_have_are_barred() -> None:
    heads, x = TaskHeads(4, [3, 2]), torch.randn(5, 4)
    said = heads(x)
    torch.testing.assert_close(said[:, 0], heads.heads[0](x))
    torch.testing.assert_close(said[:, 1, :2], heads.heads[1](x))
    for kind in (torch.float32, torch.float16):
        assert bool((said.to(kind).softmax(-1)[:, 1, 2] == 0).all())
        assert bool(said.to(kind).log_softmax(-1).isfinite().all())


def test_rates_of_dropout_are_each_tasks_own() -> None:
    heads = TaskHeads(4, [2, 2], dropout=[0.0, 0.9]).train()
    x = torch.ones(200, 4)
    said = heads(x)
    assert len(said[:, 0].unique(dim=0)) == 1
    assert len(said[:, 1].unique(dim=0)) > 1


def test_a_model_gets_them_by_name() -> None:
    model = load_model("limbeck.models.task_heads:several_tasks", body="text_64_1", tasks=[3, 2, 2], vocabulary=50)
    ids = torch.randint(1, 50, (4, 7))
    assert model(ids).shape == (4, 3, 3)
    assert isinstance(model.linear, TaskHeads)


def test_mistakes() -> None:
    with pytest.raises(ModelError, match="two classes"):
        TaskHeads(4, [])
    with pytest.raises(ModelError, match="one rate a task"):
        TaskHeads(4, [2, 2], dropout=[0.1])
    with pytest.raises(ModelError, match="no linear layer"):
        several_tasks("torch.nn:Identity", [2, 2])
