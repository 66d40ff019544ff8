from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from limbeck.conformance.models import TextModel
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.pairing import Mapping
from limbeck.core.relations import head_scores
from limbeck.engine import TrainConfig
from limbeck.objectives import KD
from limbeck.objectives.feature.tinybert import TinyBERT, tinybert_loss
from limbeck.schemes import HintThenKD
from tests.objectives.reference import mean


def bert(width: int, depth: int) -> nn.Module:
    config = BertConfig(
        vocab_size=20,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    config._attn_implementation = "eager"
    return BertForSequenceClassification(config).eval()


def square(x: list[float], y: list[float]) -> float:
    return mean([(a - b) ** 2 for a, b in zip(x, y, strict=True)])


def test_equals_the_formula_on_what_counts() -> None:
    states, others = torch.randn(2, 2, 3, 4, 5).double()  # two layers, three samples, four tokens
    scores, other_scores = torch.randn(2, 1, 3, 2, 4, 4).double()
    lengths = [4, 2, 3]
    mask = torch.tensor([[t < n for t in range(4)] for n in lengths])
    each = []
    for b, n in enumerate(lengths):
        hidden = [
            mean([square(s[b, i].tolist(), t[b, i].tolist()) for i in range(n)])
            for s, t in zip(states, others, strict=True)
        ]
        attention = [
            mean([square(s[b, :, i, j].tolist(), t[b, :, i, j].tolist()) for i in range(n) for j in range(n)])
            for s, t in zip(scores, other_scores, strict=True)
        ]
        each.append(sum(hidden) + sum(attention))
    found = tinybert_loss(list(states), list(others), list(scores), list(other_scores), mask=mask)
    assert found.item() == pytest.approx(mean(each))


def test_scores_are_what_attention_softens() -> None:
    """On BERT: the softmax of the scores from queries and keys are the maps that the model gives."""
    model, ids = bert(8, 2), torch.randint(0, 20, (2, 5))
    found: list[Tensor] = []
    for layer in model.bert.encoder.layer:  # type: ignore[union-attr]
        layer.attention.self.query.register_forward_hook(lambda *a: found.append(a[2]))
        layer.attention.self.key.register_forward_hook(lambda *a: found.append(a[2]))
    maps = model(input_ids=ids, output_attentions=True).attentions
    for m, (q, k) in enumerate(zip(found[::2], found[1::2], strict=True)):
        torch.testing.assert_close(head_scores(q, k, 2).softmax(-1), maps[m])


def test_on_berts_of_other_depth_and_width() -> None:
    """Teacher layers 2 and 4 beside the student's 1 and 2, embeddings beside embeddings, one map for all."""
    student, teacher = bert(8, 2), bert(12, 4)
    inputs = {"input_ids": torch.randint(0, 20, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    batch = Batch(inputs, labels=torch.zeros(3, dtype=torch.long), mask=torch.ones(3, 5, dtype=torch.bool))
    loss = TinyBERT()
    losses = Distiller(student, loss, teacher).setup(batch)(batch)
    own, other = (m(**inputs, output_hidden_states=True).hidden_states for m in (student, teacher))
    layer = loss.ready("projector")
    wanted = sum(((layer(own[i]) - other[j]).square().mean() for i, j in ((0, 0), (1, 2), (2, 4))), torch.zeros(()))
    torch.testing.assert_close(losses.terms["tinybert/states"], wanted.detach())
    without = TinyBERT(embeddings=False, heads=2)
    assert "attention" not in without.student_taps
    losses = Distiller(student, without, teacher).setup(batch)(batch)
    layer = without.ready("projector")
    wanted = sum(((layer(own[i]) - other[j]).square().mean() for i, j in ((1, 2), (2, 4))), torch.zeros(()))
    torch.testing.assert_close(losses.terms["tinybert/states"], wanted.detach())
    losses.total.backward()
    assert layer.weight.grad is not None


def test_the_last_layers_may_be_chosen() -> None:
    student, teacher = TextModel(8, 2, 3, pool=True), TextModel(8, 3, 3, pool=True)
    batch, found = Batch(torch.randint(0, 16, (3, 5))), {}
    mappings: tuple[Mapping, ...] = ("skip", "last")
    for mapping in mappings:
        found[mapping] = Distiller(student, TinyBERT(mapping=mapping), teacher).setup(batch)(batch).total.item()
    assert found["skip"] == pytest.approx(found["last"])  # of 2 and 3 layers both are the last two
    deeper = TextModel(8, 4, 3, pool=True)
    for mapping in mappings:
        found[mapping] = Distiller(student, TinyBERT(mapping=mapping), deeper).setup(batch)(batch).total.item()
    assert found["skip"] != pytest.approx(found["last"])


def test_it_comes_first_and_the_prediction_after_it() -> None:
    student, teacher = bert(8, 2), bert(12, 4)
    stages = HintThenKD().stages(student, TinyBERT() + KD(), teacher, TrainConfig(epochs=4))
    assert [list(stage.distiller.loss.names) for stage in stages] == [["tinybert"], ["kd"]]


def test_what_it_refuses() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(TensorError, match="pairs"):
        tinybert_loss([x], [x, x])
    with pytest.raises(TensorError, match="pairs"):
        tinybert_loss([], [])
    with pytest.raises(TensorError, match="teacher_feature"):
        tinybert_loss([], [], [torch.randn(2, 2, 3, 3)], [torch.randn(2, 4, 3, 3)])
    with pytest.raises(ConfigError, match="heads"):
        TinyBERT(heads=0)
    with pytest.raises(TensorError, match="cut into heads"):
        head_scores(x, x, 3)
