"""MDCS: priors of the experts, two views, and who teaches whom between them."""

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
from limbeck.objectives import CrossEntropy, FitNets
from limbeck.schemes import Cast, build
from limbeck.schemes.self_taught.mdcs import consistency

COUNTS = torch.tensor([16, 8, 4])
LABELS = torch.arange(3).repeat_interleave(COUNTS)


def data(labels: torch.Tensor = LABELS, batch_size: int = 4):
    generator = torch.Generator().manual_seed(1)
    return as_loader((torch.randn(len(labels), 1, 8, 8, generator=generator), labels), batch_size=batch_size)


def batch(size: int = 9, progress: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(5)
    return Batch(torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 3, progress=progress)


def net(experts: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return create("resnet8_experts", num_classes=3, in_channels=1, widths=(4, 4, 8, 8), experts=experts)


def trained(labels: torch.Tensor = LABELS, loss=None, config: TrainConfig | None = None, **options: object):
    cast = Cast(net(), Terms.of(loss or CrossEntropy()), None, config or TrainConfig(), data(labels))
    (training,) = build("mdcs", **options).trainings(cast)
    return training


def heads(distiller, given: Batch) -> list[torch.Tensor]:
    return distiller.said(distiller.traces(given)[0])


def test_a_step_is_the_sum_of_the_paper():
    distiller = trained(ramp=0.5).stages[0].distiller.setup(batch()).eval().double()
    given = distiller.made(batch(progress=0.25).replace(inputs=batch().inputs.double()))
    losses = distiller(given)
    wanted, prior = torch.zeros((), dtype=torch.float64), COUNTS.double()
    for exponent, logits in zip((-0.5, 1.0, 2.5), heads(distiller, given), strict=True):
        adjusted = logits + (prior**exponent + 1e-9).log()
        wanted = wanted + F.cross_entropy(adjusted, given.labels)
        weak, strong = adjusted[:9].detach(), adjusted[9:]
        right = [i for i in range(9) if int(weak[i].argmax()) == int(given.labels[i])]
        kls = [F.kl_div(strong[i].log_softmax(0), weak[i].softmax(0), reduction="sum") for i in right]
        wanted = wanted + 0.5 * 0.6 * sum(kls) / max(len(kls), 1)
    torch.testing.assert_close(losses.total, wanted, rtol=1e-6, atol=1e-7)
    assert losses.logits is not None


def test_a_constant_in_the_prior_changes_nothing_and_exponents_of_0_are_plain_experts():
    distiller = trained(exponents=[0.0, 0.0, 0.0], weight=0.0).stages[0].distiller.setup(batch()).eval()
    given = distiller.made(batch())
    plain = sum(F.cross_entropy(z, given.labels) for z in heads(distiller, given))
    torch.testing.assert_close(distiller(given).total, plain)
    twice = [trained(LABELS.repeat(n)).stages[0].distiller.setup(batch()).eval() for n in (1, 2)]
    torch.testing.assert_close(twice[0](given).total, twice[1](given).total)


def test_classes_as_frequent_as_each_other_make_the_experts_alike():
    distiller = trained(torch.arange(24) % 3).stages[0].distiller.setup(batch()).eval()
    given = distiller.made(batch())
    losses = distiller(given)
    for name, logits in zip(("", "expert_1/", "expert_2/"), heads(distiller, given), strict=True):
        torch.testing.assert_close(losses.terms[f"{name}cross_entropy"], F.cross_entropy(logits, given.labels))


def test_views_alike_teach_nothing_and_the_weak_view_is_a_constant():
    distiller = trained(strong=0.0).stages[0].distiller.setup(batch()).eval()
    assert float(distiller(distiller.made(batch())).terms["consistency"]) == pytest.approx(0, abs=1e-6)
    torch.manual_seed(3)
    weak, strong = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    labels = weak.argmax(1)
    labels[3] = (labels[3] + 1) % 4  # got wrong
    labels[4] = -1  # not known
    consistency(weak, strong, labels).backward()
    assert weak.grad is None
    assert strong.grad[[3, 4]].abs().max() == 0
    assert strong.grad[[0, 1, 2, 5]].abs().sum(1).min() > 0


def test_the_tail_is_cut_where_that_is_asked_for_and_the_student_stays_plain():
    training = trained(torch.arange(60) % 3, config=TrainConfig(steps=2), imbalance=4.0)
    assert training.train.shown == 20 + 10 + 5
    distiller = training.stages[0].distiller
    torch.testing.assert_close(distiller.shifts[1], torch.tensor([20.0, 10.0, 5.0]).log())
    fit(training.stages, training.train, quiet=True)
    assert not any(m._forward_hooks for m in training.student.modules())


@pytest.mark.slow
def test_rare_classes_are_found_more_often_than_by_one_plain_model():
    """A tail of two blurred classes: what the expert of rare classes says is the rare one more often."""
    torch.manual_seed(2)
    labels = torch.tensor([0] * 36 + [1] * 4)
    images = torch.randn(40, 1, 8, 8) + 0.25 * (2 * labels - 1).view(-1, 1, 1, 1)
    found = {}
    for name, exponents in {"plain": [0.0, 0.0, 0.0], "mdcs": [-0.5, 1.0, 2.5]}.items():
        student = create("resnet8_experts", num_classes=2, in_channels=1, widths=(4, 4, 8, 8), head="linear")
        student.load_state_dict(found.get("start", student.state_dict()))
        found.setdefault("start", {k: v.clone() for k, v in student.state_dict().items()})
        train = as_loader((images, labels), batch_size=20)
        cast = Cast(student, Terms.of(CrossEntropy()), None, TrainConfig(steps=16, lr=0.05), train)
        (training,) = build("mdcs", exponents=exponents).trainings(cast)
        fit(training.stages, train, quiet=True)
        with torch.no_grad():
            signs = torch.ones(200).index_fill(0, torch.arange(100), -1.0)
            unseen = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(9))
            unseen = unseen + 0.25 * signs.view(-1, 1, 1, 1)
            found[name] = float(student.train()(unseen)[100:].softmax(1)[:, 1].mean())
    assert found["mdcs"] > found["plain"] + 0.1


@pytest.mark.parametrize(
    ("cast", "options", "said"),
    [
        ({"student": nn.Linear(4, 3)}, {}, "several experts"),
        ({"student": net(2)}, {}, "every expert has an exponent"),
        ({"config": TrainConfig(accumulate=2)}, {}, "cannot be cut into parts"),
        ({"loss": Terms.of(FitNets())}, {}, "listens elsewhere|without a teacher"),
        ({}, {"weight": -1.0}, "weight"),
    ],
)
def test_mistakes_are_told(cast, options, said):
    settings = {"student": net(), "loss": Terms.of(CrossEntropy()), "teacher": None, "config": TrainConfig()}
    with pytest.raises(ConfigError, match=said):
        list(build("mdcs", **options).trainings(Cast(**{**settings, "train": data(), **cast})))
