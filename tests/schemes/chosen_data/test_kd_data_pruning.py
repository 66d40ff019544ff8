"""Data pruning: every score against its definition, what is kept, and what the student then learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import as_loader
from limbeck.data.sources.load import load_source
from limbeck.engine import TrainConfig, fit
from limbeck.engine.stage import Stage
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.chosen_data.pruning_scores import Forgetting, coverage, el2n, gradient_norms, herding, quotas


def net(seed: int, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))


def digits(**more):
    return as_loader(load_source("digits").train, batch_size=32, train=True, seed=3, **more)


def cast(**changes):
    config = TrainConfig(epochs=2, lr=0.1, device="cpu", compile="off")
    given = {"train": digits(), "fresh": net, "seed": 4, "config": config, "loss": CrossEntropy() + KD(), **changes}
    return Cast(net(0), Terms.of(given.pop("loss")), FrozenTeacher(net(1)), given.pop("config"), **given)


def test_el2n_and_grand_are_those_of_a_loop():
    model, loader = net(2).eval(), as_loader((torch.rand(20, 1, 8, 8), torch.arange(20) % 10), batch_size=7)
    wanted, errors = [], []
    for batch in loader.plain():
        for x, y in zip(batch.inputs, batch.labels, strict=True):
            model.zero_grad()
            F.cross_entropy(model(x[None]), y[None]).backward()
            wanted.append(sum(p.grad.square().sum() for p in model.parameters()).sqrt())
            errors.append((model(x[None]).softmax(1)[0] - F.one_hot(y, 10)).norm().detach())
    torch.testing.assert_close(gradient_norms(model, loader), torch.stack(wanted), rtol=1e-4, atol=1e-5)
    logits = torch.cat([model(b.inputs) for b in loader.plain()]).detach()
    torch.testing.assert_close(el2n(logits, torch.arange(20) % 10), torch.stack(errors))


def test_forgetting_counts_falls_from_right_to_wrong():
    seen = Forgetting(4)
    rights = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    for right in rights:
        seen.update(torch.arange(4), right)
    assert seen.scores().tolist() == [2, 0, float("inf"), 1]


def test_herding_is_the_greedy_search():
    features = F.normalize(torch.randn(30, 5).double(), dim=1)
    chosen = herding(features, 6).tolist()
    for count in range(1, 7):

        def away(row, before=chosen[: count - 1]):
            return (features.mean(0) - features[[*before, row]].mean(0)).norm()

        others = [row for row in range(30) if row not in chosen[:count]]
        assert all(away(chosen[count - 1]) <= away(row) for row in others)


def test_coverage_leaves_the_hardest_out_and_reaches_every_stratum():
    scores = torch.linspace(0, 1, 1000) ** 2
    rows = coverage(scores, 100, torch.randperm(1000), cutoff=0.2)
    assert len(rows.unique()) == 100
    assert rows.max() < 800
    counts = torch.histc(scores[rows], 10, 0, float(scores[799]))
    assert counts.min() >= 9  # evenly over scores, though most samples are easy


def test_quotas_are_even_and_complete():
    labels = torch.arange(100) % 7 + (torch.arange(100) > 80).long()
    for count in (1, 13, 50, 99, 100):
        found = quotas(labels, count)
        assert int(found.sum()) == count
        assert bool((found <= labels.bincount()).all())
    assert quotas(torch.tensor([0] * 50 + [1] * 3), 20).tolist() == [17, 3]


@pytest.mark.parametrize("score", ["random", "el2n", "grand", "forgetting", "herding", "coverage"])
@pytest.mark.parametrize("balanced", [False, True])
def test_as_many_as_asked_for_by_every_score(score, balanced):
    data = as_loader((torch.rand(103, 1, 8, 8), torch.arange(103) % 10), batch_size=8, train=True)
    given = cast(train=data)
    kept = build("kd_data_pruning", fraction=0.4, score=score, balanced=balanced)
    rows = kept.chosen(given, data, torch.rand(103))
    assert len(rows) == len(rows.unique()) == round(0.4 * 103)
    assert torch.equal(rows, kept.chosen(given, data, torch.rand(103))) == (score in ("random", "herding"))
    if balanced:
        counts = data.labels[rows].bincount(minlength=10)
        assert counts.max() - counts.min() <= 1


def test_the_hardest_stay():
    data = digits()
    scores = torch.rand(data.samples)
    rows = build("kd_data_pruning", fraction=0.1, score="el2n").chosen(cast(), data, scores)
    assert scores[rows].min() >= scores[torch.ones(data.samples, dtype=torch.bool).index_fill(0, rows, False)].max()


def test_all_data_is_plain_distillation_and_without_a_teacher_plain_training():
    for alpha, loss in ((0.7, 0.3 * CrossEntropy() + 0.7 * KD()), (0.0, CrossEntropy())):
        given = cast()
        perform(build("kd_data_pruning", fraction=1.0, alpha=alpha), given, quiet=True)
        plain = net(0)
        distiller = Distiller(plain, loss, FrozenTeacher(net(1)) if alpha else None)
        fit([Stage("distill", distiller, given.config)], given.train, seed=4, quiet=True)
        for found, wanted in zip(given.student.state_dict().values(), plain.state_dict().values(), strict=True):
            assert torch.equal(found, wanted)


def test_weights_of_the_loss_and_length():
    *_, last = build("kd_data_pruning", fraction=0.2, same_steps=True).trainings(cast())
    assert [round(float(w(0)), 6) for w in last.stages[0].distiller.loss.weights] == [0.1, 0.9]
    assert last.stages[0].config.steps == 2 * len(digits())
    *_, last = build("kd_data_pruning", alpha="loss").trainings(cast(loss=0.3 * CrossEntropy() + KD()))
    assert [round(float(w(0)), 6) for w in last.stages[0].distiller.loss.weights] == [0.3, 1]


def test_what_is_refused():
    with pytest.raises(ConfigError, match="valid number"):
        build("kd_data_pruning", alpha="most")
    with pytest.raises(DataError, match="no sample"):
        list(build("kd_data_pruning", fraction=0.0).trainings(cast()))
    with pytest.raises(ConfigError, match="told by classes"):
        list(build("kd_data_pruning", score="forgetting").trainings(cast(train=digits(augment=["mixup"]))))


@pytest.mark.slow
def test_on_a_tenth_of_the_data_the_teacher_helps():
    config = TrainConfig(epochs=6, lr=0.1, device="cpu", compile="off")
    teacher = net(9, 64)
    fit([Stage("labels", Distiller(teacher, CrossEntropy()), config)], digits(), quiet=True)
    test = next(iter(as_loader(load_source("digits").test, batch_size=1000).batches()))
    right = {}
    for alpha in (0.0, "rule"):
        given = cast(config=config.model_copy(update={"epochs": 20}))
        given.teacher = FrozenTeacher(teacher)
        perform(build("kd_data_pruning", fraction=0.1, alpha=alpha), given, quiet=True)
        right[alpha] = (given.student(test.inputs).argmax(1) == test.labels).float().mean().item()
    assert right["rule"] > right[0.0]
