"""Names in texts, tags of words, and passages with one name marked."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from limbeck.core.errors import ConfigError, DataError
from limbeck.data.language import LibraryTokens
from limbeck.data.language.anchored import AnchoredSplit, Passage, anchored_source, instances
from limbeck.data.language.spans import mentions, pair_f1, read_pairs, spans_of, tags_of, verbatim, words_of

TEXT = "Aspirin, not ibuprofen, caused severe liver failure and nausea."
PAIRS = [["aspirin", "severe liver failure"], ["aspirin", "nausea"]]


def test_answers_are_read_and_what_is_not_in_the_passage_goes() -> None:
    said = read_pairs("Here they are:\n1) no pair\n- Aspirin | Nausea\n* aspirin | coma\naspirin | nausea |x\n")
    assert said == [("Aspirin", "Nausea"), ("aspirin", "coma")]
    assert verbatim(said, TEXT) == [("Aspirin", "Nausea")]
    assert read_pairs("x -> y", "->") == [("x", "y")]
    assert read_pairs("NONE") == []
    assert read_pairs("") is None
    assert mentions("liver\nfailure, livers", ["liver failure", "liver"]) == [(0, 13)]


def test_tags_give_spans_back() -> None:
    dice = random.Random(0)
    for _ in range(60):
        text = " ".join(dice.choice(["a", "bc", "d-e", "f."]) for _ in range(12))
        words = words_of(text)
        cuts = sorted(dice.sample(range(len(words) + 1), 6))
        spans = [(words[a][0], words[b - 1][1]) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
        assert spans_of(words, tags_of(words, spans)) == spans
    words = words_of("a b c d")
    assert tags_of(words, [(0, 3), (2, 7)]) == [0, 1, 2, 2]  # the longer of the two that overlap
    assert spans_of(words, [2, 0, 2, 2]) == [(0, 1), (4, 7)]


def test_each_drug_has_its_own_tags() -> None:
    found = list(instances(0, Passage(TEXT, tuple((a, b) for a, b in PAIRS)), ["ibuprofen"], ("[", "]")))
    assert [one.anchor for one in found] == ["Aspirin", "ibuprofen"]
    assert found[0].text.startswith("[Aspirin], not")
    assert found[1].text.startswith("Aspirin, not [ibuprofen],")
    assert found[1].tags == [0] * len(found[1].words)
    assert [TEXT[a:b] for a, b in spans_of(found[0].words, found[0].tags or [])] == ["severe liver failure", "nausea"]
    for one in found:
        assert [one.text[a:b] for a, b in one.shifted] == [TEXT[a:b] for a, b in one.words]
    assert next(instances(0, Passage(TEXT), ["ibuprofen"], ("", ""))).tags is None


def test_the_first_token_of_a_word_has_its_tag(bpe: LibraryTokens) -> None:
    split = anchored_source(
        [{"text": TEXT, "pairs": PAIRS}, {"text": TEXT}], tokenizer=bpe, anchors=["ibuprofen"], validation=0
    ).train
    assert isinstance(split, AnchoredSplit)
    assert len(split) == 3  # the second passage's aspirin is nobody's name
    batch: Any = split.rows.batch(torch.arange(3))
    assert bool((batch.labels[2] < 0).all())  # nobody has said
    ids, labels = batch.inputs["input_ids"][0].tolist(), batch.labels[0].tolist()
    assert batch.mask[0].tolist() == [label >= 0 for label in labels]
    assert sum(label >= 0 for label in labels) == len(words_of(TEXT))
    tagged = [place for place, label in enumerate(labels) if label > 0]
    assert [labels[place] for place in tagged] == [1, 2, 2, 1]
    assert bpe.decode(ids[tagged[0] : labels.index(0, tagged[2])]).strip() == "severe liver failure"
    again = split.subset(torch.tensor([2, 0]))
    assert torch.equal(again.rows.batch(torch.tensor([1])).require("labels")[0], batch.labels[0])
    assert [one.anchor for one, _ in again.made] == ["ibuprofen", "Aspirin"]


def test_f1() -> None:
    gold = [[("aspirin", "severe liver failure"), ("aspirin", "nausea")]]
    assert pair_f1([TEXT], gold, gold, lenient=False)["f1"] == 1
    half = pair_f1([TEXT], [[("aspirin", "liver failure")]], gold)
    assert (half["precision"], half["recall"]) == (1, 0.5)
    assert half["f1"] == pytest.approx(2 / 3)
    assert pair_f1([TEXT], [[("ibuprofen", "nausea")]], gold)["f1"] == 0
    assert pair_f1([TEXT], [[]], [[]])["f1"] == 0


def test_what_cannot_be_is_said() -> None:
    for records, options, word in (
        ([{"text": "a"}], {"marks": ["<"]}, "marks"),
        ([{"texts": "a"}], {}, "no passage"),
        ([{"text": "a", "pairs": [["a"]]}], {}, "no pairs"),
        ([{"text": "a"}], {"anchors": ["b"]}, "no name stands"),
    ):
        with pytest.raises((ConfigError, DataError), match=word):
            anchored_source(records, tokenizer="bytes", validation=0, **options)  # type: ignore[arg-type]
