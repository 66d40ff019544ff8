"""What a tagging student finds in passages: pairs of a marked name and what belongs to it."""

from __future__ import annotations

import torch
from torch import nn

from limbeck.core.survey import call_model, dry
from limbeck.core.trace import logits_of
from limbeck.data.language.anchored import AnchoredSplit, Passage
from limbeck.data.language.spans import Pair, pair_f1, spans_of


def extract(
    model: nn.Module, split: AnchoredSplit, *, batch_size: int = 16, logits: str | None = None
) -> list[list[Pair]]:
    """The pairs of each passage, each once: the model runs once for every place where an anchor stands.

    Args:
        model: Gives ``[B, L, 3]``; its mode is as before afterwards.
        split: Whose passages; what is known of their pairs is not looked at, but for names that are anchors too.
        batch_size: Rows at a time.
        logits: Where they stand in the model's output.
    """
    found: list[dict[tuple[str, str], Pair]] = [{} for _ in split.passages]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with dry(model):
        for first in range(0, len(split.made), batch_size):
            some = split.made[first : first + batch_size]
            batch = split.rows.batch(torch.arange(first, first + len(some))).to(device)
            best = logits_of(call_model(model, batch.inputs), logits).argmax(dim=-1).tolist()
            for (one, places), tags in zip(some, best, strict=True):
                text = split.passages[one.passage].text
                told = [tags[place] if place < len(tags) else 0 for place in places]
                for start, stop in spans_of(one.words, told):
                    pair = (one.anchor, text[start:stop])
                    found[one.passage].setdefault((pair[0].casefold(), pair[1].casefold()), pair)
    return [list(own.values()) for own in found]


def assess_pairs(
    model: nn.Module, split: AnchoredSplit, *, batch_size: int = 16, logits: str | None = None
) -> dict[str, float]:
    """Precision, recall and F1 of the pairs that a model finds, where they are known: lenient, and ``strict_f1``.

    Args:
        model, batch_size, logits: See :func:`extract`.
        split: Passages whose pairs are known are looked at.
    """
    told = extract(model, split, batch_size=batch_size, logits=logits)
    known = [n for n, passage in enumerate(split.passages) if passage.pairs is not None]
    return scores(
        [split.passages[n] for n in known],
        [told[n] for n in known],
    )


def scores(passages: list[Passage], told: list[list[Pair]]) -> dict[str, float]:
    """The same of pairs from anywhere, such as a teacher."""
    texts, gold = [p.text for p in passages], [list(p.pairs or ()) for p in passages]
    return {**pair_f1(texts, told, gold), "strict_f1": pair_f1(texts, told, gold, lenient=False)["f1"]}
