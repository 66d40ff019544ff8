"""DOT: two gradients, two momenta, against the authors' numbers and inside the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.engine.dot import DOT
from limbeck.engine.optim import build_optimizer
from limbeck.objectives import KD, CrossEntropy, FitNets

GOLDEN = Path(__file__).parent / "golden" / "dot_mdistiller.npz"


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_three_steps_as_the_authors_take_them(case):
    """Case 0 has a parameter that the teacher alone reaches, case 1 one that the task alone reaches."""
    with np.load(GOLDEN) as numbers:
        given = {k.removeprefix(f"{case}/"): v for k, v in numbers.items() if k.startswith(f"{case}/")}
    parameters = [nn.Parameter(torch.from_numpy(given[f"start/{j}"])) for j in range(3)]
    settings = {k: float(given[k]) for k in ("lr", "momentum", "delta", "weight_decay")}
    optimizer = DOT(parameters, **settings)
    for step in range(3):
        for side in ("distill", "task"):
            for j, parameter in enumerate(parameters):
                gradient = given.get(f"{step}/{side}/{j}")
                parameter.grad = None if gradient is None else torch.from_numpy(gradient)
            optimizer.take_distill() if side == "distill" else optimizer.step()
        for j, parameter in enumerate(parameters):
            torch.testing.assert_close(parameter.detach(), torch.from_numpy(given[f"{step}/after/{j}"]))


def test_without_a_difference_it_is_sgd():
    loss = CrossEntropy() + 0.5 * KD()
    first, second = (nn.Linear(6, 3) for _ in range(2))
    second.load_state_dict(first.state_dict())
    pairs = [(first, "dot", {"delta": 0.0}), (second, "sgd", {"momentum": 0.9})]
    teacher, generator = nn.Linear(6, 3), torch.Generator().manual_seed(0)
    data = torch.randn(256, 6, generator=generator), torch.randint(0, 3, (256,), generator=generator)
    for student, name, options in pairs:
        config = TrainConfig(steps=5, optimizer=name, optimizer_options=options, lr=0.1, clip=0.3, accumulate=2)
        fit([Stage("kd", Distiller(student, loss, teacher), config)], data, quiet=True)
    torch.testing.assert_close(weights(first), weights(second))


def test_the_engine_takes_the_gradients_apart(loader):
    """The update rule written out: a momentum of mu - delta for cross entropy, of mu + delta for KD."""
    student, teacher = nn.Linear(6, 3), nn.Linear(6, 3)
    start = [p.detach().clone() for p in student.parameters()]
    batches = list(loader().batches(0))
    config = TrainConfig(steps=3, optimizer="dot", lr=0.1, schedule="constant", weight_decay=0.01, decay="all")
    fit([Stage("kd", Distiller(student, CrossEntropy() + 0.5 * KD(), teacher), config)], loader(), quiet=True)
    twin = nn.Linear(6, 3)
    with torch.no_grad():
        for p, s in zip(twin.parameters(), start, strict=True):
            p.copy_(s)
    velocity = [[torch.zeros_like(p) for p in twin.parameters()] for _ in range(2)]
    for batch in batches[:3]:
        losses = Distiller(twin, CrossEntropy() + 0.5 * KD(), teacher).setup(batch)(batch)
        terms = [
            torch.nn.functional.cross_entropy(twin(batch.inputs), batch.labels),
            losses.total - torch.nn.functional.cross_entropy(twin(batch.inputs), batch.labels),
        ]
        found = [torch.autograd.grad(t, list(twin.parameters()), retain_graph=True) for t in terms]
        with torch.no_grad():
            for i, p in enumerate(twin.parameters()):
                velocity[0][i] = 0.825 * velocity[0][i] + found[0][i] + 0.01 * p
                velocity[1][i] = 0.975 * velocity[1][i] + found[1][i]
            for i, p in enumerate(twin.parameters()):
                p -= 0.1 * (velocity[0][i] + velocity[1][i])
    torch.testing.assert_close(weights(student), weights(twin))


def test_micro_batches_change_nothing(loader, distiller):
    found = []
    for accumulate in (1, 3):
        one = Distiller(nn.Linear(6, 3), CrossEntropy() + KD(), nn.Linear(6, 3))
        torch.manual_seed(3)
        for p in [*one.student.parameters(), *one.teacher.model.parameters()]:
            nn.init.normal_(p)
        fit([Stage("kd", one, TrainConfig(steps=6, optimizer="dot", accumulate=accumulate))], loader(), quiet=True)
        found.append(weights(one.student))
    torch.testing.assert_close(*found)


def test_projectors_and_runs_without_a_teacher_train_too(loader, distiller):
    config = TrainConfig(steps=6, optimizer="dot", lr=0.05)
    one = distiller(CrossEntropy() + FitNets("0"))
    fit([Stage("hints", one, config)], loader(), quiet=True)
    assert any("regressor" in name for name, _ in one.named_parameters())
    history = fit([Stage("alone", distiller(CrossEntropy()), config)], loader(), quiet=True).history
    assert history[-1]["total"] > 0


def test_resumes_exactly(loader, distiller, tmp_path):
    config = TrainConfig(steps=8, checkpoint_every=3, keep=9, optimizer="dot", accumulate=2, clip=0.5)
    wanted, found = distiller(), distiller()
    fit([Stage("kd", wanted, config)], loader(), out=tmp_path, quiet=True)
    (tmp_path / "checkpoints" / "step-00000008").rename(tmp_path / "aside")
    fit([Stage("kd", found, config)], loader(), out=tmp_path, resume=True, quiet=True)
    assert torch.equal(weights(found.student), weights(wanted.student))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": "on"}, "dot takes two gradients of every step apart, which compile: on does not allow"),
        ({"precision": "fp16"}, "dot takes two gradients of every step apart, which precision: fp16 does not allow"),
        ({"optimizer_options": {"delta": 0.2}}, r"DOT refuses this: momentum - delta is not below 0.*found .*0\.2"),
        ({"optimizer_options": {"deltas": 0.1}}, r"optimizer_options\.deltas.*did you mean 'delta'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(steps=1, optimizer="dot", **settings)


def test_a_scheme_of_its_own_must_tell_both_apart(loader, distiller):
    class Own(Distiller):
        def forward(self, batch, turn="student"):
            losses = super().forward(batch, turn)
            losses.apart = {}
            return losses

    own = Own(nn.Linear(6, 3), CrossEntropy())
    with pytest.raises(ConfigError, match="does not tell task and teacher apart"):
        fit([Stage("own", own, TrainConfig(steps=1, optimizer="dot"))], loader(), quiet=True)


def test_groups_of_parameters_decay_apart():
    layer = nn.Linear(3, 2)
    dot = build_optimizer("dot", layer.named_parameters(), lr=0.1, weight_decay=0.1)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in layer.parameters()]
    dot.step()
    torch.testing.assert_close(layer.weight.detach(), 0.99 * before[0])
    assert torch.equal(layer.bias.detach(), before[1])


def test_several_ranks_are_refused(loader, distiller, monkeypatch):
    monkeypatch.setattr("limbeck.engine.step.is_distributed", lambda _: True)
    with pytest.raises(ConfigError, match=r"optimizer: it takes two gradients.*found dot.*with sgd"):
        fit([Stage("kd", distiller(), TrainConfig(steps=1, optimizer="dot"))], loader(), quiet=True)
