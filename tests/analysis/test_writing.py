"""What language models write: prompts and references are the data's, figures are counted from the texts."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from limbeck.analysis.writing import answer_of, assess_writing, exact_match, rouge_l
from limbeck.data.language import ByteTokens, LanguageLoader, language_source, train_bpe

WORDS = [{"prompt": f"{i} + {i} = ", "completion": f"that is #### {2 * i}"} for i in range(12)]


def llama(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=96, **sizes))


def loader(records, **options) -> LanguageLoader:
    split = language_source(records, tokenizer="bytes", validation=0, **options).train
    return LanguageLoader(split, batch_size=4, shuffle=False, drop_last=False)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2 and 3 make 5", "5"),
        ("#### 1,234", "1234"),
        ("#### 7 apples, not 9", "7"),
        ("= 2.50", "2.5"),
        ("-3.0", "-3"),
        ("100", "100"),
        ("", None),
    ],
)
def test_answers(text, wanted):
    assert answer_of(text) == wanted


def test_exact_match_is_of_answers_only_where_all_references_have_one():
    assert exact_match(["I say 18.", "nothing"], ["x #### 18", "y #### 3"]) == 0.5
    assert exact_match(["the answer is 18", " blue "], ["18", "blue"]) == 0.5


def test_rouge_by_hand():
    """The longest common subsequence of 'a b c d' and 'a c d e' is 'a c d': precision and recall are 3/4."""
    assert rouge_l(["a b c d"], ["a c d e"]) == pytest.approx(0.75)


def test_prompts_and_completions(monkeypatch):
    tokens = ByteTokens()
    student, teacher = llama(tokens.size), llama(tokens.size, 1)
    found = assess_writing(student, teacher, loader(WORDS), prompts=5, max_new_tokens=6)
    assert [t["prompt"] for t in found["texts"]] == [r["prompt"] for r in WORDS[:5]]
    assert [t["reference"] for t in found["texts"]] == [r["completion"] for r in WORDS[:5]]
    assert 0 <= found["rouge_l"] <= 1
    assert found["exact_match"] == exact_match(
        [t["student"] for t in found["texts"]], [r["completion"] for r in WORDS[:5]]
    )
    assert found["tokens_per_second"] > 0
    assert "rouge_l" in found["teacher"]
    alone = assess_writing(student, None, loader(WORDS[:1]), prompts=1, max_new_tokens=6)
    assert alone["texts"][0]["student"] == found["texts"][0]["student"]
    assert "teacher" not in alone


def test_a_model_that_writes_the_reference_is_right():
    """A student whose generate says what the data say, in any order of rows."""
    tokens, data = ByteTokens(), loader(WORDS)
    student = llama(tokens.size)
    wanted = {r["prompt"]: r["completion"] for r in WORDS}

    class Spoken:
        def __init__(self, sequences):
            self.sequences = sequences

    def generate(input_ids, attention_mask, **_):
        texts = [tokens.decode([i for i in row[m > 0].tolist() if i > 1]) for row, m in zip(input_ids, attention_mask)]  # noqa: B905
        said = [torch.tensor([*tokens.encode([wanted[t]])[0][0].tolist(), tokens.eos]) for t in texts]
        padded = torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=tokens.pad)
        return Spoken(torch.cat([input_ids, padded], dim=1))

    student.generate = generate
    found = assess_writing(student, None, data, prompts=6)
    assert found["exact_match"] == found["rouge_l"] == 1


def test_whole_texts_are_cut_in_the_middle():
    line = "abcdefghijklmnopqrstuvwxyz0123456789"
    data = loader([line] * 30, length=16, long="cut")
    found = assess_writing(llama(ByteTokens().size), None, data, prompts=2, max_new_tokens=4)
    first = found["texts"][0]
    assert first["prompt"] + first["reference"] == line[: len(first["prompt"]) + len(first["reference"])]
    assert len(first["prompt"]) > 3
    assert "rouge_l" not in found


def test_a_teacher_of_other_tokens_reads_the_same_prompts():
    other = train_bpe([r["prompt"] + r["completion"] for r in WORDS], 262)
    data = loader(WORDS, teacher_tokenizer=other)
    found = assess_writing(llama(ByteTokens().size), llama(262), data, prompts=3, max_new_tokens=4)
    assert len(found["texts"]) == 3
    assert all(isinstance(t["teacher"], str) for t in found["texts"])


def test_packs_and_models_that_do_not_write_are_passed_over():
    assert assess_writing(llama(ByteTokens().size), None, loader(WORDS, length=64, pack=True)) is None
    assert assess_writing(torch.nn.Linear(2, 2), None, loader(WORDS)) is None
