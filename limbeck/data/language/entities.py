"""Entities of a passage and their types: read from answers, compared, and asked for in a conversation."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.hashing import draw_bits, key, key_tensor, uniform

#: The template of the paper's conversations, in Jinja: for ``data.options.template``.
IE_AS_QA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ 'USER: ' + message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
SYSTEM = "A virtual assistant answers questions from a user based on the provided text."
_SAID = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_TUPLE = re.compile(rf"[(\[]\s*({_SAID})\s*,\s*({_SAID})\s*[)\]]")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_MARKS = str.maketrans("", "", string.punctuation)
_NEGATIVES, _SHUFFLE = 41, 42  # keep these draws apart from others, and from one another

Entity = tuple[str, str]  # what it is called, and its type


@dataclass(frozen=True)
class Annotated:
    """A passage with its entities, and the set that it is of where people labelled it."""

    text: str
    entities: tuple[Entity, ...]
    dataset: str = ""


def read_tuples(answer: str) -> list[Entity] | None:
    """Entities with their types from an answer such as ``[("Paris", "city"), ...]``, each once.

    Returns:
        ``None`` where the answer holds no list.

    >>> read_tuples("Sure: [('Paris', \\"city\\"), ('Paris', 'city')]"), read_tuples("[]"), read_tuples("Paris")
    ([('Paris', 'city')], [], None)
    """
    start = answer.find("[")
    if start < 0:
        return None
    found = [(_bare(a), _bare(b)) for a, b in _TUPLE.findall(answer[start:])]
    if not found and not re.match(r"\[\s*\]", answer[start:]):
        return None
    return [(a, b) for a, b in dict.fromkeys(found) if a and b]


def _bare(said: str) -> str:
    return re.sub(r"\\(.)", r"\1", said[1:-1]).strip()


def read_list(answer: str) -> list[str]:
    """The first list of an answer in normal form, each item once; nothing where it cannot be read.

    >>> read_list('text ["A cat", "the cat!"]'), read_list('["a')
    (['cat'], [])
    """
    start = answer.find("[")
    try:
        items, _ = json.JSONDecoder().raw_decode(answer, start) if start >= 0 else ([], 0)
    except ValueError:
        return []
    return list(dict.fromkeys(normal(item) for item in items if isinstance(item, str)))


def normal(text: str) -> str:
    """A name as names are compared: in small letters, without punctuation, articles and spare white space.

    Source: universal-ner/universal-ner, ``src/eval/evaluate.py``.

    >>> normal("The  U.S. Army")
    'us army'
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_MARKS)).split())


def ner_f1(said: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    r"""Strict micro precision, recall and F1 of names in normal form, over all questions.

    .. math:: P = \frac{\text{right}}{\text{said}}, \qquad R = \frac{\text{right}}{\text{there}}, \qquad
        F_1 = \frac{2 P R}{P + R}

    >>> ner_f1([["a", "b"]], [["a"]])["f1"]
    0.6666666666666666
    """
    right = sum(len(set(ours) & set(theirs)) for ours, theirs in zip(said, gold, strict=True))
    told, there = (sum(len(set(names)) for names in side) for side in (said, gold))
    precision, recall = right / max(1, told), right / max(1, there)
    whole = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / whole if whole else 0.0}


def by_type(entities: Sequence[Entity]) -> dict[str, list[str]]:
    """Names of each type, in the order in which they were said; types are one whatever their case.

    >>> by_type([("Rome", "City"), ("Nile", "river"), ("Bonn", "city")])
    {'City': ['Rome', 'Bonn'], 'river': ['Nile']}
    """
    spelled, found = dict[str, str](), dict[str, list[str]]()
    for name, kind in entities:
        own = found.setdefault(spelled.setdefault(kind.casefold(), kind), [])
        if name not in own:
            own.append(name)
    return found


def frequencies(passages: Sequence[Annotated]) -> dict[str, int]:
    """How many entities are of each type, the most frequent first; types are one whatever their case.

    >>> frequencies([Annotated("", (("a", "x"), ("b", "X"), ("c", "y")))])
    {'x': 2, 'y': 1}
    """
    spelled, count = dict[str, str](), Counter[str]()
    for passage in passages:
        for _, kind in passage.entities:
            count[spelled.setdefault(kind.casefold(), kind)] += 1
    return dict(count.most_common())


def absent(weights: Tensor, present: Tensor, number: int, seed: int) -> Tensor:
    r"""Draw types that are not there, without replacement, each time in proportion to their weights.

    By exponential races: the smallest :math:`-\log(u_i) / w_i` come first (Efraimidis and Spirakis, 2006).

    Args:
        weights: ``[T]``, 0 for a type that is never drawn.
        present: ``[T]`` booleans, the types that are there.
        number: So many at most.
        seed: Of drawing.

    >>> absent(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([True, False, False]), 2, seed=0)
    tensor([1])
    """
    there = (weights > 0) & ~present
    bits = draw_bits(key_tensor([key(_NEGATIVES, seed)], "cpu"), torch.arange(len(weights)))[:, 0]
    race = -(uniform(bits).double().clamp(min=1e-12)).log() / weights.double().clamp(min=1e-300)
    first = race.masked_fill(~there, float("inf")).argsort()
    return first[: min(number, int(there.sum()))]


def questions(
    passage: Annotated, known: Mapping[str, int], *, negatives: str = "frequency", most: int = 10, seed: int = 0
) -> list[tuple[str, list[str]]]:
    """What is asked about a passage: its own types, and as many others (``most`` at most) that it has none of.

    Args:
        passage: With its entities.
        known: All types and how frequent they are.
        negatives: ``frequency``: drawn in proportion to that; ``uniform``; or ``none``.
        most: Of the others.
        seed: Of drawing and order.

    Returns:
        Types with the names that answer, in a random order.
    """
    own = by_type(passage.entities)
    asked = list(own.items())
    if negatives != "none" and known:
        types, there = list(known), {kind.casefold() for kind in own}
        weights = torch.tensor([float(known[t]) if negatives == "frequency" else 1.0 for t in types])
        present = torch.tensor([kind.casefold() in there for kind in types])
        asked += [(types[n], []) for n in absent(weights, present, min(len(own), most), seed).tolist()]
    bits = draw_bits(key_tensor([key(_SHUFFLE, seed)], "cpu"), torch.arange(len(asked)))[:, 0]
    return [asked[n] for n in bits.argsort(stable=True).tolist()]


def conversation(
    text: str, asked: Sequence[tuple[str, Sequence[str] | None]], system: str = SYSTEM, dataset: str = ""
) -> list[dict[str, Any]]:
    """A passage, then one question for each type; the last one may be open.

    Args:
        text: The passage.
        asked: Types with the names that answer; ``None``: it is to be answered.
        system: The first message; empty: there is none.
        dataset: A set whose way to label is meant.

    >>> [m["content"] for m in conversation("Rome", [("city", ["Rome"]), ("river", None)], system="")][2:]
    ['What describes city in the text?', '["Rome"]', 'What describes river in the text?']
    """
    opens = f"Dataset: {dataset}\nText: {text}" if dataset else f"Text: {text}"
    found = [{"role": "system", "content": system}] if system else []
    found += [{"role": "user", "content": opens}, {"role": "assistant", "content": "I've read this text."}]
    for kind, names in asked:
        found.append({"role": "user", "content": f"What describes {kind} in the text?"})
        if names is not None:
            found.append({"role": "assistant", "content": json.dumps(list(names), ensure_ascii=False)})
    return found
