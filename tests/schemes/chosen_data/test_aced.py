"""ACED: how batches are drawn, losses of pairs against the paper's equations, and what curation does with noise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import as_loader
from limbeck.data.resident import ResidentLoader
from limbeck.data.sources.load import load_source
from limbeck.engine import TrainConfig, fit
from limbeck.engine.stage import Stage
from limbeck.objectives import KD, BinaryCrossEntropy, CrossEntropy
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.chosen_data.aced import joint_sample, pair_losses


class Towers(nn.Module):
    """Images of 64 pixels, and captions that are 24 numbers; its logits are the matrix of pairs."""

    def __init__(self, seed: int, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 16))
        self.text = nn.Sequential(nn.Linear(24, width), nn.ReLU(), nn.Linear(width, 16))
        self.scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-4.0))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x, y = F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1)
        return self.scale.exp() * x @ y.T + self.bias


def described(split):
    """Images, and what a fixed projection says of each: no two captions are alike."""
    images = split.inputs.float() / 255
    view = torch.randn(64, 24, generator=torch.Generator().manual_seed(8)) / 2
    return images, (images.flatten(1) @ view).tanh()


def captioned(noise: float, seed: int = 3):
    images, captions = described(load_source("digits").train)
    free = torch.Generator().manual_seed(1)
    wrong = torch.rand(len(captions), generator=free) < noise
    captions[wrong] = captions[wrong][torch.randperm(int(wrong.sum()), generator=free)]
    return ResidentLoader({"image": images, "text": captions}, batch_size=100, seed=seed), wrong


def pairs(loss, loader, reference=None, **options):
    reference = Towers(9, 64) if reference is None else reference
    given = Cast(Towers(0), Terms.of(loss), FrozenTeacher(reference), TrainConfig(steps=2), loader)
    (training,) = build("aced", data="pairs", **options).trainings(given)
    return training.stages[0].distiller.setup(loader.example(4)), given


def test_drawing_follows_jests_algorithm():
    """Frequencies of sets of two in two turns, against the algorithm written out."""
    torch.manual_seed(3)
    scores = torch.randn(4, 4)
    first = scores.diagonal().softmax(0)
    wanted = torch.zeros(4, 4)
    for i in range(4):
        logits = scores.diagonal() + scores[i] + scores[:, i]
        logits[i] = -torch.inf
        wanted[i] = first[i] * logits.softmax(0)
    found = torch.zeros(4, 4)
    for _ in range(1500):
        i, j = joint_sample(scores, 2, chunks=2).tolist()
        found[i, j] += 1 / 1500
    assert (found - wanted).abs().max() < 0.045


@pytest.mark.parametrize(("count", "chunks"), [(20, 4), (7, 16), (10, 3), (50, 5)])
def test_as_many_as_asked_for_and_none_twice(count, chunks):
    rows = joint_sample(torch.randn(50, 50), count, chunks)
    assert len(rows) == len(rows.unique()) == count


def test_without_temperature_the_first_chunk_is_the_best():
    scores = torch.randn(40, 40)
    rows = joint_sample(scores, 20, chunks=4, temperature=1e-9)
    assert set(rows[:5].tolist()) == set(scores.diagonal().topk(5).indices.tolist())


def test_a_student_that_is_the_reference_draws_evenly_and_easy_ones_are_still_told():
    loader, _ = captioned(0.0)
    distiller, _ = pairs(BinaryCrossEntropy(), loader, Towers(0), filter=0.8)
    (batch,) = next(loader.epoch(0))
    logits = distiller.student(**batch.inputs).detach()
    scores = distiller.scores(logits, logits, batch)
    assert scores.abs().max() == 0
    counts = torch.stack([joint_sample(scores, 20) for _ in range(100)]).flatten().bincount(minlength=100)
    assert counts.float().mean() == 20
    assert counts.float().std() < 7  # 4 expected
    distiller.scheme.score = "easy"
    torch.testing.assert_close(distiller.scores(logits, logits, batch), -pair_losses(logits))


def test_losses_of_pairs_are_the_papers():
    loader, _ = captioned(0.0)
    (batch,) = next(loader.epoch(0))
    small = Batch({k: v[:12] for k, v in batch.inputs.items()})
    z, t = (m(**small.inputs).double() for m in (Towers(0), Towers(9, 64)))
    sign = 2 * torch.eye(12) - 1
    sigmoid = -(sign * z).sigmoid().log().sum() / 12
    place = torch.arange(12)
    softmax = (F.cross_entropy(z, place) + F.cross_entropy(z.T, place)) / 2
    matching = sum(-(p.softmax(1) * q.log_softmax(1)).sum(1).mean() / 2 for p, q in ((t, z), (t.T, z.T)))
    entropy = sum(-(p.softmax(1) * p.log_softmax(1)).sum(1).mean() / 2 for p in (t, t.T))
    for loss, contrast, wanted in (
        (BinaryCrossEntropy(), "sigmoid", sigmoid),
        (CrossEntropy(), "softmax", softmax),
        (Terms.of(KD(1.0)), "sigmoid", matching - entropy),
        (CrossEntropy() + 2.0 * KD(1.0), "softmax", softmax + 2 * (matching - entropy)),
    ):
        found = pairs(loss, loader, contrast=contrast)[0](small).total
        assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert matching.item() >= entropy.item()
    assert pairs(KD(1.0), loader, Towers(0))[0](small).total.item() == pytest.approx(0, abs=1e-6)


def test_nothing_left_out_is_a_plain_batch():
    loader, _ = captioned(0.3)
    distiller, _ = pairs(BinaryCrossEntropy(), loader, filter=0.0)
    (batch,) = next(loader.epoch(0))
    made = distiller.made(batch)
    assert torch.equal(made.index, batch.index)
    assert made.inputs["image"] is batch.inputs["image"]


def trained(loss, loader, seed=9, width=64, epochs=8):
    model = Towers(seed, width)
    given = Cast(model, Terms.of(loss), FrozenTeacher(Towers(1)), TrainConfig(), loader)
    given.config = TrainConfig(epochs=epochs, optimizer="adam", lr=0.01, weight_decay=0.0, device="cpu", compile="off")
    perform(build("aced", data="pairs", filter=0.0), given, quiet=True)
    return model


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return trained(BinaryCrossEntropy(), captioned(0.0)[0], epochs=20)


def right(model):
    """How often an image finds its own caption among those of all test images."""
    images, captions = described(load_source("digits").test)
    with torch.no_grad():
        return (model(images, captions).argmax(1) == torch.arange(len(images))).float().mean().item()


@pytest.mark.slow
def test_wrong_captions_are_left_out(reference):
    loader, wrong = captioned(0.5)
    distiller, _ = pairs(BinaryCrossEntropy(), loader, reference, filter=0.6)
    distiller.student.load_state_dict(trained(BinaryCrossEntropy(), loader, 0, 16, 2).state_dict())
    shares = []
    for (batch,) in loader.epoch(0):
        made = distiller.made(batch)
        assert made.size == 40
        assert len(made.index.unique()) == 40
        shares.append((wrong[batch.index].float().mean(), wrong[made.index].float().mean()))
    before, after = torch.tensor(shares).mean(0).tolist()
    assert after < 0.9 * before


@pytest.mark.slow
def test_among_wrong_captions_a_student_is_better_for_curation_and_best_for_a_teacher_too():
    torch.manual_seed(0)
    reference = trained(BinaryCrossEntropy(), captioned(0.0)[0], epochs=40)
    loader, _ = captioned(0.5)
    scores = {}
    for name, part, loss in (
        ("iid", 0.0, BinaryCrossEntropy()),
        ("acid", 0.6, BinaryCrossEntropy()),
        ("aced", 0.6, BinaryCrossEntropy() + 5.0 * KD(1.0)),
    ):
        given = Cast(Towers(0), Terms.of(loss), FrozenTeacher(reference), TrainConfig(), loader)
        length = {"steps": 150, "optimizer": "adam", "lr": 0.01, "weight_decay": 0.0}
        given.config = TrainConfig(**length, device="cpu", compile="off")
        perform(build("aced", data="pairs", filter=part), given, quiet=True)
        scores[name] = right(given.student)
    assert scores["acid"] > scores["iid"]
    assert scores["aced"] > scores["acid"]


def digits():
    return as_loader(load_source("digits").train, batch_size=50, train=True, seed=3)


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_of_classes_samples_have_their_own_cross_entropies():
    loader = digits()
    given = Cast(net(0), Terms.of(CrossEntropy()), FrozenTeacher(net(1)), TrainConfig(), loader)
    (training,) = build("aced", filter=0.5).trainings(given)
    distiller = training.stages[0].distiller.setup(loader.example(4))
    (batch,) = next(loader.epoch(0))
    z, t = given.student(batch.inputs), given.teacher.model(batch.inputs)
    wanted = F.cross_entropy(z, batch.labels, reduction="none") - F.cross_entropy(t, batch.labels, reduction="none")
    torch.testing.assert_close(distiller.scores(z, t, batch), torch.diag(wanted))
    assert distiller.made(batch).labels.shape == (25,)


def test_with_nothing_left_out_it_is_distillation_bit_for_bit():
    config = TrainConfig(steps=8, lr=0.1, device="cpu", compile="off")
    given = Cast(net(0), CrossEntropy() + KD(), FrozenTeacher(net(1)), config, digits())
    perform(build("aced", filter=0.0), given, quiet=True)
    plain = net(0)
    fit([Stage("plain", Distiller(plain, CrossEntropy() + KD(), net(1)), config)], digits(), quiet=True)
    for found, wanted in zip(given.student.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_a_random_batch_may_teach():
    loader = digits()
    given = Cast(net(0), CrossEntropy() + KD(), FrozenTeacher(net(1)), TrainConfig(), loader)
    (training,) = build("aced", teaches="random").trainings(given)
    distiller = training.stages[0].distiller.setup(loader.example(4))
    (batch,) = next(loader.epoch(0))
    made = distiller.made(batch)
    drawn = made.extras["taught"]
    assert made.size == drawn.size == 10
    losses = distiller(made)
    wanted = Distiller(given.student, KD(), net(1)).setup(batch)(drawn).total
    torch.testing.assert_close(losses.terms["kd"], wanted.detach())
    torch.testing.assert_close(
        losses.terms["cross_entropy"], F.cross_entropy(given.student(made.inputs), made.labels).detach()
    )


def test_what_is_refused():
    given = Cast(net(0), Terms.of(KD()), FrozenTeacher(net(1)), TrainConfig(accumulate=2), digits())
    with pytest.raises(ConfigError, match="cut into parts"):
        list(build("aced").trainings(given))
    given.config = TrainConfig()
    (training,) = build("aced", data="pairs").trainings(given)
    distiller = training.stages[0].distiller
    with pytest.raises(DataError, match="one row and one column"):
        distiller.scores(torch.zeros(4, 10), torch.zeros(4, 10), Batch(torch.zeros(4, 1)))


@pytest.mark.slow
def test_pairs_are_compared_over_all_ranks(tmp_path):
    script, root = Path(__file__).with_name("pairs_ranks_run.py"), Path(__file__).parents[3]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    for how in ([], launch):
        subprocess.run([sys.executable, *how, str(script), str(tmp_path)], env=environment, cwd=root, check=True)
    alone, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("alone", "0", "1"))
    assert all(torch.equal(first[name], second[name]) for name in alone)
    assert max(float((alone[name] - first[name]).abs().max()) for name in alone) < 1e-5
    assert not torch.equal(alone["scale"], Towers(0).scale.detach())
