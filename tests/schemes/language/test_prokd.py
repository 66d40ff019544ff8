"""ProKD: both losses, which words count, what is not read, and that it helps on another language."""

from __future__ import annotations

import copy

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
from limbeck.objectives import KD, CrossEntropy
from limbeck.objectives.parts.class_prototypes import ClassPrototypes, alignment, likely
from limbeck.objectives.response.kd import kd_loss
from limbeck.schemes import Cast, build, perform

CLASSES = 3


class Tagger(nn.Module):
    """Words ``[B, L, 5]`` to logits ``[B, L, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(words).tanh())


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Tagger()


def data(samples: int = 24, length: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(samples, length, 5, generator=draw)
    labels = x[..., :CLASSES].argmax(-1)
    labels[samples // 2 :] = -1
    labels[:, -1] = -100  # no word
    return x, labels


def cast(loss=None, config: TrainConfig | None = None) -> Cast:
    loader = ResidentLoader(*data(), batch_size=6, shuffle=True)
    loss = Terms.of(CrossEntropy()) if loss is None else loss
    return Cast(net(0), loss, FrozenTeacher(net(1)), config or TrainConfig(steps=4), loader)


def trainings(loss=None, **options):
    return [*build("prokd", **{"warmup": 0.0, **options}).trainings(cast(loss))]


def test_the_teacher_learns_labels_and_draws_prototypes_of_both_languages_together() -> None:
    x, labels = data()
    given = Batch(x, labels)
    for confidence in (False, True):
        found = trainings(align=0.7, confidence=confidence)[0].stages[0].distiller.setup(given).train()
        features, logits = found.student.inner(x).tanh(), found.student(x)
        losses = found(given)
        known, target = labels >= 0, labels == -1
        target[:12] = False
        source, other = ClassPrototypes(CLASSES, 6), ClassPrototypes(CLASSES, 6)
        sure, guess = logits[target].softmax(-1).max(-1)
        a = source.folded(features[known], labels[known])
        b = other.folded(features[target], guess, sure.detach() if confidence else None)
        wanted = F.cross_entropy(logits[known], labels[known]) + 0.7 * alignment(a[0], b[0], a[1] & b[1])
        torch.testing.assert_close(losses.total, wanted)
        torch.testing.assert_close(found.target.value, b[0].detach())


def test_the_student_learns_answers_and_labels_that_distances_set_right() -> None:
    x, labels = data()
    x, labels = x[12:], labels[12:]
    found = trainings(self_train=0.5)[1].stages[0].distiller.setup(Batch(x, labels)).train()
    teacher, words = found.teacher.model, labels == -1
    for step in range(2):
        p, logits, features = teacher(x).softmax(-1), found.student(x), found.student.inner(x).tanh()[labels == -1]
        own = copy.deepcopy(found.own)
        losses = found(Batch(x, labels))
        first = p[words].argmax(-1)
        value = own.value if step else own.folded(features, first)[0]
        seen = own.seen | own.folded(features, first)[1]
        new = (likely(features, value, seen) * p[words]).argmax(-1)
        wanted = (p[words] - logits.softmax(-1)[words]).square().sum(-1).mean() + 0.5 * F.cross_entropy(
            logits[words], new
        )
        torch.testing.assert_close(losses.total, wanted)
        torch.testing.assert_close(found.own.value[seen], own.folded(features, new)[0].detach()[seen])


def test_without_weights_it_is_teacher_and_student() -> None:
    x, labels = data()
    first, second = trainings(KD(temperature=2.0) + CrossEntropy(), align=0.0, self_train=0.0)
    teacher = first.stages[0].distiller.setup(Batch(x, labels)).train()
    assert list(teacher.loss.names) == ["cross_entropy"]
    known = labels >= 0
    wanted = F.cross_entropy(teacher.student(x)[known], labels[known])
    torch.testing.assert_close(teacher(Batch(x, labels)).total, wanted)
    student = second.stages[0].distiller.setup(Batch(x[12:], labels[12:])).train()
    assert list(student.loss.names) == ["kd"]
    said = student.teacher.model(x[12:])
    wanted = kd_loss(student.student(x[12:]), said, temperature=2.0, mask=labels[12:] == -1)
    torch.testing.assert_close(student(Batch(x[12:], labels[12:])).total, wanted)


def test_prototypes_wait_for_the_warm_up_and_judging_moves_nothing() -> None:
    x, labels = data()
    found = trainings(warmup=0.5)[0].stages[0].distiller.setup(Batch(x, labels)).train()
    early, late = (found(Batch(x, labels, progress=p)) for p in (0.2, 0.6))
    assert float(early.weights["alignment"]) == 0.0
    assert float(late.weights["alignment"]) == 1.0
    torch.testing.assert_close(early.total.detach(), early.terms["cross_entropy"])
    before = copy.deepcopy(found.state_dict())
    assert list(found.eval()(Batch(x, labels)).terms) == ["cross_entropy"]
    assert all(torch.equal(before[name], value) for name, value in found.state_dict().items())


def test_words_that_are_none_change_nothing() -> None:
    x, labels = data()
    other = x.clone()
    other[:, -1] = 100.0
    for number, rows in ((0, slice(None)), (1, slice(12, None))):
        values = []
        for inputs in (x, other):
            found = trainings()[number].stages[0].distiller.setup(Batch(x[rows], labels[rows])).train()
            values.append(found(Batch(inputs[rows], labels[rows])).total.detach())
        torch.testing.assert_close(*values)


def test_the_student_sees_the_target_language_alone_and_the_recipe_s_teacher_stays() -> None:
    given = cast()
    before = copy.deepcopy(given.teacher.model.state_dict())  # type: ignore[union-attr]
    first, second = build("prokd").trainings(given)
    assert first.name == "teacher"
    assert second.train.only.tolist() == list(range(12, 24))
    perform(build("prokd"), given, quiet=True)
    after = given.teacher.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_uniform_distances_leave_the_teacher_s_word() -> None:
    found = (
        trainings(distance_temperature=1e9)[1].stages[0].distiller.setup(Batch(data()[0][12:], data()[1][12:])).train()
    )
    said = torch.randn(20, CLASSES)
    assert torch.equal(found.pseudo(torch.randn(20, 6), said), said.argmax(1))


@pytest.mark.slow
def test_a_turned_language_is_learned_without_a_label_of_its_own() -> None:
    """Words of a class lie together, in the other language around another place: no worse than answers alone."""

    def score(seed: int, weight: float) -> float:
        draw = torch.Generator().manual_seed(seed)
        around = torch.randn(5, 5, generator=draw)
        turn, centres = torch.matrix_exp(0.15 * (around - around.T)), 2 * torch.randn(CLASSES, 5, generator=draw)
        truth = torch.randint(CLASSES, (220, 4), generator=draw)
        words = centres[truth] + 0.8 * torch.randn(220, 4, 5, generator=draw)
        words[60:] = words[60:] @ turn
        labels = truth[:120].clone()
        labels[60:] = -1
        given = cast(config=TrainConfig(steps=60, optimizer="adam", lr=0.02, compile="off"))
        given.train = ResidentLoader(words[:120], labels, batch_size=40, shuffle=True)
        perform(build("prokd", align=weight, self_train=weight), given, quiet=True)
        return float((given.student(words[120:]).argmax(-1) == truth[120:]).float().mean())

    alone, whole = (sum(score(seed, weight) for seed in (1, 3)) / 2 for weight in (0.0, 1.0))
    assert whole >= alone > 0.8


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="scheme.align"):
        build("prokd", align=-1.0)
    given = cast(config=TrainConfig(steps=4, accumulate=2))
    with pytest.raises(ConfigError, match="cannot be cut"):
        next(build("prokd").trainings(given))
    x, labels = data()
    for wrong in (labels.clamp(min=0), torch.full_like(labels, -1), torch.where(labels == -1, -100, labels)):
        given.train, given.config = ResidentLoader(x, wrong, batch_size=6), TrainConfig(steps=4)
        with pytest.raises(DataError, match="two languages"):
            next(build("prokd").trainings(given))
