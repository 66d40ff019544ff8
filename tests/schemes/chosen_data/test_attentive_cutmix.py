"""Attentive CutMix against loops; and what mixup and CutMix of the data mean for a teacher: it sees the mixed view."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import as_loader
from limbeck.data.sources.load import load_source
from limbeck.engine import TrainConfig
from limbeck.models import create
from limbeck.objectives import AT, KD, CrossEntropy
from limbeck.schemes import Cast, build
from limbeck.schemes.chosen_data.attentive_cutmix import attention_cells, paste


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def digits(**more):
    return as_loader(load_source("digits").train, batch_size=12, train=True, seed=3, augment=["pad_crop"], **more)


def distiller(loss=None, teacher=None, **options):
    torch.manual_seed(7)
    teacher = create("resnet8", num_classes=10, in_channels=1) if teacher is None else teacher
    loader = digits()
    loss = CrossEntropy() + KD(1.0) if loss is None else loss
    cast = Cast(net(0), Terms.of(loss), FrozenTeacher(teacher), TrainConfig(), loader)
    (training,) = build("attentive_cutmix", **{"grid": 4, "patches": 3, **options}).trainings(cast)
    return training.stages[0].distiller.setup(loader.example(4)), loader, teacher


def first(loader, parts=1):
    return next(loader.epoch(0, parts=parts))


def test_the_cells_are_the_strongest():
    maps = torch.randn(5, 6, 7, 7)
    cells = attention_cells(maps, 7, 6)
    for image, chosen in zip(maps, cells, strict=True):
        heat = image.mean(0)
        assert int(chosen.sum()) == 6
        assert heat[chosen].min() > heat[~chosen].max()


def test_none_and_all_of_the_cells():
    images, givers = torch.rand(2, 3, 14, 14), torch.rand(2, 3, 14, 14)
    for patches, wanted, part in ((0, images, 0.0), (49, givers, 1.0)):
        mixed, share = paste(images, givers, attention_cells(torch.rand(2, 4, 7, 7), 7, patches))
        assert torch.equal(mixed, wanted)
        assert share.tolist() == [part, part]


@pytest.mark.parametrize("size", [14, 10])
def test_pixels_outside_are_the_images_own(size):
    images, givers = torch.zeros(3, 1, size, size), torch.ones(3, 1, size, size)
    cells = attention_cells(torch.rand(3, 4, 7, 7), 7, 6)
    mixed, share = paste(images, givers, cells)
    for row in range(size):
        for column in range(size):
            assert torch.equal(mixed[:, 0, row, column].bool(), cells[:, row * 7 // size, column * 7 // size])
    torch.testing.assert_close(share, mixed.mean((1, 2, 3)))
    if size == 14:
        assert share.tolist() == pytest.approx([6 / 49] * 3)


def test_a_batch_is_made_as_the_definition_says():
    ours, loader, _ = distiller()
    (batch,) = first(loader)
    made = ours.made(batch)
    mixed = (made.inputs != batch.inputs).any(dim=1)
    assert 0 < mixed.float().mean() <= 3 / 16
    assert made.labels.sum(1).tolist() == pytest.approx([1.0] * 12)
    own = made.labels.gather(1, batch.labels[:, None])[:, 0]
    assert bool((own >= 1 - 3 / 16 - 1e-6).all())
    again = ours.made(batch)
    assert torch.equal(again.inputs, made.inputs)
    assert torch.equal(again.labels, made.labels)
    parts = [ours.made(part) for part in first(loader, parts=5)]  # however a step is cut
    order = torch.cat([part.index for part in parts])
    assert torch.equal(order, batch.index)
    assert torch.equal(torch.cat([part.inputs for part in parts]), made.inputs)


@pytest.mark.parametrize("way", ["mixed", "blend"])
def test_what_the_teacher_says(way):
    ours, loader, teacher = distiller(loss=KD(1.0))
    ours.scheme.teacher = way
    (batch,) = first(loader)
    made = ours.made(batch)
    said = ours._teach(made).logits.softmax(1)
    with torch.no_grad():
        if way == "mixed":
            wanted = teacher(made.inputs).softmax(1)
        else:
            parts = made.extras["parts"]
            share = parts["share"][:, None]
            wanted = share * teacher(parts["giver"]).softmax(1) + (1 - share) * teacher(parts["whole"]).softmax(1)
    torch.testing.assert_close(said, wanted)


def test_hooks_are_gone_and_mistakes_are_named():
    ours, _, _ = distiller()
    ours.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ours.student.modules())
    with pytest.raises(ConfigError, match="not to be had"):
        build("attentive_cutmix", patches=50)
    with pytest.raises(ConfigError, match="can be blended"):
        _blend_features()


def _blend_features():
    torch.manual_seed(7)
    teacher, student = (create("resnet8", num_classes=10, in_channels=1) for _ in range(2))
    loader = digits()
    cast = Cast(student, Terms.of(AT()), FrozenTeacher(teacher), TrainConfig(), loader)
    (training,) = build("attentive_cutmix", teacher="blend").trainings(cast)
    training.stages[0].distiller.setup(loader.example(4))


class Watched(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.body, self.given = net(seed), list[torch.Tensor]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given.append(x)
        return self.body(x)


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_with_mixup_and_cutmix_of_the_data_the_teacher_sees_the_mixed_view_and_labels_are_mixed(mixing):
    source = load_source("digits").train
    loader, plain = (
        as_loader(source, batch_size=16, train=True, seed=3, augment=a) for a in ([{mixing: {"alpha": 1.0}}], [])
    )
    student, teacher = Watched(0), Watched(1)
    ours = Distiller(student, CrossEntropy() + KD(2.0), teacher).setup(loader.example(4))
    (batch,), (whole,) = first(loader), first(plain)
    student.given.clear()
    teacher.given.clear()
    total = ours(batch).total
    assert torch.equal(batch.index, whole.index)
    assert student.given[0] is teacher.given[0] is batch.inputs
    assert not torch.equal(batch.inputs, whole.inputs)
    share = batch.labels.gather(1, whole.labels[:, None])[:, 0]
    assert bool(((share > 0) & (share < 1)).any())
    z, t = student.body(batch.inputs), teacher.body(batch.inputs).detach()
    p, q = (t / 2).softmax(1), (z / 2).softmax(1)
    wanted = -(batch.labels * z.log_softmax(1)).sum(1).mean() + 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(total, wanted)
