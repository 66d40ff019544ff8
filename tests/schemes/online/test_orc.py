"""ORC: who teaches whom in a step, each turn's loss against the definition, and that teachers are not moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data import as_loader
from limbeck.engine import TrainConfig, fit
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, build
from limbeck.schemes.online.orc_feedback import feedback_rows

SIZE = 20


def net(seed: int, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 4)).double()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    return Batch(3 * torch.randn(SIZE, 5, generator=generator, dtype=torch.float64), torch.arange(SIZE) % 4)


def training(peers: int = 2, config: TrainConfig | None = None, **options: object):
    players = {f"peer_{n}": net(n, 6 + n) for n in range(1, peers + 1)}
    teacher = FrozenTeacher(net(9, 16))
    cast = Cast(net(0), Terms.of(CrossEntropy()), teacher, config or TrainConfig(), players=players)
    (found,) = build("orc", peers=list(players), **options).trainings(cast)
    return found, teacher


def group(peers: int = 2, **options: object):
    return training(peers, **options)[0].stages[0].distiller.setup(batch()).train()


def gradients(module: nn.Module) -> list[torch.Tensor | None]:
    found = [p.grad for p in module.parameters()]
    module.zero_grad(set_to_none=True)
    return found


def eval_logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        said = model(batch().inputs)
    model.train()
    return said


def kl(own: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    p, log_q = (teacher / temperature).softmax(1), (own / temperature).log_softmax(1)
    return temperature**2 * (p * (p.log() - log_q)).sum(1).mean()


def test_the_best_is_who_has_the_least_cross_entropy_and_the_order_is_the_papers():
    found, data = group(), batch()
    before = {k: v.clone() for k, v in found.state_dict().items()}
    made = found.made(data)
    assert all(torch.equal(v, before[k]) for k, v in found.state_dict().items())  # judged without a trace
    losses = [F.cross_entropy(eval_logits(one.student), data.labels).item() for one in found.group]
    best = min(range(3), key=losses.__getitem__)
    assert made.extras["roles"]["best"] == [best]
    assert found.turns[:2] == ("pivot", found.names[best])
    assert sorted(found.turns) == ["peer_1", "peer_2", "pivot", "student"]
    two = group(promoted=2)
    assert len(two.made(data).extras["roles"]["best"]) == 2


def test_roles_change_with_what_the_models_know():
    found, data = group(), batch()
    first = found.made(data).extras["roles"]["best"][0]
    with torch.no_grad():
        for parameter in found.group[first].student[-1].parameters():
            parameter.mul_(-5)  # it now says the opposite, and is sure of it
    assert found.made(data).extras["roles"]["best"][0] != first


def test_who_does_worst_gives_most_and_its_worst_samples():
    generator = torch.Generator().manual_seed(1)
    losses = torch.rand(3, 50, generator=generator) + torch.tensor([[0.0], [2.0], [0.5]])
    rows = feedback_rows(losses)
    shares = losses.mean(1).softmax(0) * 50
    counts = torch.diff(torch.cat([torch.zeros(1), shares.cumsum(0)]).round()).long().tolist()
    assert len(rows) == sum(counts) == 50
    assert max(counts) == counts[1]
    for own, part in zip(losses, rows.split(counts), strict=True):
        assert part.tolist() == own.argsort(descending=True, stable=True)[: len(part)].tolist()


def test_intensive_teaching_is_that_of_a_mixture_and_of_the_batch_where_all_is_the_batch():
    found = group()
    made = found.made(batch())
    roles = made.extras["roles"]
    share, rows = roles["share"], roles["rows"]
    assert 0 < float(share) < 1
    torch.testing.assert_close(roles["mixed"], share * made.inputs + (1 - share) * made.inputs[rows])
    wanted = F.cross_entropy(found.pivot.student(roles["mixed"]), made.labels, reduction="none")
    other = F.cross_entropy(found.pivot.student(roles["mixed"]), made.labels[rows], reduction="none")
    losses = found(made, "pivot")
    torch.testing.assert_close(losses.total, (share * wanted + (1 - share) * other).mean())
    plain = group(feedback="none")
    value = plain(plain.made(batch()), "pivot").total
    torch.testing.assert_close(value, F.cross_entropy(plain.pivot.student(batch().inputs), batch().labels))
    alone = group(feedback="alone").made(batch()).extras["roles"]
    torch.testing.assert_close(alone["mixed"], batch().inputs[alone["rows"]])


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_private_and_group_teaching_against_the_definition(beta):
    found = group(beta=beta, temperature=2.0)
    made = found.made(batch())
    best = made.extras["roles"]["best"][0]
    pivot, temporary = (eval_logits(one.student) for one in (found.pivot, found.group[best]))
    for number, one in enumerate(found.group):
        own = one.student(made.inputs)
        wanted = (1 - beta) * F.cross_entropy(own, made.labels) + beta * kl(own, pivot, 2.0)
        wanted = wanted if number == best else wanted + beta * kl(own, temporary, 2.0)
        torch.testing.assert_close(found(made, found.names[number]).total, wanted)


def test_a_turn_moves_nobody_else():
    found = group()
    made = found.made(batch())
    players = {"pivot": found.pivot.student, **dict(zip(found.names, (o.student for o in found.group), strict=True))}
    for turn in found.turns:
        own = {id(p) for p in found.parameters_of(turn)}
        assert {id(p) for p in players[turn].parameters()} <= own
        found(made, turn).total.backward()
        for name, model in players.items():
            moved = gradients(model)
            assert all(g is not None for g in moved) if name == turn else all(g is None for g in moved)
    every = [id(p) for turn in found.turns for p in found.parameters_of(turn)]
    assert len(every) == len(set(every)) == len(list(found.parameters()))


def test_without_others_it_is_plain_distillation_from_the_pivot():
    found = group(peers=0, beta=0.9)
    made = found.made(batch())
    assert found.turns == ("pivot", "student")
    own = found.student(made.inputs)
    wanted = 0.1 * F.cross_entropy(own, made.labels) + 0.9 * kl(own, eval_logits(found.pivot.student), 4.0)
    torch.testing.assert_close(found(made, "student").total, wanted)


def test_it_trains_by_turns_and_the_recipes_teacher_stays_as_it_is():
    inputs, labels = batch().inputs, batch().labels
    found, teacher = training(config=TrainConfig(steps=12, lr=0.05), pivot_lr=0.01)
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    result = fit(found.stages, as_loader((inputs, labels), batch_size=10, train=True), quiet=True)
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())
    pivot = found.stages[0].distiller.pivot.student
    assert any(not torch.equal(v, before[k]) for k, v in pivot.state_dict().items())
    assert {"pivot/feedback", "student/from_pivot", "peer_1/from_pivot"} <= set(result.history[-1]["terms"])
    assert not any(m._forward_hooks for m in result.student.modules())


def test_what_cannot_be_is_told():
    loader = as_loader((batch().inputs, batch().labels), batch_size=10, train=True)
    with pytest.raises(ConfigError, match="ORC gives out roles over a whole batch"):
        fit(training(config=TrainConfig(steps=2, accumulate=2))[0].stages, loader, quiet=True)
    with pytest.raises(ConfigError, match="3 of 2"):
        build("orc", promoted=3)
    with pytest.raises(ConfigError, match="'mixed', 'alone' or 'none'"):
        build("orc", feedback="some")
    with pytest.raises(DataError, match="mixed in"):
        group().made(Batch((batch().inputs,), batch().labels))
    cast = Cast(net(0), Terms.of(CrossEntropy()), None, TrainConfig(), players={"peer": net(1)})
    with pytest.raises(ConfigError, match="the group learns from a teacher"):
        list(build("orc").trainings(cast))
    (found,) = build("orc", pivot="peer", peers=[]).trainings(cast)
    assert found.stages[0].distiller.pivot.student is cast.players["peer"]
