"""Co-training and co-distillation: two models, each from the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.engine import TrainConfig
from limbeck.objectives import KD, PKT, CrossEntropy
from limbeck.schemes import Cast, Offline, perform
from limbeck.schemes.online.ctcd import CTCD, Pair, co_distillation
from tests.schemes.tiny import cast, llama, weights


def mlp(width: int, seed: int, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, classes)).double()


def images(seed: int = 0, rows: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return Batch(inputs, torch.randint(5, (rows,), generator=generator))


def pair(loss: Any = None, **options: Any) -> Pair:
    given = Cast(
        mlp(4, 1),
        Terms.of(CrossEntropy() if loss is None else loss),
        None,
        TrainConfig(),
        players={"large": mlp(16, 2)},
    )
    (training,) = CTCD(**options).trainings(given)
    found = training.stages[0].distiller
    assert isinstance(found, Pair)
    return found.setup(images())


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def test_the_equation_written_out() -> None:
    torch.manual_seed(0)
    own, other = torch.randn(2, 3, 5, 4).double().unbind()
    mask = torch.rand(3, 5) > 0.3
    wanted, count = 0.0, 0
    for b, t in mask.nonzero().tolist():
        p, q = (other[b, t] / 2.0).softmax(0), (own[b, t] / 2.0).softmax(0)
        wanted += 4.0 * float((p * (p / q).log()).sum())
        count += 1
    found = co_distillation(own, other, temperature=2.0, mask=mask)
    assert float(found) == pytest.approx(wanted / count, rel=1e-12)
    wider = torch.cat([other, torch.randn(3, 5, 2).double()], dim=-1)  # rows for tokens that are none
    assert torch.equal(found, co_distillation(own, wider, temperature=2.0, mask=mask))


@pytest.mark.parametrize("detach", [True, False])
def test_who_moves(detach: bool) -> None:
    own, other = torch.randn(2, 4, 3).double().requires_grad_().unbind()
    for tensor in (own, other):
        tensor.retain_grad()
    co_distillation(own, other, detach_peer=detach).backward()
    assert own.grad is not None
    assert bool(own.grad.abs().sum() > 0)
    assert (other.grad is None or not bool(other.grad.any())) == detach


def test_equal_models_learn_from_labels_alone() -> None:
    batch = images()
    given = Cast(mlp(4, 1), Terms.of(CrossEntropy()), None, TrainConfig(), players={"large": mlp(4, 1)})
    (training,) = CTCD().trainings(given)
    found = training.stages[0].distiller.setup(batch)
    assert isinstance(found, Pair)
    losses = found(batch)
    losses.total.backward()
    assert float(losses.terms["from_large"]) == pytest.approx(0, abs=1e-15)
    assert float(losses.terms["large/from_student"]) == pytest.approx(0, abs=1e-15)
    alone = mlp(4, 1)
    F.cross_entropy(alone(batch.inputs), batch.require("labels")).backward()
    for mine, wanted in zip(gradients(found.student), gradients(alone), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_without_exchange_they_are_two_trainings() -> None:
    """Bit for bit, over a few steps."""
    found = pair(to_student=0.0, to_large=0.0)
    optimizer = torch.optim.SGD(found.parameters(), 0.5)
    alone = {
        name: Distiller(mlp(width, seed), CrossEntropy()).setup(images())
        for name, width, seed in (("student", 4, 1), ("large", 16, 2))
    }
    for step in range(3):
        batch = images(step)
        optimizer.zero_grad()
        losses = found(batch)
        losses.total.backward()
        optimizer.step()
        for name, model in alone.items():
            own = torch.optim.SGD(model.parameters(), 0.5)
            own.zero_grad()
            value = model(batch).total
            value.backward()
            own.step()
            key = "cross_entropy" if name == "student" else "large/cross_entropy"
            assert torch.equal(losses.terms[key], value.detach())
    assert torch.equal(weights(found.student), weights(alone["student"].student))
    assert torch.equal(weights(found.large.student), weights(alone["large"].student))


def test_one_way_from_a_frozen_model_is_classic_distillation() -> None:
    found, batch = pair(to_large=0.0, temperature=3.0), images()
    found(batch).total.backward()
    classic = Distiller(mlp(4, 1), CrossEntropy() + KD(temperature=3.0), mlp(16, 2)).setup(batch)
    classic(batch).total.backward()
    for mine, wanted in zip(gradients(found.student), gradients(classic.student), strict=True):
        torch.testing.assert_close(mine, wanted)
    with_labels = mlp(16, 2)
    F.cross_entropy(with_labels(batch.inputs), batch.require("labels")).backward()
    for mine, wanted in zip(gradients(found.large.student), gradients(with_labels), strict=True):
        torch.testing.assert_close(mine, wanted)  # nothing of the student's term reaches it


def test_micro_batches_and_masks_give_the_same_gradient() -> None:
    given = cast(CrossEntropy(), teacher=None, players={"large": llama(width=24, seed=3, sharp=6.0).double()})
    (training,) = CTCD(temperature=2.0).trainings(given)
    found = training.stages[0].distiller
    assert given.train is not None
    batch = next(iter(given.train.batches(0)))
    found.setup(batch)
    found(batch).total.backward()
    whole = gradients(found)
    found.zero_grad()
    totals = {unit: float(batch.count(unit)) for unit in ("positions", "labels", "samples")}
    for rows in (slice(0, 2), slice(2, 6)):
        inputs = {name: value[rows] for name, value in batch.inputs.items()}
        part = Batch(inputs, batch.require("labels")[rows], mask=batch.require("mask")[rows], totals=totals)
        found(part).total.backward()
    for mine, wanted in zip(gradients(found), whole, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_features_are_the_large_models_where_there_is_no_teacher() -> None:
    found, batch = pair(CrossEntropy() + 2.0 * PKT()), images()
    losses = found(batch)
    assert "large/pkt" not in losses.terms
    frozen = Distiller(mlp(4, 1), PKT(), mlp(16, 2)).setup(batch)
    torch.testing.assert_close(losses.terms["pkt"], frozen(batch).terms["pkt"])
    with pytest.raises(ConfigError, match="from the student alone"):
        pair(PKT())


def test_a_teacher_teaches_both() -> None:
    teacher, batch = mlp(8, 4), images()
    given = Cast(mlp(4, 1), CrossEntropy() + KD(), FrozenTeacher(teacher), TrainConfig(), players={"large": mlp(16, 2)})
    (training,) = CTCD().trainings(given)
    losses = training.stages[0].distiller.setup(batch)(batch)
    wanted = {"cross_entropy", "kd", "from_large", "large/cross_entropy", "large/kd", "large/from_student"}
    assert set(losses.terms) == wanted
    alone = Distiller(mlp(16, 2), KD(), copy.deepcopy(teacher)).setup(batch)
    torch.testing.assert_close(losses.terms["large/kd"], alone(batch).terms["kd"])


@pytest.mark.slow
def test_the_student_gains_more_where_the_large_model_learns_from_it() -> None:
    """Few noisy labels: distilling both ways beats one way, and that beats labels alone, on held-out data."""
    truth = mlp(16, 9)
    torch.manual_seed(0)
    inputs = torch.randn(600, 6).double()
    labels = (truth(inputs) * 8).argmax(1)
    batch = Batch(inputs[:100], torch.where(torch.rand(600) < 0.3, torch.randint(5, (600,)), labels)[:100])
    scores = []
    for to_student, to_large in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)):
        found = 0.0
        for seed in range(3):
            players = {"large": mlp(64, 20 + seed)}
            given = Cast(mlp(16, 10 + seed), Terms.of(CrossEntropy()), None, TrainConfig(), players=players)
            (training,) = CTCD(to_student=to_student, to_large=to_large).trainings(given)
            distiller = training.stages[0].distiller.setup(batch)
            optimizer = torch.optim.Adam(distiller.parameters(), 0.1)
            for _ in range(60):
                optimizer.zero_grad()
                distiller(batch).total.backward()
                optimizer.step()
            with torch.no_grad():
                found += float(F.cross_entropy(distiller.student(inputs[200:]), labels[200:]))
        scores.append(found)
    assert scores == sorted(scores, reverse=True)


def test_a_run_trains_both_and_leaves_a_plain_student() -> None:
    large = llama(width=24, seed=3, sharp=6.0).double()
    before = weights(large)
    given = cast(CrossEntropy(), teacher=None, players={"large": large})
    fitted = perform(CTCD(), given, quiet=True)
    assert fitted.student is given.student
    assert not torch.equal(before, weights(large))
    assert not any(module._forward_hooks for model in (fitted.student, large) for module in model.modules())
    assert {"from_large", "large/from_student"} <= set(fitted.history[-1].get("terms", fitted.history[0]["terms"]))
    alone = perform(Offline(), cast(CrossEntropy(), teacher=None), quiet=True)
    assert not torch.equal(weights(alone.student), weights(fitted.student))


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match=r"players\.large"):
        next(iter(CTCD().trainings(cast(CrossEntropy(), teacher=None))))
    with pytest.raises(ConfigError, match="negative"):
        CTCD(to_large=-1.0)
