"""MEAL V2: what its loss sees, who moves in which turn, and that a finished student gets better without labels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.resident import ResidentLoader
from limbeck.engine import TrainConfig
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes import Cast, build, perform


def net(seed: int, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4)).double()


def batch(labels: bool = True) -> Batch:
    inputs = torch.randn(12, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Batch(inputs, torch.arange(12) % 4 if labels else None)


def distiller(loss=None, **options):
    teachers = {name: FrozenTeacher(net(n)) for n, name in enumerate("abc", 1)}
    cast = Cast(net(0), Terms.of(KD(1.0) if loss is None else loss), None, TrainConfig(), teachers=teachers)
    (training,) = build("meal_v2", **options).trainings(cast)
    return training.stages[0].distiller.setup(batch()).double().train()


def test_the_gradient_is_how_far_the_student_is_from_the_mean_probability():
    found = distiller(adversary="off")
    logits = found.student(batch().inputs).detach().requires_grad_()
    p = sum(m.logits.softmax(1) for m in found.teacher(batch()).members) / 3
    F.kl_div(logits.log_softmax(1), p, reduction="batchmean").backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(1) - p) / 12)
    wanted = F.kl_div(logits.log_softmax(1), p, reduction="batchmean")
    torch.testing.assert_close(found(batch()).total, wanted)


def test_labels_never_enter():
    for adversary in ("joint", "reversal", "off"):
        found = distiller(adversary=adversary)
        torch.manual_seed(0)
        totals = [found(b).total for b in (batch(), batch().replace(labels=torch.zeros(12).long()), batch(False))]
        assert totals[0] == totals[1] == totals[2]
    with pytest.raises(ConfigError, match="learns from teachers alone.*cross_entropy"):
        distiller(0.1 * CrossEntropy() + KD(1.0))
    assert "cross_entropy" in distiller(0.1 * CrossEntropy() + KD(1.0), labels=True)(batch()).terms


def test_the_order_of_teachers_does_not_matter_and_equal_ones_are_one():
    found = distiller()
    members = found.teacher.members
    value = found(batch()).total
    found.teacher.members = members[::-1]
    torch.testing.assert_close(found(batch()).total, value)
    found.teacher.members = (members[0],) * 3
    torch.testing.assert_close(found.teacher(batch()).logits.softmax(1), members[0](batch()).logits.softmax(1))


def test_joint_moves_both_one_way_and_reversal_each_its_own():
    """In reversal the student's gradient of the discriminator's loss is turned round; the discriminator's is not."""

    def gradients(adversary, turn, weight):
        found = distiller(adversary=adversary, weight=weight)
        torch.manual_seed(1)
        for p in found.judge.parameters():
            nn.init.uniform_(p, 0.1, 0.5)
        found(batch(), turn).total.backward()
        return {n: p.grad for n, p in found.named_parameters() if p.grad is not None}

    plain = gradients("off", "student", 1.0)
    joint, turned = gradients("joint", "student", 1.0), gradients("reversal", "student", 1.0)
    name = "student.3.weight"
    assert (joint[name] - plain[name]).abs().max() > 1e-6
    assert (turned[name] - plain[name]).abs().max() > 1e-6
    assert ((joint[name] - plain[name]) * (turned[name] - plain[name])).sum() < 0
    own = gradients("reversal", "discriminator", 1.0)
    assert own
    assert all(n.startswith("judge.") for n in own)


def test_each_player_has_its_own_parameters_and_the_students_statistics_stay():
    found = distiller(adversary="reversal", lr_discriminator=0.003)
    split = [{id(p) for p in found.parameters_of(turn)} for turn in found.turns]
    assert split[0] & split[1] == set()
    assert split[0] | split[1] == {id(p) for p in found.parameters()}
    assert found.settings_of("discriminator") == {"lr": 0.003}
    before = copy.deepcopy(found.student.state_dict())
    found(batch(), "discriminator")
    assert all(torch.equal(v, before[k]) for k, v in found.student.state_dict().items())


@pytest.mark.parametrize("adversary", ["joint", "reversal"])
def test_parts_of_a_step_add_up(adversary):
    found, data = distiller(adversary=adversary).eval(), batch()
    totals = {"positions": torch.tensor(12.0)}
    for turn in found.turns:
        parts = [Batch(data.inputs[r], data.labels[r], totals=totals) for r in (slice(0, 5), slice(5, 12))]
        torch.testing.assert_close(sum(found(part, turn).total for part in parts), found(data, turn).total)


@pytest.mark.parametrize("adversary", ["joint", "reversal", "off"])
def test_a_finished_student_comes_nearer_to_the_ensemble(adversary):
    torch.manual_seed(0)
    inputs = torch.randn(256, 5, dtype=torch.float64)
    teachers = [net(n, 32).eval() for n in (1, 2)]
    goal = sum(t(inputs).softmax(1) for t in teachers).detach() / 2
    student = net(0)
    far = [F.kl_div(student.eval()(inputs).log_softmax(1), goal, reduction="batchmean").item()]
    named = {name: FrozenTeacher(t) for name, t in zip("ab", teachers, strict=True)}
    loader = ResidentLoader(inputs, batch_size=64, shuffle=True)
    config = TrainConfig(steps=60, lr=0.05, weight_decay=0.0)
    cast = Cast(student, Terms.of(KD(1.0)), None, config, train=loader, teachers=named)
    perform(build("meal_v2", adversary=adversary, weight=0.1), cast, quiet=True)
    far.append(F.kl_div(student.eval()(inputs).log_softmax(1), goal, reduction="batchmean").item())
    assert far[1] < 0.5 * far[0]


@pytest.mark.parametrize(
    ("options", "message"), [({"adversary": "both"}, "'joint', 'reversal' or 'off'"), ({"shrink": 0}, "shrink")]
)
def test_what_it_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        build("meal_v2", **options)
