"""Conversations: only the assistant's turns are learned, with their ends, whatever the template."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.core.errors import DataError
from limbeck.data.language import PLAIN, ByteTokens, Tokens, encode, language_source, load_tokens
from limbeck.data.language.records import Record
from tests.data.language.texts import CHAT, CHATML, CHATML_MARKED, LINES, chat_tokens

PLACE = ("a.jsonl", "line", 3)
CHANGING = (  # as templates that drop what was thought in earlier turns
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'][:3] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learned(tokens: Tokens, *messages: Any, first: int = 0) -> list[str]:
    """The runs of tokens that are learned, as text."""
    corpus = encode([Record(messages=tuple(messages), first=first, place=PLACE)], tokens)
    runs: list[list[int]] = []
    for place, (token, counts) in enumerate(zip(corpus.ids.tolist(), corpus.learned.tolist(), strict=True)):
        if counts:
            if not (place and corpus.learned[place - 1]):
                runs.append([])
            runs[-1].append(token)
    return [tokens.decode(run) for run in runs]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["prefixes", "marks"])
def test_turns_and_their_end_tokens_are_learned(template: str) -> None:
    tokens = chat_tokens(template)
    assert learned(tokens, *CHAT) == ["The daughter.<|im_end|>", "To the mill.<|im_end|>"]
    assert learned(tokens, *CHAT, first=3) == ["To the mill.<|im_end|>"]
    assert learned(tokens, *CHAT[:4]) == ["The daughter.<|im_end|>"]  # a question that nobody answers follows
    whole = encode([Record(messages=CHAT)], tokens)
    assert tokens.decode(whole.ids.tolist()).startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n")


def test_both_ways_give_the_same_tokens() -> None:
    one, other = (encode([Record(messages=CHAT)], chat_tokens(t)) for t in (CHATML, CHATML_MARKED))
    assert one.ids.tolist() == other.ids.tolist()
    assert one.learned.tolist() == other.learned.tolist()


def test_marks_are_those_that_transformers_finds(tmp_path: Any) -> None:
    chat_tokens(CHATML_MARKED).save(tmp_path)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    found = theirs.apply_chat_template(list(CHAT), return_dict=True, return_assistant_tokens_mask=True)
    own = encode([Record(messages=CHAT)], load_tokens(tmp_path))
    assert own.ids.tolist() == found["input_ids"]
    assert own.learned.int().tolist() == found["assistant_masks"]
    asked = theirs.apply_chat_template(list(CHAT[:2]), add_generation_prompt=True)["input_ids"]
    assert own.ids[: len(asked)].tolist() == asked  # what generation starts from
    assert not own.learned[: len(asked)].any()
    assert own.learned[len(asked)]


def test_the_plain_template_and_bytes_say_the_same() -> None:
    tokens = chat_tokens(PLAIN)
    assert learned(tokens, *CHAT) == ["The daughter.<|endoftext|>", "To the mill.<|endoftext|>"]
    assert learned(ByteTokens(), *CHAT) == ["The daughter.", "To the mill."]  # and their ends, which have no text
    corpus = encode([Record(messages=CHAT)], ByteTokens())
    assert corpus.ids[corpus.learned].tolist().count(1) == 2
    assert ByteTokens().decode(corpus.ids.tolist()) == "".join(f"{m['role']}: {m['content']}" for m in CHAT)


def test_without_an_end_token_a_turn_ends_as_the_template_ends_it() -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert learned(chat_tokens(template), *CHAT[:3]) == ["The daughter.\n\n"]


def test_templates_that_change_their_mind_are_told() -> None:
    with pytest.raises(DataError, match=r"a.jsonl, line 3, message 3: the chat template writes the beginning") as error:
        learned(chat_tokens(CHANGING), *CHAT)
    assert "{% generation %}" in str(error.value)
    assert "The daughter" in str(error.value)
    assert learned(chat_tokens(CHANGING), *CHAT[:3]) == ["The daughter.<|im_end|>"]
    half = CHATML_MARKED.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endif %}"
    )
    with pytest.raises(DataError, match="does not mark every turn of the assistant; found 1 marked as generated, of 2"):
        learned(chat_tokens(half), *CHAT)


def test_templates_that_refuse_are_told() -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users first') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"line 3: the chat template does not take this .*users first"):
        learned(chat_tokens(strict), *CHAT)
    with pytest.raises(DataError, match=r"line 3: this tokenizer has no chat template.*template: plain"):
        learned(chat_tokens(None), *CHAT)


def test_a_tokenizer_that_is_trained_here_can_chat() -> None:
    rows = [{"messages": [CHAT[1], {"role": "assistant", "content": line}]} for line in LINES]
    source = language_source(rows, tokenizer={"bpe": 300}, validation=0)
    assert source.train.tokens.template == PLAIN
    pairs = [{"prompt": "Who walked?", "completion": line} for line in LINES]
    chat = language_source(pairs, tokenizer={"bpe": 300}, chat=True, validation=0)
    assert chat.train.rows.student.corpus.ids.equal(source.train.rows.student.corpus.ids)
    plain = language_source(pairs, tokenizer={"bpe": 300}, validation=0)
    assert plain.train.tokens.template is None
    assert not plain.train.rows.student.corpus.ids.equal(source.train.rows.student.corpus.ids)
