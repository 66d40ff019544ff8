"""Random teachers: the start, what does not move, and what labels are for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.data import as_loader
from limbeck.engine import TrainConfig, fit
from limbeck.models import create
from limbeck.objectives import CrossEntropy
from limbeck.recipes.entries import entries_of
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.self_taught.random_teacher_distillation import HeadMatching, approach

SMALL = {"prototypes": 64, "hidden": 32, "bottleneck": 16}


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.5, 1.0])
def test_the_start_varies_as_the_teacher_does(alpha: float) -> None:
    torch.manual_seed(0)
    teacher, other, student = (create("resnet20") for _ in range(3))
    approach(student, teacher, other, alpha)
    for own, near, far in zip(student.parameters(), teacher.parameters(), other.parameters(), strict=True):
        if alpha in (0.0, 1.0):
            assert torch.equal(own, far if alpha else near)
    sizes = [torch.cat([p.detach().flatten() for p in m.parameters() if p.ndim == 4]).std() for m in (student, teacher)]
    assert float(sizes[0] / sizes[1]) == pytest.approx(1.0, abs=0.02)
    norms = [m.weight for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in norms)


def pair(alpha: float, loss: str = "cross_entropy", bottleneck: int = 16) -> tuple[Distiller, Batch]:
    torch.manual_seed(0)
    student, other = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double() for _ in range(2))
    teacher, batch = copy.deepcopy(student), Batch(torch.randn(10, 6).double())
    approach(student, teacher, other, alpha)
    objective = HeadMatching(alpha, loss, 64, 32, bottleneck)  # type: ignore[arg-type]
    return Distiller(student, objective, teacher).setup(batch), batch


def test_a_copy_without_normalisation_stays_where_it_is() -> None:
    """With alpha 0 the loss is the teacher's entropy, and no gradient reaches the student."""
    distiller, batch = pair(0.0)
    losses = distiller(batch)
    losses.total.backward()
    (entropy,) = (v for k, v in losses.terms.items() if k.endswith("/entropy"))
    torch.testing.assert_close(losses.total.detach(), entropy)
    gradients = [p.grad for p in distiller.parameters() if p.grad is not None]
    assert gradients
    assert max(float(g.abs().max()) for g in gradients) < 1e-12


@pytest.mark.parametrize("bottleneck", [16, 0])
def test_the_loss_is_cross_entropy_of_both_heads(bottleneck: int) -> None:
    distiller, batch = pair(0.7, bottleneck=bottleneck)
    (objective,) = distiller.loss
    with torch.no_grad():
        said = objective.own(distiller.student[:2](batch.inputs))
        wanted = objective.fixed(distiller.teacher.model[:2](batch.inputs))
    torch.testing.assert_close(
        distiller(batch).total.detach(), -(wanted.softmax(1) * said.log_softmax(1)).sum(1).mean()
    )
    large = objective.own(1e6 * torch.randn(5, 8).double()).abs().max()
    assert (float(large.detach()) <= 1 + 1e-12) == bool(bottleneck)  # cosines
    regression, batch = pair(0.7, "mse", bottleneck)
    assert list(regression(batch).terms) == ["headmatching/mse"]


def cast(**train) -> Cast:
    torch.manual_seed(0)
    x = torch.randn(48, 1, 8, 8)
    data = as_loader((x, torch.arange(48) % 3), batch_size=16, train=True)
    student = create("resnet8", num_classes=3, in_channels=1)
    other = create("resnet8", num_classes=3, in_channels=1)
    loss = Terms.of(CrossEntropy())
    return Cast(student, loss, None, TrainConfig(**(train or {"epochs": 4, "lr": 0.05})), data, fresh=lambda _: other)


def test_the_teacher_stays_and_the_probe_leaves_features_alone() -> None:
    given = cast()
    (training,) = build("random_teacher_distillation", share=0.5, **SMALL).trainings(given)
    distill, probe = training.stages
    teacher = distill.distiller.teacher.model
    before = copy.deepcopy(teacher.state_dict())
    start = copy.deepcopy(given.student.state_dict())
    assert probe.learn == ("linear.*",)
    fit([distill], given.train, quiet=True)
    middle = copy.deepcopy(given.student.state_dict())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert torch.equal(start["linear.weight"], middle["linear.weight"])  # no label was read
    assert not torch.equal(start["layer1.0.conv1.weight"], middle["layer1.0.conv1.weight"])
    fit([probe], given.train, quiet=True)
    changed = {name for name, value in given.student.state_dict().items() if not torch.equal(value, middle[name])}
    assert changed == {"linear.weight", "linear.bias"}


def test_labels_are_never_read_while_distilling() -> None:
    given = cast()
    blind = as_loader(torch.randn(48, 1, 8, 8), batch_size=16, train=True)
    (training,) = build("random_teacher_distillation", **SMALL).trainings(given)
    assert fit(training.stages[:1], blind, quiet=True).steps == 9


def test_a_far_student_comes_nearer() -> None:
    """From an independent start the divergence falls, and the teacher's entropy, which stands beside it, stays."""
    given = cast(steps=30, optimizer="adamw", lr=3e-3, weight_decay=0.0, schedule="constant", compile="off")
    (training,) = build("random_teacher_distillation", alpha=1.0, share=0.9, **SMALL).trainings(given)
    lines = fit(training.stages[:1], given.train, quiet=True).history
    terms = [line["terms"] for line in lines if line["split"] == "train"]
    assert terms[-1]["headmatching/divergence"] < 0.7 * terms[0]["headmatching/divergence"]
    assert terms[-1]["headmatching/entropy"] == pytest.approx(terms[0]["headmatching/entropy"], rel=0.05)


def test_its_name_is_no_control_of_comparisons() -> None:
    """Else a comparison that has the control would drop the method as written twice."""
    entries = entries_of(["random_teacher_distillation"], ["no_teacher", "random_teacher"])
    assert [(e.role, e.scheme) for e in entries] == [
        ("control", "offline"),
        ("control", "offline"),
        ("method", "random_teacher_distillation"),
    ]
    assert len({e.name for e in entries}) == 3


def test_finetuning_and_mistakes() -> None:
    fitted = perform(build("random_teacher_distillation", share=0.5, then="finetune", **SMALL), cast(), quiet=True)
    assert {line["stage"] for line in fitted.history} == {"distill", "finetune"}
    with pytest.raises(ConfigError, match="alpha"):
        build("random_teacher_distillation", alpha=2.0)
    with pytest.raises(ConfigError, match="bottleneck"):
        build("random_teacher_distillation", bottleneck=-1)
