"""Students of mixtures of experts: who moves when, by what loss, and what the teacher says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, ModelError
from limbeck.core.teacher import FrozenTeacher
from limbeck.objectives import JSD, CrossEntropy, ReverseKL
from limbeck.schemes import Cast, Offline, perform
from limbeck.schemes.language.moe_kd import MixtureDistiller, MoEKD, imbalance
from limbeck.teachers.experts import EveryExpert, ExpertsTeacher, Router
from tests.schemes.tiny import cast, llama, mixtral, weights


def scene(loss: Any = None, **changes: Any) -> Cast:
    teacher = FrozenTeacher(mixtral(seed=3).double())
    return cast(ReverseKL() if loss is None else loss, **{"teacher": teacher, **changes})


def distiller(given: Cast, **options: Any) -> MixtureDistiller:
    (training,) = MoEKD(**{"lmbda": 0.0, **options}).trainings(given)
    found = training.stages[0].distiller
    assert isinstance(found, MixtureDistiller)
    return found


def step(batch: Batch) -> Batch:
    return batch.replace(progress=torch.tensor(0.5))


def moved(module: nn.Module, before: torch.Tensor) -> bool:
    return not torch.equal(weights(module), before)


def test_the_models_own_experts_are_plain_distillation() -> None:
    """lambda 0, one pass, and as many experts as the model asks: every step is that of the model itself."""
    found = [
        perform(scheme, scene(CrossEntropy() + JSD()), quiet=True).student
        for scheme in (MoEKD(passes=1, chance=0.0, experts=2, lmbda=0.0), Offline())
    ]
    assert torch.equal(weights(found[0]), weights(found[1]))


def test_several_passes_are_the_mean_of_their_losses() -> None:
    given = scene()
    made, batch = distiller(given, passes=3, chance=0.7), step(given.train.example(5))
    made.setup(batch)
    torch.manual_seed(0)
    losses = made(batch)
    torch.manual_seed(0)
    assert isinstance(made.teacher, ExpertsTeacher)
    members = made.teacher(batch).members
    own = given.student(**batch.inputs).logits.log_softmax(-1)
    each = []
    for member in members:
        other = member.logits.log_softmax(-1)
        each.append((own.exp() * (own - other)).sum(-1)[batch.mask].mean())
    torch.testing.assert_close(losses.total, sum(each) / 3)
    torch.testing.assert_close(losses.terms["reverse_kl"], (sum(each) / 3).detach())
    assert len({round(float(e), 9) for e in each}) == 3


def test_each_turn_moves_only_who_has_it() -> None:
    given = scene()
    made, batch = distiller(given, way="student_aware"), step(given.train.example(6))
    made.setup(batch)
    assert made.turns == ("router", "student")
    assert made.settings_of("router") == {"lr": pytest.approx(0.001)}  # a hundredth of the student's
    assert made.settings_of("student") == {}
    assert isinstance(made.teacher, EveryExpert)
    model = made.teacher.model
    players = {turn: list(made.parameters_of(turn)) for turn in made.turns}
    assert not {id(p) for p in players["router"]} & {id(p) for p in players["student"]}
    for turn, parts in (("router", (True, False)), ("student", (False, True))):
        before = weights(made.routers), weights(given.student), weights(model)
        optimizer = torch.optim.SGD(players[turn], lr=0.1)
        made.zero_grad()
        made(batch, turn).total.backward()
        optimizer.step()
        now = moved(made.routers, before[0]), moved(given.student, before[1]), moved(model, before[2])
        assert now == (*parts, False)


def test_the_routers_loss_is_the_divergence_and_the_imbalance() -> None:
    given = scene()
    made, batch = distiller(given, way="student_aware", balance=0.3), step(given.train.example(6))
    made.setup(batch)
    losses = made(batch, "router")
    own = given.student(**batch.inputs).logits.log_softmax(-1)
    with torch.no_grad():
        other = made.teacher(batch).logits.log_softmax(-1)
    divergence = (own.exp() * (own - other)).sum(-1)[batch.mask].mean()
    torch.testing.assert_close(losses.terms["router_kl"], divergence.detach())
    _, gates = made.teacher.learning(batch)
    whole = 0.0
    for logits in gates:
        rows = logits[batch.mask.flatten()].softmax(-1)
        asked = [row.topk(2).indices.tolist() for row in rows]
        fractions = [sum(e in a for a in asked) / (2 * len(asked)) for e in range(4)]
        whole += 4 * sum(f * float(rows[:, e].mean()) for e, f in enumerate(fractions))
    torch.testing.assert_close(losses.terms["balance"].item(), whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.total, losses.terms["router_kl"] + 0.3 * losses.terms["balance"])


def test_imbalance_of_even_and_of_one_sided_routing() -> None:
    router, every = Router("", nn.Identity(), 4, 1, True), torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(imbalance(100 * torch.eye(4), every, router), torch.tensor(1.0))
    one = torch.tensor([[100.0, 0, 0, 0]]).expand(4, 4)
    torch.testing.assert_close(imbalance(one, every, router), torch.tensor(4.0))
    half, first_two = torch.cat([one[:2], torch.eye(4)[:2]]), torch.tensor([[True, True, False, False]])
    torch.testing.assert_close(imbalance(half, first_two, router), torch.tensor(4.0))


@pytest.mark.slow
def test_a_router_that_learns_brings_the_teacher_nearer() -> None:
    """After equal steps the divergence from the teacher is no larger than with routers that stay."""
    found = {}
    for way in ("student_aware", "all"):
        given = scene(steps=30, batch_size=20, config={"lr": 1.0})
        made = distiller(given, way=way)  # type: ignore[arg-type]
        batch = step(given.train.example(20))
        made.setup(batch)
        players = {turn: torch.optim.SGD(made.parameters_of(turn), lr=1.0) for turn in made.turns}
        for _ in range(30):
            for turn, optimizer in players.items():
                made.zero_grad()
                losses = made(batch, turn)
                losses.total.backward()
                optimizer.step()
        found[way] = float(made(batch).total)
    assert found["student_aware"] <= found["all"]


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    """Reverse KL of equal predictions is 0, and so is its gradient."""
    given = scene()
    given.student = mixtral(seed=3).double()
    made, batch = distiller(given, passes=1, chance=0.0, experts=2), step(given.train.example(4))
    made.setup(batch)
    losses = made(batch)
    losses.total.backward()
    assert losses.total.item() == pytest.approx(0, abs=1e-12)
    assert max(float(p.grad.abs().max()) for p in given.student.parameters() if p.grad is not None) < 1e-12


def test_texts_may_be_the_students_own() -> None:
    given = scene()
    made, batch = distiller(given, lmbda=1.0, max_new_tokens=5), step(given.train.example(4))
    written = made.made(batch)
    assert int((written.require("labels") >= 0).sum()) == 0
    assert distiller(given, lmbda=0.0).made(batch) is batch


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="no such way"):
        MoEKD("top_k")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="balance"):
        MoEKD(balance=-1.0)
    given = scene(teacher=FrozenTeacher(llama(seed=2).double()))
    with pytest.raises(ModelError, match="no routers"):
        distiller(given).setup(step(given.train.example(4)))
