from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.compression import pieced_rows
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.data.language import LanguageLoader, LanguageSplit, Translation, language_source, train_bpe, translate
from limbeck.data.language.vocabulary import coping
from limbeck.objectives.parts.paired_tokens import Chunks
from limbeck.objectives.parts.vocabularies import Alignment, Combine, written
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.vocab_reduce_kd import VocabReduceKD, vocab_reduce_kd_loss
from tests.objectives.reference import kl, softmax

TEXTS = ["To be, or not to be: that is the question.", "Whether 'tis nobler in the mind to suffer", "the slings and"]
WORDS = [[0, 1], [2, 2, 1], [0], [1], [2]]  # the teacher's tokens in the student's
TABLES = Translation(
    torch.tensor([2, 3, 4]), torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2, 3, 4]),
    torch.tensor([[2, 2, 1], [0, 1, -1], [0, -1, -1], [1, -1, -1], [2, -1, -1]]),
)  # fmt: skip
CHUNKS = Chunks(torch.tensor([[0, 0, 2, 3]]), torch.tensor([[0, 2, 3, 3]]), torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
@pytest.mark.parametrize("alignment", ["match", "reduce", "reduce_map"])
def test_equals_the_paper(alignment: Alignment, combine: Combine) -> None:
    student, teacher = 2 * torch.randn(1, 4, 3).double(), 2 * torch.randn(1, 4, 5).double()
    pairs = {"match": [([2], 1)]}.get(alignment, [([0, 1], 0), ([2], 1)])  # chunk 3 has two of the teacher's places
    wanted = 0.0
    for places, place in pairs:
        own = student[0, places].sum(dim=0).tolist()
        if alignment == "reduce_map":
            mapped = [[own[s] for s in word] for word in WORDS]
            q = [sum(m) if combine == "sum" else math.log(sum(map(math.exp, m))) for m in mapped]
            p = teacher[0, place].tolist()
        else:
            q, p = own, teacher[0, place, [2, 3, 4]].tolist()
        wanted += 4 * kl(softmax(p, 2.0), softmax(q, 2.0))
    options: dict[str, Any] = {"translation": TABLES, "chunks": CHUNKS, "alignment": alignment, "combine": combine}
    found = vocab_reduce_kd_loss(student, teacher, reduction="sum", **options)
    assert found.item() == pytest.approx(wanted)
    assert vocab_reduce_kd_loss(student, teacher, **options).item() == pytest.approx(wanted / 4)
    mask = torch.tensor([[True, False, True, True]])
    hidden = vocab_reduce_kd_loss(student, teacher, mask=mask, reduction="none", **options)
    assert hidden[0, 0] == 0  # of a chunk all places count, or none


@pytest.mark.parametrize("alignment", ["match", "reduce", "reduce_map"])
def test_with_one_vocabulary_it_is_kd(alignment: Alignment) -> None:
    """Without tables, and with the tables and chunks of equal tokenizers, which do nothing."""
    student, teacher = torch.randn(2, 3, 6, 300).double()
    mask = torch.rand(3, 6) < 0.7
    wanted = kd_loss(student, teacher, temperature=2.0, mask=mask)
    batch = Batch(student, mask=mask)
    torch.testing.assert_close(VocabReduceKD(alignment)(Trace(student), Trace(teacher), batch), wanted)
    bpe = train_bpe(TEXTS * 3, 300)
    place = torch.arange(6).expand(3, -1)
    chunks = Chunks(place, place, torch.zeros(3, 6, dtype=torch.long))
    found = vocab_reduce_kd_loss(
        student, teacher, translation=translate(bpe, bpe), chunks=chunks, alignment=alignment, mask=mask
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_a_token_of_one_piece_is_that_piece(combine: Combine) -> None:
    logits = torch.randn(4, 3).double()
    torch.testing.assert_close(written(logits, TABLES, combine)[:, 2:], logits)


@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_its_gradient_is_that_of_a_gathered_tensor(combine: Combine) -> None:
    logits, other = (torch.randn(4, 3).double().requires_grad_() for _ in range(2))
    other.data.copy_(logits.data)
    weights = torch.randn(4, 5).double()
    (written(logits, TABLES, combine) * weights).sum().backward()
    fill = 0.0 if combine == "sum" else -torch.inf
    pieces = TABLES.pieces.masked_fill(TABLES.pieces < 0, 3)
    gathered = nn.functional.pad(other, (0, 1), value=fill)[:, pieces]
    ((gathered.sum(-1) if combine == "sum" else gathered.logsumexp(-1)) * weights).sum().backward()
    torch.testing.assert_close(logits.grad, other.grad)


@pytest.mark.parametrize("alignment", ["match", "reduce"])
def test_nothing_is_lost_where_matched_logits_are_equal(alignment: Alignment) -> None:
    teacher = torch.randn(1, 4, 5).double()
    student = torch.randn(1, 4, 3).double()
    student[0, 2] = teacher[0, 1, [2, 3, 4]] + 1.5
    student[0, 0] = teacher[0, 0, [2, 3, 4]] - student[0, 1]
    found = vocab_reduce_kd_loss(student, teacher, translation=TABLES, chunks=CHUNKS, alignment=alignment)
    assert found.item() == pytest.approx(0, abs=1e-12)


class Lines(nn.Module):
    """A language model without a memory."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(tokens, 16), nn.Linear(16, tokens)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.head(self.embed(input_ids))


def test_it_trains_on_texts_in_two_vocabularies() -> None:
    tokens = {"tokenizer": {"bpe": 270}, "teacher_tokenizer": train_bpe(TEXTS * 3, 300)}
    source = language_source(TEXTS * 3, length=48, validation=0, **tokens)
    assert isinstance(source.train, LanguageSplit)
    loader = LanguageLoader(source.train, batch_size=4)
    distiller = Distiller(Lines(270), VocabReduceKD(), Lines(300))
    distiller.setup(loader.example(4), DataInfo(tokenizers=loader.tokenizers))
    batch, losses = loader.example(4), []
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.05)
    for _ in range(20):
        value = distiller(batch).total
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not distiller.loss.state_dict()  # tables are made anew
    assert "vocab_reduce_kd" in coping()


def test_rows_of_a_student_are_means_of_the_teachers() -> None:
    rows = torch.randn(5, 4)
    found, known = pieced_rows(rows, TABLES, 4, width=3)
    wanted = {0: [0, 2], 1: [0, 1, 3], 2: [1, 4]}
    for token, sources in wanted.items():
        torch.testing.assert_close(found[token], rows[sources, :3].mean(dim=0))
    assert known.tolist() == [True, True, True, False]
    assert not found[3].any()
    bias, _ = pieced_rows(rows[:, 0], TABLES, 4)
    torch.testing.assert_close(bias, found[:, 0])


def test_what_it_refuses() -> None:
    student, teacher = torch.randn(1, 4, 2), torch.randn(1, 4, 5)
    with pytest.raises(TensorError, match=r"student_logits.*found 2; wanted 3"):
        vocab_reduce_kd_loss(student, teacher, translation=TABLES, chunks=CHUNKS)
    with pytest.raises(ConfigError, match="alignment"):
        VocabReduceKD("mach")  # type: ignore[arg-type]
    batch = Batch(student, teacher_inputs=teacher)
    with pytest.raises(ConfigError, match=r"tokenizers are not known.*DataInfo"):
        VocabReduceKD().setup(Trace(student), Trace(teacher), batch, DataInfo())
