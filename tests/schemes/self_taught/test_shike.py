"""SHIKE: what is excavated of the other classes, who learns in which stage, and on what prior."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.data.build import as_loader
from limbeck.engine import TrainConfig
from limbeck.engine.fitting import fit
from limbeck.models import create
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, build
from limbeck.schemes.self_taught.shike import excavated, mutual_rows, transfer_rows


def said(experts: int = 3, size: int = 8, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(experts, size, classes, generator=generator, dtype=torch.float64)
    return logits, torch.arange(size) % classes


def net(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return create("resnet8_experts", num_classes=3, in_channels=1, widths=(4, 4, 8, 16), shared=2, fuse=True, **options)


def cast_of(labels: torch.Tensor, config: TrainConfig | None = None, student: nn.Module | None = None) -> Cast:
    generator = torch.Generator().manual_seed(1)
    train = as_loader((torch.randn(len(labels), 1, 8, 8, generator=generator), labels), batch_size=4)
    return Cast(student or net(), Terms.of(CrossEntropy()), None, config or TrainConfig(), train)


def batch(size: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(5)
    return Batch(torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 3)


def test_what_is_excavated_and_transferred():
    logits, labels = said()
    found, rows = excavated(logits, labels), transfer_rows(logits, labels)
    for i, y in enumerate(labels.tolist()):
        others = [c for c in range(5) if c != y]
        hardest = max(others, key=lambda c: float(logits[:, i, c].mean()))
        goal = [logits[:, i, c].mean() if c == hardest else logits[:, i, c].max() for c in others]
        torch.testing.assert_close(found[i, others], torch.stack(goal))
        assert found[i, hardest] <= logits[:, i, hardest].max()
        p = torch.stack(goal).softmax(0)
        wanted = sum(F.kl_div(z[i, others].log_softmax(0), p, reduction="sum") for z in logits)
        torch.testing.assert_close(rows[i], wanted)


def test_the_labels_own_logit_never_counts():
    logits, labels = said()
    other = logits.scatter(-1, labels.view(1, -1, 1).expand(3, -1, -1), 3.0)
    torch.testing.assert_close(transfer_rows(other, labels), transfer_rows(logits, labels))
    other.requires_grad_()
    transfer_rows(other, labels).sum().backward()
    assert other.grad.gather(-1, labels.view(1, -1, 1).expand(3, -1, -1)).abs().max() == 0
    assert other.grad.abs().sum() > 0


def test_experts_that_agree_have_nothing_to_learn_from_one_another():
    logits, labels = said(experts=1)
    alike = logits.expand(3, -1, -1)
    torch.testing.assert_close(mutual_rows(alike), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(transfer_rows(alike, labels), torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize("detach", [False, True])
def test_mutual_learning_is_the_sum_over_all_pairs(detach: bool):
    logits, _ = said()
    grads = []
    for own in (True, False):
        z = logits.clone().requires_grad_()
        if own:
            value = mutual_rows(z, detach=detach).mean()
        else:
            value = torch.zeros((), dtype=torch.float64)
            for i in range(3):
                for j in (j for j in range(3) if j != i):
                    p = z[j].softmax(-1).detach() if detach else z[j].softmax(-1)
                    value = value + (p * (p.log() - z[i].log_softmax(-1))).sum(-1).mean()
        value.backward()
        grads.append((value.detach(), z.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_without_transfer_and_mutual_learning_experts_are_plain_and_parts_of_a_step_add_up():
    def first(**options: object):
        (training,) = build("shike", **options).trainings(cast_of(torch.arange(12) % 3))
        return training.stages[0].distiller.setup(batch()).eval()

    plain, given = first(transfer=0.0, mutual=0.0), batch()
    wanted = sum(F.cross_entropy(z, given.labels) for z in plain.said(plain.traces(given)[0]))
    torch.testing.assert_close(plain(given).total, wanted)
    whole, total = first(), torch.zeros(())
    for rows in (slice(0, 4), slice(4, 9)):
        part = Batch(given.inputs[rows], given.labels[rows], totals={"positions": 9.0, "labels": 9.0})
        total = total + whole(part).total
    torch.testing.assert_close(total, whole(given).total)


def test_the_second_stage_draws_classifiers_anew_and_trains_nothing_else():
    labels = torch.tensor([0] * 16 + [1] * 6 + [2] * 2)
    cast = cast_of(labels, TrainConfig(steps=4, lr=0.1))
    (training,) = build("shike", retrain=0.5).trainings(cast)
    first, second = training.stages
    assert (first.config.steps, second.config.steps) == (2, 2)
    before = {}
    setup = second.distiller.setup

    def noted(*given):
        before.update({k: v.clone() for k, v in cast.student.state_dict().items()})
        return setup(*given)

    second.distiller.setup = noted
    fit(training.stages, training.train, quiet=True)
    changed = {k for k, v in cast.student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"experts.{n}.linear.weight" for n in range(3)}
    assert not any(m._forward_hooks for m in cast.student.modules())
    given = batch()
    distiller = setup(given).eval()
    found = distiller(given).total
    prior = torch.tensor([16.0, 6.0, 2.0]).log()
    logits = distiller.said(distiller.traces(given)[0])
    torch.testing.assert_close(found, sum(F.cross_entropy(z + prior, given.labels) for z in logits))


def test_even_classes_make_the_balanced_loss_a_plain_one():
    (training,) = build("shike").trainings(cast_of(torch.arange(12) % 3))
    distiller = training.stages[1].distiller.setup(batch()).eval()
    wanted = sum(F.cross_entropy(z, batch().labels) for z in distiller.said(distiller.traces(batch())[0]))
    torch.testing.assert_close(distiller(batch()).total, wanted)


def test_mistakes_are_told():
    labels = torch.arange(12) % 3
    with pytest.raises(ConfigError, match="two steps"):
        list(build("shike").trainings(cast_of(labels, TrainConfig(steps=1))))
    with pytest.raises(ConfigError, match="several experts"):
        list(build("shike").trainings(cast_of(labels, student=nn.Linear(2, 2))))
    assert len(next(build("shike", retrain=0.0).trainings(cast_of(labels, TrainConfig(steps=1)))).stages) == 1
    (training,) = build("shike", classifiers=["bn1.*", "experts.*.stages.*.0.*"]).trainings(cast_of(labels))
    training.stages[1].distiller.setup(batch())  # convolutions and norms can be drawn anew
    student = net()
    student.experts[0].bias = nn.Parameter(torch.zeros(3))
    (training,) = build("shike", classifiers=["experts.0.bias"]).trainings(cast_of(labels, student=student))
    with pytest.raises(ConfigError, match="cannot be drawn anew"):
        training.stages[1].distiller.setup(batch())
