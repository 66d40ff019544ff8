from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.data import ResidentLoader
from limbeck.engine import TrainConfig, fit
from limbeck.objectives import CrossEntropy
from limbeck.objectives.feature.ted import TED, ted_loss
from limbeck.objectives.parts.filters import TaskFilters
from limbeck.schemes import HintThenKD
from tests.objectives.reference import mean


class Text(nn.Module):
    """Token ids to one prediction, through blocks of one kind."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, width)
        blocks = (nn.TransformerEncoderLayer(width, 2, 16, 0.0, batch_first=True) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def make_batch(size: int = 8, seed: int = 0) -> Batch:
    """The label is whether the first token is small, middling or large."""
    ids = torch.randint(0, 12, (size, 5), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, labels=ids[:, 0] // 4, index=torch.arange(size))


def states(student: nn.Module, teacher: nn.Module, batch: Batch) -> list[list[Tensor]]:
    """What the blocks give."""
    found = []
    for model in (student, teacher):
        x, values = model.embedding(batch.inputs), []  # type: ignore[operator]
        for block in model.blocks:  # type: ignore[union-attr]
            x = block(x)
            values.append(x)
        found.append(values)
    return found


def test_equals_the_formula() -> None:
    student, teacher = torch.randn(2, 2, 3, 4).double()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rows = zip(student[mask].tolist(), teacher[mask].tolist(), strict=True)
    wanted = mean([mean([(a - b) ** 2 for a, b in zip(s, t, strict=True)]) for s, t in rows])
    assert ted_loss(student, teacher, mask=mask).item() == pytest.approx(wanted)


def test_which_layers_have_filters() -> None:
    """Layers k - 1, 2 k - 1, ... of both, in order; without the teacher's k those of the same relative depth."""
    student, teacher, batch = Text(8, 4), Text(8, 6), make_batch()
    own, other = states(student, teacher, batch)
    for options, pairs in (
        ({"every": 2, "teacher_every": 3}, [(1, 2), (3, 5)]),
        ({"every": 2}, [(1, 2), (3, 5)]),
        ({}, [(0, 1), (1, 2), (2, 4), (3, 5)]),
        ({"every": 3, "teacher_every": 4}, [(2, 3)]),
    ):
        loss = TED(**options)  # type: ignore[arg-type]
        distiller = Distiller(student.eval(), loss, teacher).setup(batch)
        wanted = [ted_loss(loss.student_filters[m](own[i]), other[j]) for m, (i, j) in enumerate(pairs)]
        torch.testing.assert_close(distiller(batch).total, torch.stack(wanted).mean())


def test_identical_models_with_the_same_filters_cost_nothing() -> None:
    model, batch = Text(8, 3), make_batch()
    loss = TED()
    opening = loss.opening()
    twin = copy.deepcopy(model)
    Distiller(model, opening, twin).setup(batch)
    loss.student_filters.load_state_dict(loss.teacher_filters.state_dict())
    value = Distiller(model.eval(), loss, twin).setup(batch)(batch).total
    assert value.item() == pytest.approx(0, abs=1e-12)


def test_identity_filters_are_plain_layerwise_distillation() -> None:
    student, teacher, batch = Text(8, 3), Text(8, 3), make_batch()
    loss = TED()
    distiller = Distiller(student.eval(), loss, teacher).setup(batch)
    for layer in loss.student_filters:
        nn.init.eye_(layer.weight)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    own, other = states(student, teacher, batch)
    wanted = torch.stack([(s - t).square().mean() for s, t in zip(own, other, strict=True)]).mean()
    torch.testing.assert_close(distiller(batch).total, wanted)


class TestFirstStage:
    def test_only_filters_and_heads_learn(self) -> None:
        student, teacher, batch, loss = Text(8, 2), Text(12, 3), make_batch(), TED()
        opening = loss.opening()
        assert isinstance(opening, TaskFilters)
        distiller = Distiller(student, opening, teacher).setup(batch)
        distiller(batch).total.backward()
        assert all(p.grad is None for model in (student, teacher) for p in model.parameters())
        assert all(p.grad is not None for p in opening.parameters())
        assert opening.student_filters is loss.student_filters

    def test_its_loss_is_the_mean_of_the_filters_cross_entropies(self) -> None:
        student, teacher, batch, loss = Text(8, 2), Text(12, 2), make_batch(), TED(nonlinear=True)
        opening = loss.opening()
        assert isinstance(opening, TaskFilters)
        parts = Distiller(student.eval(), opening, teacher).setup(batch)(batch).terms
        heads = zip((opening.student_heads, opening.teacher_heads), states(student, teacher, batch), strict=True)
        filters = {"student": loss.student_filters, "teacher": loss.teacher_filters}
        for (side, layers), (own, values) in zip(filters.items(), heads, strict=True):
            assert own is not None
            losses = [
                nn.functional.cross_entropy(head(layer(value)[:, 0]), batch.require("labels"))
                for head, layer, value in zip(own, layers, values, strict=True)
            ]
            torch.testing.assert_close(parts[f"taskfilters/{side}"], torch.stack(losses).mean())

    def test_padding_in_front_is_not_read(self) -> None:
        features = torch.randn(2, 4, 6)
        mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
        logits = torch.zeros(2, 3)
        opening = TED(["x"]).opening()
        batch = Batch(features, labels=torch.tensor([0, 2]), mask=mask)

        def value(x: Tensor) -> Tensor:
            trace = Trace(None, {"x": x, "logits": logits})
            return sum(opening(trace, trace, batch).values(), torch.zeros(()))

        trace = Trace(None, {"x": features, "logits": logits})
        opening.setup(trace, trace, batch, DataInfo())
        other = features.clone()
        other[0, 0] = 7.0
        torch.testing.assert_close(value(other), value(features))
        other[0, 1] = 7.0
        assert not torch.allclose(value(other), value(features))

    def test_predictions_by_place(self) -> None:
        features, labels = torch.randn(2, 4, 6), torch.tensor([[0, 1, 2, -1], [2, 2, -1, -1]])
        trace = Trace(None, {"x": features, "logits": torch.zeros(2, 4, 3)})
        batch = Batch(features, labels=labels)
        opening = TED(["x"]).opening()
        assert isinstance(opening, TaskFilters)
        opening.setup(trace, trace, batch, DataInfo())
        assert opening.student_heads is not None
        head, layer = opening.student_heads[0], opening.student_filters[0]
        wanted = nn.functional.cross_entropy(head(layer(features)).flatten(0, 1), labels.flatten(), ignore_index=-1)
        torch.testing.assert_close(opening(trace, trace, batch)["student"], wanted)


def test_both_stages_of_a_run() -> None:
    """The first leaves both models alone and teaches the filters the task; the second goes on with those."""
    batch = make_batch(64)
    student, teacher = Text(8, 2), Text(12, 3)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    loss = TED()
    loader = ResidentLoader(batch.inputs, batch.labels, batch_size=16)
    config = TrainConfig(steps=60, optimizer="adamw", lr=5e-3)
    first, second = HintThenKD(share=0.8).stages(student, CrossEntropy() + 2.5 * loss, teacher, config)
    fit([first], loader, quiet=True)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    learned = [p.detach().clone() for p in loss.student_filters.parameters()]
    kept = [p.detach().clone() for p in loss.teacher_filters.parameters()]
    opening = next(iter(first.distiller.loss))
    assert isinstance(opening, TaskFilters)
    assert opening.student_heads is not None
    last = opening.student_heads[-1](loss.student_filters[-1](states(student, teacher, batch)[0][-1])[:, 0])
    assert nn.functional.cross_entropy(last, batch.require("labels")) < 0.8 * 1.0986  # of guessing among three
    fit([second], loader, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, loss.teacher_filters.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(learned, loss.student_filters.parameters(), strict=True))
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_what_it_refuses() -> None:
    batch = make_batch()
    with pytest.raises(ConfigError, match=r"teacher_every.*found 4 and 3"):
        Distiller(Text(8, 4), TED(every=1, teacher_every=2), Text(8, 6)).setup(batch)
    for options in ({"every": 0}, {"teacher_every": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            TED(**options)  # type: ignore[arg-type]
    with pytest.raises(TensorError, match="student_feature"):
        ted_loss(torch.randn(2, 3), torch.randn(2, 4))
    trace = Trace(None, {"blocks": [torch.randn(2, 3, 4)]})
    with pytest.raises(ConfigError, match="not set up"):
        TED()(trace, trace, batch)
