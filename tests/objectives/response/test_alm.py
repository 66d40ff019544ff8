from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.core.trace import Trace
from limbeck.data.language import LanguageSplit, language_source, train_bpe
from limbeck.data.language.vocabulary import coping
from limbeck.objectives.parts.paired_tokens import Chunks
from limbeck.objectives.response.alm import ALM, alm_loss
from tests.objectives.reference import softmax

TEXTS = ["To be, or not to be: that is the question.", "Whether 'tis nobler in the mind — façade, 東京 —", "to suffer"]


def divergence(log_p: float, log_q: float, temperature: float) -> float:
    p, q = math.exp(log_p / temperature), math.exp(log_q / temperature)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def log_likelihood(logits: Tensor, labels: list[int], places: list[int]) -> float:
    return sum(math.log(softmax(logits[t].tolist())[labels[t]]) for t in places)


@pytest.mark.parametrize("temperature", [1.0, 10.0, 100.0])
def test_equals_the_paper(temperature: float) -> None:
    student, teacher = 2 * torch.randn(1, 4, 5).double(), 2 * torch.randn(1, 6, 9).double()
    labels, others = [3, 0, 4, 2], [1, 8, 5, 5, 0, 7]
    chunks = [([0, 1], [0]), ([2], [1, 2]), ([3], [3, 4])]  # the teacher's last place tells of nothing
    wanted = [
        divergence(log_likelihood(teacher[0], others, t), log_likelihood(student[0], labels, s), temperature)
        for s, t in chunks
    ]
    given = Chunks(torch.tensor([[0, 0, 2, 3]]), torch.tensor([[0, 2, 2, 3, 3, -1]]), torch.tensor([others]))
    found = alm_loss(student, teacher, torch.tensor([labels]), chunks=given, temperature=temperature)
    assert found.item() == pytest.approx(sum(wanted) / 3, rel=1e-3)
    each = alm_loss(student, teacher, torch.tensor([labels]), chunks=given, temperature=temperature, reduction="none")
    assert each[0, 1].item() == 0  # a chunk stands at its first place
    torch.testing.assert_close(each[0, [0, 2, 3]], torch.tensor(wanted).double(), rtol=1e-3, atol=1e-9)


def test_one_tokenizer_asks_of_each_token() -> None:
    student, teacher = torch.randn(2, 3, 4, 5).double()
    labels, mask = torch.randint(0, 5, (3, 4)), torch.rand(3, 4) < 0.6
    mask[0] = True
    found = ALM(temperature=1.0)(Trace(student), Trace(teacher), Batch(student, labels=labels, mask=mask))
    whole = torch.zeros(3).double()
    for row in range(3):
        told = [t for t in range(4) if mask[row, t]]
        for t in told:
            pair = (log_likelihood(z[row], labels[row].tolist(), [t]) for z in (teacher, student))
            whole[row] += divergence(*pair, 1.0) / len(told)
    torch.testing.assert_close(found, whole[mask.any(dim=1)].mean(), rtol=1e-4, atol=1e-7)


def test_a_mask_hides_whole_chunks() -> None:
    student, teacher = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    labels = torch.randint(0, 5, (1, 3))
    given = Chunks(torch.tensor([[0, 0, 2]]), torch.tensor([[0, 0, 2]]), labels)
    each = alm_loss(student, teacher, labels, chunks=given, reduction="none")
    hidden = alm_loss(student, teacher, labels, chunks=given, mask=torch.tensor([[True, False, True]]))
    torch.testing.assert_close(hidden, each[0, 2])
    half = Chunks(given.student, given.teacher, torch.tensor([[-1, 0, 0]]))  # of the teacher's no label is known
    assert alm_loss(student, teacher, labels, chunks=half, reduction="none")[0, 0] == 0


def test_it_works_on_texts_in_two_tokenizers() -> None:
    bpe = train_bpe(TEXTS * 3, 300)
    source = language_source(TEXTS * 3, tokenizer="bytes", teacher_tokenizer=bpe, length=64, validation=0)
    assert isinstance(source.train, LanguageSplit)
    batch = source.train.rows.batch(torch.arange(4))
    student = torch.randn(*batch.inputs["input_ids"].shape, 258, requires_grad=True)
    teacher = torch.randn(*batch.teacher_inputs["input_ids"].shape, 300)
    value = ALM()(Trace(student), Trace(teacher), batch)
    value.backward()
    told = batch.extras["chunk"] >= 0
    assert value > 0
    assert student.grad is not None
    assert bool((student.grad.abs().sum(dim=2) > 0)[told].all())
    assert not student.grad[~told].any()
    assert "alm" in coping()


def test_what_it_refuses() -> None:
    student, teacher, labels = torch.randn(2, 3, 4), torch.randn(2, 5, 7), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(DataError, match="aligned_chunks"):
        ALM()(Trace(student), Trace(teacher), Batch(student, labels=labels))
    extras = {"chunk": labels, "teacher_chunk": labels, "teacher_labels": labels}
    with pytest.raises(TensorError, match="teacher_chunk"):
        ALM()(Trace(student), Trace(teacher), Batch(student, labels=labels, teacher_inputs=teacher, extras=extras))
    with pytest.raises(TensorError, match="labels"):
        alm_loss(student, student, labels[:, :2])
    with pytest.raises(ConfigError, match="temperature"):
        ALM(temperature=0.0)
