"""Learning to retain while acquiring: the gradient through the inner step, what is kept, and who learns when."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from limbeck.core.teacher import as_teacher
from limbeck.data.resident import ResidentLoader
from limbeck.schemes import build
from limbeck.schemes.data_free.memory import Replay, Reservoir
from limbeck.schemes.parts.unrolled import stepped
from tests.schemes.data_free.scene import cast, images, mlp, same, trained

SMALL = {"latent": 6, "width": 4, "every": 2, "store": 1}


def retaining(whole=None, **options):
    (training,) = build("lra", **{**SMALL, **options}).trainings(whole or cast())
    distiller = training.stages[0].distiller.setup(training.train.example())
    return distiller, training.train


@pytest.mark.parametrize(("rate", "second", "wanted"), [(0.1, True, 2.72), (0.1, False, 2.8), (0.0, True, 3.0)])
def test_the_cards_gradients(rate, second, wanted):
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    acquired = w**2 / 2
    new = stepped(acquired, {"w": w}, rate, second_order=second)["w"]
    (acquired + (new - 1) ** 2 / 2).backward()
    assert w.grad.item() == pytest.approx(wanted)


def discrepancies(distiller, batch):
    """Both losses of the student as plain functions of its weights, by their definition."""
    weights = {n: p.detach().clone().requires_grad_() for n, p in distiller.student.named_parameters()}
    model, teacher = copy.deepcopy(distiller.student), distiller.teacher.model

    def apart(now, inputs):
        with torch.no_grad():
            goal = teacher(inputs)
        return (functional_call(model, now, (inputs,)) - goal).abs().mean()

    return weights, lambda now: apart(now, batch.inputs), lambda now: apart(now, batch.extras["earlier"])


def batch_with_memory(distiller, loader):
    torch.manual_seed(3)
    found = [distiller.made(batch) for (batch,) in list(loader.epoch(0))[:2]]
    return found[1]


def test_the_step_is_differentiated_twice():
    distiller, loader = retaining(inner_lr=0.3)
    batch = batch_with_memory(distiller, loader)
    distiller.student.train()
    weights, acquired, retained = discrepancies(distiller, batch)
    found = distiller(batch)
    found.total.backward()
    first = torch.autograd.grad(acquired(weights), list(weights.values()), create_graph=True)
    moved = {name: w - 0.3 * g for (name, w), g in zip(weights.items(), first, strict=True)}
    total = acquired(weights) + retained(moved)
    total.backward()
    torch.testing.assert_close(found.total, total, rtol=1e-4, atol=1e-5)
    for name, parameter in distiller.student.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=2e-3, atol=1e-4, msg=name)


def test_to_first_order_it_aligns_both_gradients():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    weights = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    one, two = torch.randn(5, 3).double(), torch.randn(5, 3).double()

    def loss(now, x):
        return functional_call(model, now, (x,)).square().mean()

    values = list(weights.values())
    a = torch.autograd.grad(loss(weights, one), values, create_graph=True)
    b = torch.autograd.grad(loss(weights, two), values, create_graph=True)
    product = sum((x * y).sum() for x, y in zip(a, b, strict=True))
    across = torch.autograd.grad(product, values)
    rate = 1e-4
    acquired = loss(weights, one)
    found = torch.autograd.grad(acquired + loss(stepped(acquired, weights, rate), two), values)
    for f, x, y, c in zip(found, a, b, across, strict=True):
        torch.testing.assert_close((f - x - y) / rate, -c, rtol=1e-2, atol=1e-3)


def test_without_memory_it_is_adversarial_distillation():
    """Before anything is kept, and where nothing ever is: DFAD with the same generator."""
    plain = {"latent": 6, "width": 4, "every": 2}
    losses = {"one_hot": 0.0, "entropy": 0.0, "statistics": 0.0}
    first = trained(build("lra", **plain, **losses, store=99), cast(steps=1))
    second = trained(build("dfad", **plain), cast(steps=1))
    assert same(first, second)
    longer = trained(build("lra", **plain, **losses, store=99), cast(steps=4))
    assert not same(longer, trained(build("dfad", **plain), cast(steps=4)))


@pytest.mark.parametrize("memory", ["bank", "replay"])
def test_each_player_moves_alone(memory):
    distiller, loader = retaining(memory=memory)
    batch_with_memory(distiller, loader)
    batch = distiller.made(next(loader.epoch(1))[0])
    distiller.moves -= distiller.moves % 2  # a step in which the generator moves
    assert "earlier" in batch.extras
    for turn in distiller.turns:
        distiller.zero_grad(set_to_none=True)
        distiller(batch, turn).total.backward()
        learned = {id(p) for p in distiller.parameters_of(turn)}
        moved = {id(p) for p in distiller.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert moved & learned
        if turn != "generator":
            assert moved <= learned
    whole = {id(p) for turn in distiller.turns for p in distiller.parameters_of(turn)}
    assert whole == {id(p) for p in distiller.parameters()}


def test_a_reservoir_holds_each_with_the_same_chance():
    torch.manual_seed(0)
    counts = torch.zeros(40)
    for _ in range(100):
        reservoir = Reservoir(8, (1,), None)
        for part in torch.arange(40.0).view(-1, 1).split(10):
            reservoir.add(part)
        kept = reservoir.kept[:, 0].long()
        assert len(kept.unique()) == 8
        counts[kept] += 1
    assert counts.mean() == 20
    assert counts.std() < 7  # 4 expected
    few = Reservoir(8, (1,), None)
    few.add(torch.ones(3, 1))
    assert few.size == 3


def test_a_replay_learns_what_inputs_look_like():
    torch.manual_seed(0)
    replay = Replay(4, (6,), 8)
    optimizer = torch.optim.Adam(replay.parameters(), lr=0.01)
    goal = torch.tensor([2.0, -2.0]).repeat(3)
    losses = []
    for _ in range(80):
        side = torch.randint(0, 2, (32, 1)) * 2.0 - 1
        optimizer.zero_grad()
        loss = replay.loss(side * goal + 0.1 * torch.randn(32, 6))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    found = replay.draw(200)
    correlation = torch.corrcoef(found.T)
    assert correlation[0, 2] > 0.6
    assert correlation[0, 1] < -0.6


@pytest.mark.parametrize("memory", ["bank", "replay"])
def test_it_learns_without_a_real_image_and_the_teacher_stays(memory):
    whole = cast(images(poison=True))
    before = {k: v.clone() for k, v in whole.teacher.model.state_dict().items()}
    found = trained(build("lra", memory=memory, **SMALL), whole)
    assert all(t.isfinite().all() for t in found.values() if t.is_floating_point())
    assert same(before, whole.teacher.model.state_dict())
    assert all(p.grad is None for p in whole.teacher.model.parameters())


def test_by_the_recipes_loss_to_first_order_and_vectors():
    data = ResidentLoader(torch.zeros(40, 5), torch.arange(40) % 3, batch_size=10, classes=3)
    whole = replace(cast(data), student=mlp(4, 1), teacher=as_teacher(mlp(8, 2)))
    found = trained(build("lra", by="loss", second_order=False, **SMALL), whole)
    assert all(t.isfinite().all() for t in found.values() if t.is_floating_point())
