"""What the teacher says of the whole training set, for objectives that ask for it in their set-up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo, Objective
from limbeck.core.trace import Trace
from limbeck.data import Augment, ResidentLoader


class MeanLogit(Objective):
    """The distance from the teacher's mean logits."""

    student_taps = teacher_taps = ("logits",)
    mean: Tensor

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        said = torch.cat([trace.logits for trace, _ in data.all_answers("mean_logit")])
        self.register_buffer("mean", said.mean(dim=0))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return (student.logits - self.mean).square().mean()


def test_the_set_up_sees_every_sample_once_and_unchanged() -> None:
    images = torch.randint(0, 256, (10, 1, 4, 4), dtype=torch.uint8)
    augment = Augment(["flip", "pad_crop"], samples=10)
    loader = ResidentLoader(images, torch.arange(10) % 2, batch_size=4, augment=augment)
    seen = list(loader.plain())
    assert torch.cat([b.index for b in seen]).tolist() == list(range(10))
    torch.testing.assert_close(torch.cat([b.inputs for b in seen]), images / 255.0)
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(16, 2)) for _ in range(2))
    distiller = Distiller(student, MeanLogit(), teacher)
    distiller.setup(loader.example(2), DataInfo(batches=loader.plain))
    mean = next(iter(distiller.loss)).mean
    with torch.no_grad():
        torch.testing.assert_close(mean, teacher(images / 255.0).mean(dim=0))


def test_without_the_training_set_the_error_says_what_to_do() -> None:
    distiller = Distiller(nn.Linear(4, 2), MeanLogit(), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="mean_logit: .*training set"):
        distiller.setup(Batch(torch.randn(2, 4)))


def test_answers_are_made_only_when_asked_for() -> None:
    def never() -> Iterator[Batch]:
        raise AssertionError("nobody asked")

    from limbeck.objectives import KD

    Distiller(nn.Linear(4, 2), KD(), nn.Linear(4, 2)).setup(Batch(torch.randn(2, 4)), DataInfo(batches=never))
