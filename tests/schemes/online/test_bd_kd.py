"""BD-KD: the rule of its weights, its gradients against the definition, and that each loss moves its own model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.engine import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, build
from limbeck.schemes.online.bd_kd import bd_kd_loss


def net(seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 4)).double()


def batch(size: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(3)
    inputs = 3 * torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return Batch(inputs, torch.arange(size) % 4)


def distiller(key: str, peers: int = 1, **options: object):
    players = {f"large_{n}": net(n, 16) for n in range(1, peers + 1)}
    cast = Cast(net(0, 3), Terms.of(CrossEntropy()), None, TrainConfig(), players=players)
    (training,) = build(key, peers=list(players), **options).trainings(cast)
    return training.stages[0].distiller.setup(batch()).train()


def by_hand(student: Tensor, teacher: Tensor, delta: float, nu: float, temperature: float) -> Tensor:
    """Sample by sample, from the definition."""
    total = torch.zeros((), dtype=torch.float64)
    for own, other in zip(student, teacher, strict=True):
        q, p = (own / temperature).softmax(0), (other / temperature).softmax(0)
        entropies = [-(z.softmax(0) * z.softmax(0).log()).sum().item() for z in (own, other)]
        forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
        total = total + (
            nu * forward + delta * reverse if entropies[0] > entropies[1] else delta * forward + nu * reverse
        )
    return temperature**2 * total / len(student)


def test_value_and_gradient_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (4 * torch.randn(40, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    gradients = []
    for function in (bd_kd_loss, by_hand):
        own, other = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        value = function(own, other, delta=2.5, nu=0.5, temperature=3.0)
        value.backward()
        gradients.append((value.detach(), own.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)
    other = teacher.clone().requires_grad_()
    bd_kd_loss(student.requires_grad_(), other).backward()
    assert other.grad is None


def test_the_card_s_example_and_the_swap():
    sure, unsure = torch.tensor([[0.9, 0.1]]).log(), torch.zeros(1, 2)
    forward, reverse = math.log(0.5) * -1 + 0.9 * math.log(0.9) + 0.1 * math.log(0.1), 0.5 * math.log(0.25 / 0.09)
    assert (round(forward, 3), round(reverse, 3)) == (0.368, 0.511)
    value = bd_kd_loss(unsure, sure, delta=5.0, nu=1.0, temperature=1.0)  # the student is less sure
    assert value.item() == pytest.approx(forward + 5 * reverse, rel=1e-5)
    value = bd_kd_loss(sure, unsure, delta=5.0, nu=1.0, temperature=1.0)  # now the student is p, the teacher q
    assert value.item() == pytest.approx(5 * reverse + forward, rel=1e-5)  # 5 KL(teacher, student), and these swap


def test_nothing_is_left_to_learn_where_logits_agree_up_to_a_constant():
    logits = torch.randn(6, 5, dtype=torch.float64)
    for way in ("balanced", "forward", "reverse", "sum"):
        own = (logits + torch.arange(6.0).unsqueeze(1)).requires_grad_()
        value = bd_kd_loss(own, logits, way=way)
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-12)
        assert own.grad.abs().max() < 1e-12


def test_forward_alone_is_the_students_part_of_mutual_learning():
    ours, theirs = distiller("bd_kd", way="forward", temperature=1.0), distiller("mutual")
    for one in (ours, theirs):
        one(batch()).total.backward()
    for wanted, found in zip(theirs.student.parameters(), ours.student.parameters(), strict=True):
        assert torch.equal(wanted.grad, found.grad)
    large = [list(one.others[0].student.parameters()) for one in (ours, theirs)]
    assert any(not torch.equal(a.grad, b.grad) for a, b in zip(*large, strict=True))  # there it is the reverse one


def test_the_large_models_divergence_is_its_own_to_the_student():
    found = distiller("bd_kd", beta=0.7, temperature=2.0)
    found(batch()).total.backward()
    student, large = net(0, 3), net(1, 16)
    said, own = student(batch().inputs).detach(), large(batch().inputs)
    p, q = (own / 2).softmax(1), (said / 2).softmax(1)
    loss = nn.functional.cross_entropy(own, batch().labels) + 0.7 * 4 * (p * (p / q).log()).sum(1).mean()
    loss.backward()
    for wanted, parameter in zip(large.parameters(), found.others[0].student.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-9, atol=1e-12)


def test_of_several_large_models_divergences_are_averaged():
    losses = distiller("bd_kd", peers=2)(batch())
    assert float(losses.weights["with_1"]) == float(losses.weights["with_2"]) == 0.5
    assert {"peer_1/with_0", "peer_1/with_2", "peer_2/with_0"} <= set(losses.terms)


def test_parts_of_a_step_add_up():
    found = distiller("bd_kd")
    whole, data = found(batch()).total, batch()
    totals = {"labels": torch.tensor(24.0), "positions": torch.tensor(24.0)}
    parts = [Batch(data.inputs[r], data.labels[r], totals=totals) for r in (slice(0, 7), slice(7, 24))]
    torch.testing.assert_close(sum(found(part).total for part in parts), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": -1.0}, "delta"),
        ({"way": "both"}, "way"),
        ({"temperature": 0.0}, "above zero"),
        ({"beta": -0.5}, "beta"),
        ({"peers": []}, "nobody to learn with"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        build("bd_kd", **options)


def test_a_player_that_is_not_there():
    cast = Cast(net(0, 3), Terms.of(CrossEntropy()), None, TrainConfig(), players={"pear": copy.deepcopy(net(1, 8))})
    with pytest.raises(ConfigError, match="did you mean 'pear'"):
        list(build("bd_kd").trainings(cast))
