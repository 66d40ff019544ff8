"""Talking models: what is said, who hears it, and what is learned from the answer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.engine import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, perform
from limbeck.schemes.language.talking_models import Codec, Talk, TalkingModels, carried
from limbeck.teachers import several
from tests.schemes.tiny import cast, llama, weights


class Net(nn.Module):
    """Three blocks of maps, and a head."""

    def __init__(self, width: int, classes: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(1, width, 3, stride, 1), nn.Tanh())
        self.b = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.Tanh())
        self.c = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Tanh())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))).mean((2, 3)))


def net(width: int, seed: int, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(width, **options).double()


def images(rows: int = 6, seed: int = 0, classes: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(inputs, torch.randint(classes, (rows,), generator=generator))


def distiller_of(student: nn.Module, teacher: nn.Module, **options: Any) -> Distiller:
    given = Cast(student, Terms.of(CrossEntropy()), FrozenTeacher(teacher), TrainConfig())
    torch.manual_seed(5)
    (training,) = TalkingModels(**{"lower": "a", "upper": "c", "width": 6, **options}).trainings(given)
    return training.stages[0].distiller.setup(images())


def talk_of(distiller: Distiller) -> Talk:
    found = distiller.loss.objectives["talk"]
    assert isinstance(found, Talk)
    return found


def codecs_of(distiller: Distiller) -> dict[str, Codec]:
    found: Any = talk_of(distiller).ready("codecs")
    return dict(found.items())


@torch.no_grad()
def test_the_equations_written_out() -> None:
    """Sample by sample and place by place, from the modules themselves."""
    student, teacher, batch = net(2, 1), net(3, 2), images()
    distiller = distiller_of(student, teacher, rounds=2, interact=0.7, message=0.3, state=0.2)
    terms = distiller(batch).terms
    c = codecs_of(distiller)

    def on(module: nn.Module, state: Tensor) -> Tensor:
        return torch.stack([torch.stack([module(v) for v in s.flatten(1).T]).T.view(-1, *s.shape[1:]) for s in state])

    low, high = student.a(batch.inputs), student.c(student.b(student.a(batch.inputs)))
    their_low, their_high = teacher.a(batch.inputs), teacher.c(teacher.b(teacher.a(batch.inputs)))
    message, interact = on(c["student_lower"].encoder, low), 0.0
    for _ in range(2):
        reply = teacher.c(teacher.b(on(c["teacher_lower"].decoder, message)))
        answer = on(c["student_upper"].decoder, on(c["teacher_upper"].encoder, reply))
        interact += float((answer - high).square().mean().detach()) / 2
        back = F.interpolate(on(c["student_upper"].encoder, answer), (8, 8), mode="bilinear")
        message = on(c["student_lower"].encoder, on(c["student_lower"].decoder, back))
    assert float(terms["talk/interact"]) == pytest.approx(0.7 * interact, rel=1e-9)
    states = {"student_lower": low, "teacher_lower": their_low, "student_upper": high, "teacher_upper": their_high}
    said = {name: on(c[name].encoder, state) for name, state in states.items()}
    apart = [(said[f"student_{x}"] - said[f"teacher_{x}"]).square().mean() for x in ("lower", "upper")]
    assert float(terms["talk/message"]) == pytest.approx(0.3 * float(sum(apart)) / 2, rel=1e-9)
    again = [(on(c[name].decoder, said[name]) - state).square().mean() for name, state in states.items()]
    assert float(terms["talk/state"]) == pytest.approx(0.2 * float(sum(again)) / 2, rel=1e-9)


def test_equal_models_that_speak_plainly_have_nothing_to_learn() -> None:
    """With the identity for codecs all three losses are 0, since the reply is the student's own upper state."""
    student = net(3, 1)
    distiller = distiller_of(student, copy.deepcopy(student))
    for codec in codecs_of(distiller).values():
        codec.encoder = codec.decoder = nn.Identity()
    losses = distiller(images())
    assert all(float(losses.terms[f"talk/{name}"]) == 0.0 for name in ("interact", "message", "state"))


def test_without_sending_it_is_a_hint() -> None:
    """Identity codecs and the teacher's own lower state in the student's place: what remains is FitNets' distance."""
    student, teacher, batch = net(3, 1), net(3, 2), images()
    distiller = distiller_of(student, teacher)
    for codec in codecs_of(distiller).values():
        codec.encoder = codec.decoder = nn.Identity()
    talk = talk_of(distiller)
    states = [student.a(batch.inputs), student.c(student.b(student.a(batch.inputs)))]
    names = dict(
        zip(("student_lower", "student_upper", "teacher_lower"), [*states, teacher.a(batch.inputs)], strict=True)
    )
    value = talk._interact(teacher.a(batch.inputs), names, batch)
    hint = (teacher.c(teacher.b(teacher.a(batch.inputs))) - states[1]).square().mean()
    torch.testing.assert_close(value, hint)


def test_the_gradient_runs_through_the_teacher_and_stops_before_its_weights() -> None:
    student, teacher = net(2, 1), net(3, 2)
    distiller = distiller_of(student, teacher, message=0.0, state=0.0)
    distiller(images()).total.backward()
    encoder = codecs_of(distiller)["student_lower"].encoder
    assert all(p.grad is not None and bool(p.grad.any()) for p in encoder.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    own = {id(p) for p in distiller.parameters()}
    assert not own & {id(p) for p in teacher.parameters()}


def test_without_weights_it_is_the_task_alone() -> None:
    student, alone = net(2, 1), Distiller(net(2, 1), CrossEntropy()).setup(images())
    distiller = distiller_of(student, net(3, 2), interact=0.0, message=0.0, state=0.0)
    for model in (distiller, alone):
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for step in range(3):
            optimizer.zero_grad()
            model(images(seed=step)).total.backward()
            optimizer.step()
    assert torch.equal(weights(distiller.student), weights(alone.student))


def test_micro_batches_and_masks_give_the_same_gradient() -> None:
    """Of texts, whose padding does not count."""
    given = cast(CrossEntropy())
    (training,) = TalkingModels(lower="model.embed_tokens", upper="model.norm", width=6).trainings(given)
    distiller = training.stages[0].distiller
    batch = next(iter(given.train.batches(0)))  # type: ignore[union-attr]
    torch.manual_seed(0)
    distiller.setup(batch)
    distiller(batch).total.backward()
    whole = [p.grad.clone() for p in distiller.parameters() if p.grad is not None]
    distiller.zero_grad()
    totals = {unit: float(batch.count(unit)) for unit in ("positions", "labels", "samples")}
    for rows in (slice(0, 2), slice(2, 6)):
        inputs = {name: value[rows] for name, value in batch.inputs.items()}
        part = Batch(inputs, batch.require("labels")[rows], mask=batch.require("mask")[rows], totals=totals)
        distiller(part).total.backward()
    for mine, wanted in zip([p.grad for p in distiller.parameters() if p.grad is not None], whole, strict=True):
        torch.testing.assert_close(mine, wanted)
    changed = batch.replace(inputs={**batch.inputs, "input_ids": batch.inputs["input_ids"].clone()})
    changed.inputs["input_ids"][batch.inputs["attention_mask"] == 0] = 7
    torch.testing.assert_close(distiller(changed).total, distiller(batch).total)


def test_where_messages_go() -> None:
    message = torch.randn(2, 5, 4, 4)
    assert torch.equal(carried(message, torch.zeros(2, 9, 4, 4)), message)
    assert carried(message, torch.zeros(2, 9, 2, 2)).shape == (2, 5, 2, 2)
    tokens = carried(message, torch.zeros(2, 17, 7))  # a class token and a grid
    torch.testing.assert_close(tokens[:, 0], message.mean((2, 3)))
    torch.testing.assert_close(tokens[:, 1:].transpose(1, 2).view_as(message), message)
    assert carried(torch.ones(2, 5), torch.zeros(2, 9, 3, 3)).shape == (2, 5, 3, 3)
    torch.testing.assert_close(carried(message, torch.zeros(2, 9)), message.mean((2, 3)))
    with pytest.raises(TensorError, match="from token to token"):
        carried(torch.ones(1, 7, 5), torch.ones(1, 11, 3))


@pytest.mark.slow
def test_a_broader_teacher_tells_what_no_label_says() -> None:
    """The teacher knows ten classes, the student has labels of twelve samples of three. By talking it does better on
    those, and its states tell all ten apart better."""

    def mlp(width: int, seed: int, classes: int) -> nn.Sequential:
        torch.manual_seed(seed)
        layers = [nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes)]
        return nn.Sequential(*layers).double()

    torch.manual_seed(0)
    mixing, means = torch.randn(20, 6).double().tanh(), torch.randn(10, 6).double()
    labels = torch.randint(10, (900,))
    hidden = means[labels] + 0.6 * torch.randn(900, 6).double()
    inputs = hidden @ mixing.T + 1.5 * torch.randn(900, 20).double()
    teacher = mlp(32, 3, 10)
    optimizer = torch.optim.Adam(teacher.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(teacher(inputs), labels).backward()
        optimizer.step()
    few = (labels < 3).nonzero().flatten()
    known = torch.full_like(labels, -1)
    known[few[:12]] = labels[few[:12]]
    seen = torch.cat([few[:12], torch.arange(300)])
    held, losses, probes = few[200:], [], []
    for weight in (0.0, 1.0):
        loss, probe = 0.0, 0.0
        for seed in range(2):
            given = Cast(mlp(16, 10 + seed, 3), Terms.of(CrossEntropy()), FrozenTeacher(teacher), TrainConfig())
            weights_of = {"interact": weight, "message": weight, "state": 0.1 * weight}
            torch.manual_seed(5)
            (training,) = TalkingModels(lower="0", upper="3", width=16, **weights_of).trainings(given)  # type: ignore[arg-type]
            distiller = training.stages[0].distiller.setup(Batch(inputs[seen], known[seen]))
            optimizer = torch.optim.Adam(distiller.parameters(), 0.02)
            for _ in range(30):
                optimizer.zero_grad()
                distiller(Batch(inputs[seen], known[seen])).total.backward()
                optimizer.step()
            with torch.no_grad():
                student = given.student
                loss += float(F.cross_entropy(student(inputs[held]), labels[held]))
                state = student[:4](inputs)  # type: ignore[index]
                state = torch.cat([state, torch.ones(900, 1).double()], dim=1)
                fitted, asked = state[300:600], state[600:]
                ridge = fitted.T @ fitted + 1e-2 * torch.eye(17).double()
                read = torch.linalg.solve(ridge, fitted.T @ F.one_hot(labels[300:600], 10).double())
                probe += float(((asked @ read).argmax(1) == labels[600:]).double().mean())
        losses.append(loss)
        probes.append(probe)
    assert losses[1] < losses[0]
    assert probes[1] > probes[0]


def test_a_run_leaves_a_plain_student_and_the_teacher_as_it_was() -> None:
    given = cast(CrossEntropy())
    given.student, given.teacher = (
        llama(layers=2, seed=1).double(),
        FrozenTeacher(llama(width=24, layers=3, seed=2).double()),
    )
    before = weights(given.teacher.model)
    fitted = perform(TalkingModels(width=6), given, quiet=True)
    assert torch.equal(before, weights(given.teacher.model))
    assert not any(m._forward_hooks for m in fitted.student.modules())
    assert sum(p.numel() for p in fitted.student.parameters()) == sum(p.numel() for p in llama(layers=2).parameters())


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="talks with a teacher"):
        next(iter(TalkingModels().trainings(cast(CrossEntropy(), teacher=None))))
    given = cast(CrossEntropy(), teacher=several.SeveralTeachers([llama(seed=2).double()]))
    with pytest.raises(ConfigError, match="model at hand"):
        next(iter(TalkingModels().trainings(given)))
    with pytest.raises(ConfigError, match="negative"):
        TalkingModels(message=-1.0)
