"""Sets of instructions as one source: form, caps, what tests hold, and who wrote what."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limbeck.core.errors import ConfigError, DataError
from limbeck.data.language import LibraryTokens
from limbeck.data.language.contamination import Held
from limbeck.data.language.mixture import mixture_source

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Farewell."},
]


def pairs(count: int, word: str = "n") -> list[dict[str, str]]:
    return [{"prompt": f"{word} {i}?", "completion": f"{i}."} for i in range(count)]


def mixed(sets: dict[str, Any], **options: Any) -> Any:
    return mixture_source(sets, **{"tokenizer": "bytes", "template": "plain", "validation": 0, **options})


def prompts(split: Any) -> list[str]:
    found = []
    for row in range(len(split)):
        batch = split.rows.batch(torch.tensor([row]))
        first = int(batch.mask[0].int().argmax()) + 1
        found.append(split.tokens.decode(batch.inputs["input_ids"][0, :first].tolist()))
    return found


def test_every_turn_of_the_assistant_is_learned_in_tulus_form(bpe: LibraryTokens) -> None:
    source = mixture_source({"a": [{"messages": CHAT}]}, tokenizer=bpe, validation=0)
    batch = source.train.rows.batch(torch.tensor([0]))  # type: ignore[attr-defined]
    ids = batch.inputs["input_ids"][0]
    end = "<|endoftext|>"
    text = bpe.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    whole = f"<|user|>\nHi\n<|assistant|>\nHello.{end}\n<|user|>\nBye\n<|assistant|>\nFarewell.{end}\n"
    assert text.removeprefix(end).replace("<|pad|>", "").rstrip() == whole.rstrip()
    learned = batch.labels[0][batch.mask[0]]
    assert bpe.tokenizer.decode(learned.tolist(), skip_special_tokens=False) == f"Hello.{end}Farewell.{end}"


def test_a_set_keeps_its_tag_whatever_its_form() -> None:
    split = mixed(
        {"a": pairs(3), "b": {"source": [{"q": "why?", "a": "so"}], "prompt": "{q}", "completion": "a"}}
    ).train
    assert split.rows.tag.bincount().tolist() == [3, 1]
    assert split.tags == ("a", "b")
    assert split.settings["mixture"]["b"] == {"by": "unknown", "records": 1, "contaminated": 0, "twice": 0, "capped": 0}


def test_caps_are_drawn_and_what_is_there_twice_is_left_out() -> None:
    split = mixed({"a": {"source": pairs(50) + pairs(50), "cap": 20, "by": "human"}, "b": pairs(60)}).train
    facts = split.settings["mixture"]
    assert facts["a"] == {"by": "human", "records": 100, "contaminated": 0, "twice": 50, "capped": 30}
    assert facts["b"]["twice"] == 50  # the same as in a
    drawn = [text for text, tag in zip(prompts(split), split.rows.tag.tolist(), strict=True) if tag == 0]
    assert len(set(drawn)) == 20
    assert max(int(text.split()[2][:-1].split("?")[0]) for text in drawn) > 20
    assert len(mixed({"a": pairs(5) + pairs(5)}, twice=True).train) == 10


def test_what_tests_hold_is_left_out() -> None:
    tests = [{"prompt": "n 7?", "completion": "7."}]
    split = mixed({"a": pairs(9), "b": pairs(3, "m")}, against=tests).train
    assert split.settings["mixture"]["a"]["contaminated"] == 1
    assert not any("n 7?" in text for text in prompts(split))
    assert len(split) == 11


def test_too_much_of_a_test_is_more_than_its_share_in_runs() -> None:
    test = "a b c d e f g h i j"
    held = Held([test], words=4)
    assert held.told(["x A, b: c d e f y"]) == [True]  # six of ten words
    assert held.told(["x a b c d e y"]) == [False]  # five
    assert held.told(["a b c x d e f x g h i x j"]) == [False]  # no run of four
    assert held.told(["a b c d x g h i j x"]) == [True]  # two runs, eight words
    assert Held([test], words=4, share=0.9).told([test, "a b c d e f g h i"]) == [True, False]
    assert Held([" ! "]).told(["!"]) == [False]


def test_what_cannot_be_is_said() -> None:
    for sets, options, word in (
        ({}, {}, "no sets"),
        ({"a": {"source": pairs(3), "cap": 0}}, {}, "cap"),
        ({"a": {"source": pairs(3), "caps": 0}}, {}, "no such option"),
        ({"a": ["plain text"]}, {}, "no instruction"),
        ({"a": pairs(3)}, {"against": pairs(3)}, "nothing is left"),
        ({"a": pairs(3)}, {"against": pairs(3), "words": 0}, "words"),
    ):
        with pytest.raises((ConfigError, DataError), match=word):
            mixed(sets, **options)
