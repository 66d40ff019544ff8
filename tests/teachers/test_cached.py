"""A cache in its teacher's place: the same answers to the same questions, and no answer to others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.cache.build import build
from limbeck.cache.folder import Cache
from limbeck.core.distiller import Distiller
from limbeck.core.errors import CacheError
from limbeck.core.teacher import FrozenTeacher, Teacher
from limbeck.data import StreamLoader
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.objectives import AT, KD, CrossEntropy, FitNets
from limbeck.teachers import cached
from limbeck.teachers.cached import CachedTeacher
from tests.cache.conftest import FULL, make_loader, make_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("cached") / "cache"
    build(make_teacher(), make_loader(), place, store={"logits": FULL, "0": FULL, "2": FULL}, views=3, batch=16)
    return place


@pytest.mark.parametrize("held", [1 << 28, 90 * 10 * 4, 0], ids=["in memory", "one view", "mapped"])
@pytest.mark.parametrize("per_read", [1, 3])
def test_it_answers_as_the_teacher_does(folder, monkeypatch, held, per_read):
    monkeypatch.setattr(cached, "HELD", held)
    teacher, loader = CachedTeacher(folder), make_loader(views=3, per_read=per_read, batch_size=12)
    live = FrozenTeacher(make_teacher())
    assert isinstance(teacher, Teacher)
    for one in (teacher, live):
        one.attach(("logits", "2"), loader.example(4))
    for epoch in range(4):
        for batch in loader.batches(epoch):
            wanted, found = live(batch), teacher(batch)
            torch.testing.assert_close(found.logits, wanted.logits)
            torch.testing.assert_close(found["2"], wanted["2"])


@pytest.mark.parametrize("mixed", ["mixup", "cutmix"])
def test_partners_of_mixed_images_are_replayed(tmp_path, mixed):
    """Whom an image is mixed with, and how much of it, follows from sample and view: not from order or batch size."""
    chain = ("flip", mixed)
    build(make_teacher(), make_loader(augment=chain), tmp_path, store={"logits": FULL}, views=2, batch=7)
    teacher, live = CachedTeacher(tmp_path), FrozenTeacher(make_teacher())
    loader, plain = make_loader(augment=chain, views=2, batch_size=12, seed=4), make_loader(augment=("flip",), views=2)
    for one in (teacher, live):
        one.attach(("logits",), loader.example(4))
    moved = 0
    for epoch in range(3):
        unmixed = {int(i): x for b in plain.batches(epoch) for i, x in zip(b.index, b.inputs, strict=True)}
        for batch in loader.batches(epoch):
            torch.testing.assert_close(teacher(batch).logits, live(batch).logits)
            moved += sum(not torch.equal(unmixed[int(i)], x) for i, x in zip(batch.index, batch.inputs, strict=True))
    assert moved > 100
    with pytest.raises(CacheError, match="augment"):
        teacher.cache.refuse_other_views(make_loader(augment=("flip",), views=2))


def test_training_with_it_is_training_with_the_teacher(folder):
    def trained(teacher):
        torch.manual_seed(5)
        student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
        loss = CrossEntropy() + KD(temperature=2.0) + 0.1 * FitNets("0") + AT("1", "2")
        stage = Stage("kd", Distiller(student, loss, teacher), TrainConfig(epochs=2, lr=0.05))
        fit([stage], make_loader(views=3), quiet=True, seed=1)
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    torch.testing.assert_close(trained(CachedTeacher(folder)), trained(make_teacher()), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_step_is_built_once_for_all_views(folder):
    from torch._dynamo.utils import counters

    def trained(mode):
        torch.manual_seed(5)
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        distiller = Distiller(student, CrossEntropy() + KD(), CachedTeacher(folder))
        loader = make_loader(views=3, drop_last=True)
        fit([Stage("kd", distiller, TrainConfig(epochs=4, compile=mode))], loader, quiet=True)
        assert "_teach" not in vars(distiller)
        return student[1].weight

    eager = trained("off")
    counters.clear()
    torch.testing.assert_close(trained("on"), eager, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2  # before and after the teacher is asked


def test_what_was_not_stored_is_an_error_before_any_step(folder):
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    distiller = Distiller(student, FitNets("0", "3"), CachedTeacher(folder))
    with pytest.raises(CacheError, match="3: the cache does not hold this; found a cache of logits, 0, 2"):
        distiller.setup(make_loader().example())


def batch_of(loader, epoch=0):
    return next(iter(loader.batches(epoch)))


@pytest.mark.parametrize("held", [1 << 28, 0], ids=["in memory", "mapped"])
def test_anything_else_than_the_teacher_saw_is_refused(folder, monkeypatch, held):
    monkeypatch.setattr(cached, "HELD", held)
    teacher, batch = CachedTeacher(folder), batch_of(make_loader(views=3))
    teacher.attach(("logits",), batch)
    teacher(batch)
    exchanged = batch.index.clone()
    exchanged[[0, 1]] = exchanged[[1, 0]]
    others = {
        "other order": batch.replace(index=exchanged),
        "another view": batch.replace(view=1),
        "other pixels": batch.replace(inputs=batch.inputs + 1e-6),
        "another augmentation": batch_of(make_loader(views=3, augment=("flip",))),
        "another seed": batch_of(make_loader(views=3, view_seed=8)),
    }
    for what, other in others.items():
        with pytest.raises(CacheError, match=r"not those that the teacher saw; found \d+ of 20 differ") as error:
            teacher(other)
        assert "first sample" in str(error.value), what
    with pytest.raises(CacheError, match="batch.view: the batch does not say"):
        teacher(batch.replace(view=None))
    with pytest.raises(CacheError, match="batch.view: the cache holds no such row"):
        teacher(batch_of(make_loader(), epoch=3))


def test_without_augmentation_every_view_is_the_same(tmp_path):
    loader = make_loader(augment=())
    build(make_teacher(), loader, tmp_path, batch=16)
    teacher, live = CachedTeacher(tmp_path), make_teacher()
    teacher.attach(("logits",), loader.example())
    for batch in loader.batches(7):
        torch.testing.assert_close(teacher(batch).logits, live(batch.inputs).detach(), atol=2e-3, rtol=1e-3)


def test_sparse_logits_are_dense_or_as_they_are(tmp_path):
    loader = make_loader(augment=())
    build(make_teacher(), loader, tmp_path, store={"logits": {"top_k": {"k": 4, "bits": 8}}}, batch=16)
    teacher, batch = CachedTeacher(tmp_path), loader.example(4)
    teacher.attach(("logits", "top_k"), batch)
    trace, live = teacher(batch), make_teacher()(batch.inputs).detach()
    assert trace["top_k"].ids.shape == (4, 4)
    assert torch.equal(trace["top_k"].dense(), trace.logits)
    kept = trace["top_k"].ids
    torch.testing.assert_close(trace.logits.gather(1, kept), live.log_softmax(1).gather(1, kept), atol=0.03, rtol=0)


def test_a_stream_reads_the_same(folder):
    class Digits(torch.utils.data.Dataset):
        source = make_loader()

        def __len__(self):
            return 90

        def __getitem__(self, row):
            return self.source.inputs[row], int(self.source.labels[row])

    loader = make_loader(views=3)
    stream = StreamLoader(Digits(), loader.labels, augment=loader.augment, batch_size=20, workers=2, seed=11, views=3)
    Cache(folder).refuse_other_views(stream)
    teacher = CachedTeacher(folder)
    teacher.attach(("logits",), stream.example())
    for epoch in (0, 4):
        for own, other in zip(stream.batches(epoch), make_loader(views=3, drop_last=True).batches(epoch), strict=False):
            assert torch.equal(own.inputs, other.inputs)
            assert torch.equal(teacher(own).logits, teacher(other).logits)


def test_ranks_and_micro_batches_are_answered_alike(folder):
    loader, teacher = make_loader(views=3, batch_size=18), CachedTeacher(folder)
    teacher.attach(("logits",), loader.example())
    whole = {int(i): row for b in loader.batches(1) for i, row in zip(b.index, teacher(b).logits, strict=True)}
    shared = {}
    for rank in range(2):
        mine = CachedTeacher(folder)
        mine.attach(("logits",), loader.example())
        for step in loader.epoch(1, rank=rank, world=2, parts=2):
            for part in step:
                shared.update(zip(part.index.tolist(), mine(part).logits, strict=True))
    assert shared.keys() == whole.keys()
    assert all(torch.equal(shared[i], whole[i]) for i in whole)
