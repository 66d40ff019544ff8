"""Smaller vocabularies: the student answers as the teacher does over the tokens that stay."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from limbeck.compression import Vocabulary, most_frequent, student_from, token_frequencies
from limbeck.core.errors import ConfigError, DataError

pytest.importorskip("transformers")
from tests.compression.teachers import FAMILIES, inputs_for, logits, teacher_of


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("vit", "roberta")])
def test_logits_are_the_teachers_columns(family: str) -> None:
    teacher = teacher_of(family)
    kept = torch.tensor([2, 0, 1, *range(39, 10, -2)])  # in an order of its own
    made = student_from(teacher, vocabulary=kept)
    words = made.report.vocabulary
    assert words is not None
    inputs = inputs_for(teacher)
    inputs = {k: kept[v % len(kept)] if k.endswith("ids") else v for k, v in inputs.items()}
    mapped = {k: words.to_student(v) if k.endswith("ids") else v for k, v in inputs.items()}
    torch.testing.assert_close(logits(made.student, mapped), logits(teacher, inputs)[..., kept], rtol=0, atol=1e-12)
    assert made.student.config.vocab_size == len(kept) == logits(made.student, mapped).shape[-1]
    assert made.report.sizes["vocabulary"] == (40, len(kept))
    assert made.report.difference == pytest.approx(0, abs=1e-12)
    assert all(torch.equal(words.to_teacher(words.to_student(v)), v) for k, v in inputs.items() if k.endswith("ids"))


def test_named_tokens_keep_their_meaning() -> None:
    teacher = copy.deepcopy(teacher_of("llama"))
    teacher.config.eos_token_id = teacher.generation_config.eos_token_id = [2, 7]
    student = student_from(teacher, vocabulary=[7, 5, 2, 1, 0]).student
    assert student.config.eos_token_id == student.generation_config.eos_token_id == [2, 0]
    assert (student.config.bos_token_id, student.config.pad_token_id) == (3, 4)
    assert student.model.embed_tokens.padding_idx == 4
    assert teacher.generation_config.eos_token_id == [2, 7]
    with pytest.raises(ConfigError, match="eos_token_id is not among the tokens kept.*keep token 7"):
        student_from(teacher, vocabulary=[0, 1, 2])


def test_the_most_frequent_tokens_stay() -> None:
    teacher = teacher_of("llama")
    ids = torch.tensor([[9, 9, 9, 30, 30, 12], [9, 30, 12, 12, 11, 39]])
    mask = torch.ones_like(ids)
    mask[1, -1] = 0  # token 39 is padding there
    batches = [{"input_ids": ids, "attention_mask": mask}]
    assert token_frequencies(batches, 40).nonzero().flatten().tolist() == [9, 11, 12, 30]
    made = student_from(teacher, vocabulary=6, importance=batches, unknown=11)
    assert made.report.vocabulary is not None
    assert made.report.vocabulary.kept.tolist() == [0, 1, 2, 9, 11, 12]  # three with a meaning, and the unknown one
    assert made.report.agreement is not None
    assert made.student.model.embed_tokens.weight.shape == (6, 32)
    # 30 is unknown to the student, so it is read as 11 there; among the tokens that stay, both predict.
    words = made.report.vocabulary
    first = logits(teacher, batches[0])[..., words.kept].log_softmax(-1)
    second = logits(made.student, words.inputs(batches[0])).log_softmax(-1)
    kl = (first.exp() * (first - second)).sum(-1)[mask.bool()].mean()
    assert made.report.agreement["kl"] == pytest.approx(float(kl), rel=1e-6)
    blind = student_from(teacher, vocabulary=6, importance=batches)
    assert blind.report.agreement is None
    assert "no token stands for them" in blind.report.notes[-1]
    with pytest.raises(ConfigError, match="found 2; wanted at least 3"):
        student_from(teacher, vocabulary=2, importance=batches)


def test_ids_are_mapped_both_ways(tmp_path: Path) -> None:
    words = Vocabulary([5, 0, 3], size=6, unknown=0)
    assert words.to_student(torch.tensor([[0, 1, 5], [3, -100, 4]])).tolist() == [[1, 1, 0], [2, -100, 1]]
    assert words.to_teacher(torch.tensor([0, 1, 2, -100])).tolist() == [5, 0, 3, -100]
    assert 5 in words
    assert 1 not in words
    assert len(words) == 3
    words.write(tmp_path)
    again = Vocabulary.read(tmp_path)
    assert (again.kept.tolist(), again.size, again.unknown) == ([5, 0, 3], 6, 0)
    strict = Vocabulary([5, 0, 3], size=6)
    with pytest.raises(DataError, match="dropped from the vocabulary; found 4.*unknown=ID"):
        strict.to_student(torch.tensor([5, 4]))
    with pytest.raises(DataError, match="no such token; found 6"):
        words.to_student(torch.tensor([6]))
    (tmp_path / "vocabulary.json").write_text("{}")
    with pytest.raises(DataError, match="no vocabulary can be read here"):
        Vocabulary.read(tmp_path)


def test_mistakes_are_told() -> None:
    for kept, message in (
        ([0, 6], "no such token; found 6; wanted ids from 0 to 5"),
        ([1, 1], "a token is kept twice; found 1"),
        ([], "not token ids"),
        (torch.tensor([0.5]), "not token ids"),
    ):
        with pytest.raises(ConfigError, match=message):
            Vocabulary(kept, size=6)
    with pytest.raises(ConfigError, match="unknown: .*found 2"):
        Vocabulary([0, 1], size=6, unknown=2)
    with pytest.raises(ConfigError, match="wanted 1 to 40"):
        student_from(teacher_of("llama"), vocabulary=41, importance=[torch.tensor([[1]])])
    assert most_frequent(torch.tensor([1, 5, 5, 0]), 2).tolist() == [1, 2]
