"""RL-KD: what the student hears, the policy's gradient against enumeration, and that a bad teacher is found out."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.resident import ResidentLoader
from limbeck.engine import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.objectives.response.kd import kd_loss
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.many_teachers.choosing import Policy, selected_rows


def net(seed: int, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 4))


def batch() -> Batch:
    inputs = torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
    return Batch(inputs, torch.arange(12) % 4, torch.arange(12))


def stages(teachers=2, loader=None, config=None, **options):
    named = {f"t{n}": FrozenTeacher(net(n + 1)) for n in range(teachers)}
    loader = loader or ResidentLoader(torch.randn(40, 5), torch.arange(40) % 4, batch_size=12)
    loss = 0.5 * Terms.of(CrossEntropy())
    cast = Cast(net(0), loss, None, config or TrainConfig(steps=10), train=loader, teachers=named)
    (training,) = build("rl_kd", **options).trainings(cast)
    return training


def selecting(**options):
    found = stages(**options).stages[-1].distiller.setup(batch()).train()
    assert found.selects
    return found


def test_all_chosen_it_is_the_average_of_all_and_one_chosen_its_own():
    student, teachers = torch.randn(2, 6, 4).unbind()[0], torch.randn(3, 6, 4)
    entropies = [-((z / 2).softmax(1) * (z / 2).log_softmax(1)).sum(1).mean() for z in teachers]
    apart = [kd_loss(student, z, temperature=2.0) + 4 * h for z, h in zip(teachers, entropies, strict=True)]
    every = selected_rows(student, teachers, torch.ones(3, 6), 2.0).mean()
    torch.testing.assert_close(every, sum(apart) / 3)
    one = torch.tensor([0.0, 1.0, 0.0]).unsqueeze(1).expand(3, 6)
    torch.testing.assert_close(selected_rows(student, teachers, one, 2.0).mean(), apart[1])


def test_nobody_chosen_is_nothing_and_no_division_by_zero():
    student = torch.randn(6, 4, requires_grad=True)
    value = selected_rows(student, torch.randn(3, 6, 4), torch.zeros(3, 6)).sum()
    value.backward()
    assert value == 0
    assert torch.equal(student.grad, torch.zeros(6, 4))


def test_the_warm_stage_hears_all_teachers():
    found = stages().stages[0].distiller.setup(batch()).train()
    losses = found(found.made(batch()))
    x, student = batch().inputs, found.student
    mean = sum(net(n)(x).softmax(1) for n in (1, 2)) / 2
    wanted = 0.5 * F.cross_entropy(student(x), batch().labels) - 0.5 * (mean * student(x).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses.total, wanted)
    assert found.turns == ("student",)


def test_both_turns_throw_the_same_dice_and_chances_are_the_policys():
    found = selecting(reward="loss", start=0.6)
    many = Batch(torch.randn(4000, 5), torch.arange(4000) % 4)
    made = found.made(many)
    teacher = found.teacher(made)
    logits = torch.stack([m.logits for m in teacher.members])
    first, second = (found._choose(teacher, made, logits)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.mean().item() == pytest.approx(0.6, abs=0.02)
    assert not torch.equal(found._choose(teacher, found.made(many), logits)[0], first)


def test_the_gradient_is_that_of_the_expected_reward():
    """Over all choices of two teachers for one sample, weighted by their chances: the derivative of E[R]."""
    found = selecting(reward="loss", credit="sample", episode=1, start=0.7)
    one = Batch(batch().inputs[:1], batch().labels[:1])
    teacher, policy = found.teacher(one), found.policy
    nn.init.normal_(policy.weight, std=0.3)
    logits = torch.stack([m.logits for m in teacher.members])
    states, _ = found._states(teacher, one)
    said = found.student.eval()(one.inputs)
    expected = torch.zeros(())
    sampled = [torch.zeros_like(p) for p in policy.parameters()]
    for choice in itertools.product([0.0, 1.0], repeat=2):
        chosen = torch.tensor(choice).unsqueeze(1)
        chance = torch.where(chosen > 0, policy(states).sigmoid(), 1 - policy(states).sigmoid()).prod()
        reward = found._rewards(said, logits, chosen, one).detach().squeeze()
        expected = expected + chance * reward
        found.gathered.zero_(), found.steps.fill_(1), found.baseline.fill_(0.3)
        log_chance = -F.binary_cross_entropy_with_logits(policy(states), chosen, reduction="none")
        total = found._judge(one, logits, chosen, log_chance).total
        for kept, part in zip(sampled, torch.autograd.grad(total, list(policy.parameters())), strict=True):
            kept -= chance.detach() * part
    wanted = torch.autograd.grad(expected, list(policy.parameters()))
    for one_found, one_wanted in zip(sampled, wanted, strict=True):
        torch.testing.assert_close(one_found, one_wanted, rtol=1e-4, atol=1e-6)


def test_within_an_episode_the_policy_stays_and_then_moves_by_all_of_it():
    found = selecting(reward="loss", episode=3)
    gradients = []
    for _ in range(3):
        total = found(found.made(batch()), "policy").total
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(found.policy.parameters()))]))
    assert torch.equal(gradients[0], torch.zeros_like(gradients[0]))
    assert torch.equal(gradients[1], torch.zeros_like(gradients[1]))
    assert gradients[2].abs().max() > 0
    assert torch.equal(found.gathered, torch.zeros_like(found.gathered))


def test_the_rewards():
    found = {name: selecting(reward=name, gamma=0.25) for name in ("labels", "loss", "held_out")}
    one, said = batch(), net(0)(batch().inputs)
    logits = torch.stack([net(n)(one.inputs) for n in (1, 2)])
    chosen = torch.ones(2, 12)
    nobody = found["loss"]._rewards(said, logits, 0 * chosen, one)
    rewards = {name: d._rewards(said, logits, chosen, one) for name, d in found.items()}
    ce, dl = F.cross_entropy(said, one.labels), selected_rows(said, logits, chosen).mean()
    torch.testing.assert_close(rewards["labels"], (-ce).expand(12))
    torch.testing.assert_close(rewards["loss"], (-ce - dl).expand(12))
    assert torch.equal(nobody, rewards["loss"])  # nothing is gained by choosing nobody
    (judges,) = found["held_out"]._judges
    accuracy = (net(0)(judges.inputs).argmax(1) == judges.labels).float().mean()
    torch.testing.assert_close(rewards["held_out"], (0.25 * (-ce - dl) + 0.75 * accuracy).expand(12))


def test_who_judges_is_not_learned_from():
    training = stages(reward="held_out", share=0.25)
    judges = torch.cat([b.index for b in training.stages[-1].distiller._held.batches()])
    seen = training.train.only
    assert len(judges) == 10
    assert len(seen) == 30
    assert not set(judges.tolist()) & set(seen.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["loss", "held_out"])
def test_a_teacher_that_says_anything_is_chosen_less(reward):
    """One knows the task, the other answers at random: its chance falls below one half, the first one's does not."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 5)
    labels = inputs[:, :4].argmax(1)
    right, wrong = nn.Linear(5, 4), nn.Linear(5, 4)
    with torch.no_grad():
        right.weight.copy_(3 * torch.eye(4, 5)), right.bias.zero_()
        wrong.weight.copy_(3 * torch.eye(4, 5).roll(2, 0)), wrong.bias.zero_()
    loader = ResidentLoader(inputs, labels, batch_size=40, shuffle=True)
    named = {"right": FrozenTeacher(right), "wrong": FrozenTeacher(wrong)}
    config = TrainConfig(steps=100, lr=0.05)
    cast = Cast(net(0), 0.5 * Terms.of(CrossEntropy()), None, config, train=loader, teachers=named)
    scheme = build("rl_kd", reward=reward, credit="sample", start=0.6, episode=1, lr=0.3, warm=0.1)
    (training,) = scheme.trainings(cast)
    distiller = training.stages[-1].distiller
    scheme.trainings = lambda _: iter([training])
    perform(scheme, cast, quiet=True)
    teacher = distiller.teacher(Batch(inputs, labels))
    states, _ = distiller._states(teacher, Batch(inputs, labels))
    chances = distiller.policy(states).sigmoid().mean(1)
    assert chances[1] < 0.5
    assert chances[0] > 0.5


def test_what_it_refuses():
    found = selecting(reward="loss")
    with pytest.raises(ConfigError, match="cannot be cut into parts"):
        stages(config=TrainConfig(steps=10, accumulate=2))
    with pytest.raises(DataError, match="labels"):
        found.made(Batch(batch().inputs))
    with pytest.raises(ConfigError, match="start"):
        build("rl_kd", start=1.0)
    with pytest.raises(ConfigError, match="2 teachers or more"):
        stages(teachers=1)
    assert Policy(3, 2, 0.5).bias.abs().max() == 0
