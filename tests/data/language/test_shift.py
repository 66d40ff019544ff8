"""Labels are shifted by one, in one place: nothing else passes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from limbeck.data.language import LibraryTokens, language_source, rows
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.shift import next_tokens
from limbeck.functional import cross_entropy_loss

CIRCLE = "abcdefgh" * 12  # after each letter comes one certain other


def shifted(by: int) -> Callable:
    """A shift that is off by some places."""

    def mutant(ids, document, learned):
        labels, mask = ids.new_full(ids.shape, -1), learned.new_zeros(ids.shape)
        stop = ids.shape[1] - by
        within = (document[:, :stop] == document[:, by:]) & (document[:, :stop] > 0)
        labels[:, :stop] = ids[:, by:].masked_fill(~within, -1)
        mask[:, :stop] = learned[:, by:] & within
        return labels, mask

    return mutant


def blind(ids, document, learned):
    """A shift that forgets where documents end."""
    labels = torch.full_like(ids, -1)
    labels[:, :-1] = ids[:, 1:]
    mask = torch.zeros_like(learned)
    mask[:, :-1] = learned[:, 1:]
    return labels, mask


def oracle_loss(pack: bool) -> float:
    """The loss of a model that knows what comes next in the circle, and is sure of it."""
    records = [CIRCLE[i : i + 9 + i % 5] for i in range(24)]
    source = language_source(records, tokenizer="bytes", length=32, pack=pack, validation=0)
    batch = LanguageLoader(source.train, batch_size=4, shuffle=False).example(4)
    ids = batch.inputs["input_ids"]
    letters = (ids >= 2 + ord("a")) & (ids <= 2 + ord("h"))
    follows = torch.where(letters, (ids - 2 - ord("a") + 1) % 8 + 2 + ord("a"), 0)
    logits = torch.nn.functional.one_hot(follows, 258).double() * 50
    batch.mask &= letters & (batch.labels != 1)  # neither the first letter of a text nor its end can be known
    return float(cross_entropy_loss(logits, batch.labels, mask=batch.mask))


@pytest.mark.parametrize("pack", [False, True])
def test_who_knows_the_next_token_has_no_loss(pack: bool) -> None:
    assert oracle_loss(pack) < 1e-12


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("by", [0, 2])
def test_another_shift_is_caught(by: int, pack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "next_tokens", shifted(by))
    assert oracle_loss(pack) > 1


def test_the_mutant_of_one_is_the_real_one() -> None:
    """So that what is caught above is the shift, not the mutant."""
    ids = torch.randint(0, 9, (5, 12))
    document, learned = torch.randint(0, 3, (5, 12)).sort(dim=1).values, torch.rand(5, 12) > 0.5
    for found, wanted in zip(shifted(1)(ids, document, learned), next_tokens(ids, document, learned), strict=True):
        assert torch.equal(found, wanted)


def test_by_the_definition() -> None:
    ids = torch.randint(0, 9, (20, 13))
    document = torch.randint(0, 4, (20, 13)).sort(dim=1).values
    learned = torch.rand(20, 13) > 0.4
    labels, mask = next_tokens(ids, document, learned)
    for b in range(20):
        for t in range(13):
            follows = t + 1 < 13 and document[b, t] == document[b, t + 1] and document[b, t] > 0
            assert labels[b, t] == (ids[b, t + 1] if follows else -1)
            assert bool(mask[b, t]) == bool(follows and learned[b, t + 1])


def test_documents_do_not_predict_each_other(bpe: LibraryTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = copy.copy(bpe)
    bare.front = ()  # as GPT-2's: a document begins with its first token, which nothing predicts

    def counted() -> int:
        source = language_source(["ab", "cd!", "e"] * 8, tokenizer=bare, length=16, pack=True, validation=0)
        batch = LanguageLoader(source.train, batch_size=1, shuffle=False).example(99)
        beginnings = batch.inputs["position_ids"] == 0
        assert int(beginnings.sum()) > len(beginnings)  # there are packs of several
        return int(batch.mask.sum())

    tokens = sum(len(ids) for ids, _ in bare.encode(["ab", "cd!", "e"])) * 8
    assert counted() == tokens  # of every text all but its first token, and its end
    monkeypatch.setattr(rows, "next_tokens", blind)
    assert counted() > tokens


def open_mask(ids, document, learned):
    """A shift that counts prompts too."""
    labels, _ = next_tokens(ids, document, learned)
    return labels, labels >= 0


@pytest.mark.parametrize("pack", [False, True])
def test_an_ignored_mask_is_caught(pack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [{"prompt": "p" * (1 + i % 7), "completion": "c" * (2 + i % 5)} for i in range(24)]

    def counted() -> list[int]:
        source = language_source(pairs, tokenizer="bytes", length=48, pack=pack, validation=0)
        batch = LanguageLoader(source.train, batch_size=1, shuffle=False).example(99)
        return sorted(batch.labels[batch.mask].tolist())

    wanted = sorted([1, *[2 + ord("c")] * len(p["completion"])] for p in pairs)
    assert counted() == sorted(token for tokens in wanted for token in tokens)
    monkeypatch.setattr(rows, "next_tokens", open_mask)
    assert 2 + ord("p") in counted()
