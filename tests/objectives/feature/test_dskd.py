from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import DataError, TapError, TensorError
from limbeck.core.survey import survey
from limbeck.data.language import LanguageSplit, language_source, train_bpe
from limbeck.data.language.vocabulary import coping
from limbeck.objectives.feature.dskd import DSKD, dskd_loss
from limbeck.objectives.parts.dual_space import Side, scaled
from limbeck.objectives.response.kd import kd_loss

TEXTS = ["To be, or not to be: that is the question.", "Whether 'tis nobler in the mind — façade, 東京 —", "to suffer"]


class Lines(nn.Module):
    """A language model without a memory."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Embedding(tokens, width),
            nn.Linear(width, width),
            nn.Linear(width, tokens),
        )

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.head(self.body(self.embed(input_ids)).tanh())


def random_side(tokens: int, width: int, places: int) -> Side:
    head = torch.randn(tokens, width).double()
    feature = torch.randn(2, places, width).double()
    table = torch.randn(tokens, width).double()
    labels = torch.randint(0, tokens, (2, places))
    return Side(feature, feature @ head.T, head, table[labels.roll(1)], table, labels, torch.rand(2, places) < 0.8)


def identity() -> nn.ModuleDict:
    return nn.ModuleDict({"t2s": nn.Identity(), "s2t": nn.Identity()})


def test_with_one_tokenizer_the_teachers_space_is_plain_kd() -> None:
    """Maps that are the identity between twins with one head: the divergence from the teacher is that of KD."""
    teacher = random_side(7, 4, 5)
    student = teacher._replace(feature=torch.randn(2, 5, 4).double())
    student = student._replace(logits=student.feature @ student.head.T, counts=torch.ones(2, 5, dtype=torch.bool))
    teacher = teacher._replace(counts=student.counts)
    found = dskd_loss(student, teacher, identity(), temperature=1.0, aligned=True)
    plain = kd_loss(student.logits, teacher.logits, temperature=1.0)
    entropy = nn.functional.cross_entropy(teacher.logits.flatten(0, 1), teacher.labels.flatten())
    torch.testing.assert_close(found, 2 * plain + entropy)


def test_attention_written_out() -> None:
    torch.manual_seed(3)
    student, teacher = random_side(7, 4, 3), random_side(9, 5, 4)
    student.counts[:], teacher.counts[:] = True, True
    student.counts[0, 2], teacher.counts[1, 0] = False, False
    maps = nn.ModuleDict({"t2s": nn.Linear(5, 4), "s2t": nn.Linear(4, 5), "query": nn.Linear(8, 10)}).double()
    found = dskd_loss(student, teacher, maps, temperature=1.0)
    whole = torch.zeros(()).double()

    def std(values: Tensor, counts: Tensor) -> Tensor:
        return values[counts].std()

    keys = torch.cat([teacher.read, teacher.table[teacher.labels]], -1)
    target = teacher.table[teacher.labels]
    values = teacher.feature / std(teacher.feature, teacher.counts) + target / std(target, teacher.counts)
    for b in range(2):
        own = [i for i in range(3) if student.counts[b, i]]
        others = [j for j in range(4) if teacher.counts[b, j]]
        scores = torch.zeros(len(own), len(others)).double()
        for m, i in enumerate(own):
            query = maps["query"](torch.cat([student.read[b, i], student.table[student.labels[b, i]]]))
            for n, j in enumerate(others):
                scores[m, n] = query @ keys[b, j] / std(keys, teacher.counts) / 10**0.5
        for m, i in enumerate(own):
            seen = (scores[m].softmax(0) @ maps["t2s"](values[b, others])) @ student.head.T
            label = student.labels[b, i]
            whole = whole - seen.log_softmax(0)[label]
            if seen.argmax() == label:
                p, q = seen.softmax(0), student.logits[b, i].log_softmax(0)
                whole = whole + (p * (p.log() - q)).sum()
        for n, j in enumerate(others):
            said = (scores[:, n].softmax(0) @ maps["s2t"](student.feature[b, own])) @ teacher.head.T
            p, q = teacher.logits[b, j].softmax(0), said.log_softmax(0)
            whole = whole + (p * (p.log() - q)).sum()
    torch.testing.assert_close(found, whole / student.counts.sum())


def test_it_trains_on_texts_in_two_tokenizers() -> None:
    source = language_source(
        TEXTS * 3, tokenizer="bytes", teacher_tokenizer=train_bpe(TEXTS * 3, 300), length=48, validation=0
    )
    assert isinstance(source.train, LanguageSplit)
    batch = source.train.rows.batch(torch.arange(6))
    student = Lines(258, 12)
    distiller = Distiller(student, DSKD(), Lines(300, 16)).setup(batch)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.02)
    seen = []
    for _ in range(12):
        losses = distiller(batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        seen.append(losses.total.item())
    assert set(losses.terms) == {f"dskd/{part}" for part in ("projected", "student_space", "teacher_space")}
    assert seen[-1] < 0.9 * seen[0]
    assert "dskd" in coping()


def test_neither_head_nor_embeddings_learn_by_being_looked_up() -> None:
    student, teacher = random_side(7, 4, 3), random_side(9, 5, 4)
    maps = nn.ModuleDict({"t2s": nn.Linear(5, 4), "s2t": nn.Linear(4, 5), "query": nn.Linear(8, 10)}).double()
    leaves = {f: getattr(student, f).detach().requires_grad_() for f in ("feature", "head", "read", "table")}
    dskd_loss(student._replace(**leaves), teacher, maps).backward()
    assert leaves["feature"].grad is not None
    assert all(leaves[f].grad is None for f in ("head", "read", "table"))


def test_the_table_of_tokens_is_found() -> None:
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    from limbeck.core.roles import Spot, resolve

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    places = survey(model, {"input_ids": torch.arange(6).view(1, 6)})
    assert resolve("embeddings:0@weight", places) == Spot("transformer.wte", "weight")
    with pytest.raises(TapError, match="looks no tokens up"):
        resolve("embeddings", survey(nn.Linear(3, 2), torch.zeros(1, 3)))


def test_scaled_counts_what_counts() -> None:
    values, counts = torch.randn(3, 4, 5).double(), torch.rand(3, 4) < 0.5
    torch.testing.assert_close(scaled(values, counts), values / values[counts].std())
    assert torch.equal(scaled(torch.ones(1, 2, 2), torch.ones(1, 2, dtype=torch.bool)), torch.ones(1, 2, 2))


def test_what_it_refuses() -> None:
    side = random_side(7, 4, 3)
    with pytest.raises(TensorError, match="teacher_head"):
        dskd_loss(side, side._replace(head=side.head[:, :2]), identity(), aligned=True)
    with pytest.raises(TensorError, match="student_logits"):
        dskd_loss(side._replace(logits=side.logits[:, :2]), side, identity(), aligned=True)
    source = language_source(TEXTS * 3, tokenizer="bytes", teacher_tokenizer=train_bpe(TEXTS * 3, 300), validation=0)
    assert isinstance(source.train, LanguageSplit)
    batch = source.train.rows.batch(torch.arange(2))
    distiller = Distiller(Lines(258, 4), DSKD(), Lines(300, 6)).setup(batch)
    del batch.extras["teacher_labels"]
    with pytest.raises(DataError, match="teacher_labels"):
        distiller(batch)
