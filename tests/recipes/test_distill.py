"""One line: any teacher, any student, any data."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import limbeck
from limbeck.core.errors import ConfigError, LimbeckError
from limbeck.models import create
from limbeck.objectives import KD, CrossEntropy
from limbeck.recipes.distill import distill


def blobs(samples: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(samples) % 3
    torch.manual_seed(1)
    return torch.randn(samples, 6) * 0.5 + nn.functional.one_hot(labels, 6) * 2, labels


def net(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))


@pytest.fixture
def teacher() -> nn.Module:
    return limbeck.distill(None, net(32), blobs(), "cross_entropy", batch_size=32, epochs=8, lr=0.1, quiet=True).student


def test_the_student_learns_and_stays_a_plain_module(teacher: nn.Module) -> None:
    student = net(4)
    done = limbeck.distill(teacher, student, blobs(), "kd", validation=blobs(), batch_size=32, epochs=8, quiet=True)
    assert done.student is student
    assert not student.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in [*student.modules(), *teacher.modules()])
    assert done.result["accuracy"] > 0.9
    assert done.result["agreement"] > 0.9
    assert done.steps == 48
    assert done.history
    copy.deepcopy(student).load_state_dict(student.state_dict())


def test_the_teacher_is_left_as_it_was(teacher: nn.Module) -> None:
    teacher.train()
    teacher[2].eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    modes = [m.training for m in teacher.modules()]
    grads = [p.requires_grad for p in teacher.parameters()]
    distill(teacher, net(4), blobs(), epochs=2, quiet=True)
    assert [m.training for m in teacher.modules()] == modes
    assert [p.requires_grad for p in teacher.parameters()] == grads
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_one_seed_one_student(teacher: nn.Module) -> None:
    start = net(4)
    one, two = (distill(teacher, copy.deepcopy(start), blobs(), epochs=2, seed=3, quiet=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.student.parameters(), two.student.parameters(), strict=True))


def test_a_loss_of_ones_own_and_a_dataloader(teacher: nn.Module) -> None:
    loader = DataLoader(TensorDataset(*blobs()), batch_size=32, shuffle=True)
    loss = CrossEntropy() + 0.5 * KD(temperature=2.0)
    assert distill(teacher, net(4), loader, loss, epochs=2, quiet=True).steps == 12


def test_a_source_by_name_brings_its_validation() -> None:
    done = distill(
        create("mlp_16", in_channels=1, image_size=8),
        create("mlp_4", in_channels=1, image_size=8),
        "digits",
        steps=3,
        quiet=True,
    )
    assert done.result["samples"] == 179


def test_features_of_any_two_modules() -> None:
    models = (nn.Sequential(nn.Conv2d(1, w, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)) for w in (8, 4))
    teacher, student = (m.eval() for m in models)
    for model in (teacher, student):
        model(torch.zeros(1, 1, 8, 8))
    loss = limbeck.objectives.FitNets("1") + CrossEntropy()
    assert distill(teacher, student, "digits", loss, steps=2, quiet=True).steps == 2


class Answer(dict):  # as transformers return it: entries are attributes too
    __getattr__ = dict.__getitem__


class TextModel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, width), nn.Linear(width, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Answer:
        mask = attention_mask.unsqueeze(-1)
        return Answer(
            hidden=self.embed(input_ids), logits=self.head((self.embed(input_ids) * mask).sum(1) / mask.sum(1))
        )


def test_batches_that_are_dicts_and_outputs_that_are_not_tensors() -> None:
    ids = torch.randint(0, 20, (64, 5))
    rows = [{"input_ids": i, "attention_mask": torch.ones(5), "labels": int(i[0] > 9)} for i in ids]
    done = distill(TextModel(16), TextModel(4), DataLoader(rows, batch_size=16), epochs=1, quiet=True)
    assert done.steps == 4
    assert {"cross_entropy", "kd"} <= set(done.history[-1]["terms"])


def test_a_folder_holds_what_was_learned(teacher: nn.Module, tmp_path: Path) -> None:
    student = distill(teacher, net(4), blobs(), epochs=1, out=tmp_path, quiet=True).student
    again = net(4).eval()
    limbeck.load_weights(again, tmp_path / "student")
    inputs = blobs()[0]
    assert torch.equal(again(inputs), student(inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "kdd"}, "did you mean 'kd'"),
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"epochs": -1}, "greater than or equal to 1"),
        ({"scheme": "ofline"}, "did you mean 'offline'"),
        ({"teacher": None}, "cannot work without a teacher"),
        ({"data": "digitz"}, "digits"),
    ],
)
def test_mistakes_are_told(teacher: nn.Module, change: dict[str, object], message: str) -> None:
    arguments = {"teacher": teacher, "student": net(4), "data": blobs(), "method": "kd", "quiet": True} | change
    with pytest.raises(LimbeckError, match=message):
        distill(**arguments)  # type: ignore[arg-type]


def test_a_student_that_is_part_of_its_teacher(teacher: nn.Module) -> None:
    with pytest.raises(LimbeckError, match="share modules"):
        distill(teacher, teacher, blobs(), quiet=True)
    assert issubclass(ConfigError, LimbeckError)
