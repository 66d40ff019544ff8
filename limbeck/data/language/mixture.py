"""Sets of instructions of several kinds and authors as one source: one form, a tag for each set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from limbeck.core.errors import ConfigError, DataError
from limbeck.core.plain import canonical, digest
from limbeck.data.language.contamination import Held
from limbeck.data.language.read import read_records
from limbeck.data.language.records import ASSISTANT, Fields, Message, Record, said
from limbeck.data.language.source import language_source
from limbeck.data.order import epoch_order
from limbeck.data.sources.source import SPLITS, DataSource

#: A conversation as Tulu writes it; what the assistant says is learned with the end token.
TULU = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{{ '\\n' }}{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_FIELDS = ("text", "prompt", "completion", "messages", "split")


def mixture_source(
    sets: Mapping[str, Any],
    *,
    tokenizer: Any,
    template: Any = TULU,
    against: Any = None,
    words: int = 8,
    share: float = 0.5,
    twice: bool = False,
    seed: int = 0,
    **options: Any,
) -> DataSource:
    """Several sets of instructions with their answers in one form, each record tagged with the name of its set.

    Prompts with completions become conversations of two messages; every turn of the assistant is learned. Recipes name
    it ``limbeck.data.language.mixture:mixture_source``. In which shares sets are shown is the business of a scheme that
    knows tags, such as ``tulu_sft_mixture``.

    Args:
        sets: By name: what :func:`~limbeck.data.language.language_source` reads; or ``source`` with ``by`` (who wrote
            the answers: ``human``, ``self``, or a teacher's name; default ``unknown``), ``cap`` (so many of its records
            at most, drawn at random), ``config``, and columns ``prompt``, ``completion``, ``messages``, ``split``.
        tokenizer: See :func:`~limbeck.data.language.load_tokens`.
        template: Of conversations; Tulu's own. Bytes know ``plain`` only.
        against: Texts of tests, as records or files: a record whose prompt has too much of one is left out.
        words, share: What is too much, see :class:`~limbeck.data.language.contamination.Held`.
        twice: Keep conversations that stood in another set or place before.
        seed: Of caps, and of what is held out.
        options: More of :func:`~limbeck.data.language.language_source`.

    Returns:
        The source. ``settings["mixture"]`` of its splits tells of each set who it is by, how many records it had for
        training, and how many were left out as ``contaminated``, ``twice`` and ``capped``.

    Raises:
        ConfigError: No such set or option.
        DataError: A set without conversations, or of which nothing is left.

    Source: How Far Can Camels Go?, arXiv 2306.04751.

    >>> pairs = [{"prompt": f"{i}?", "completion": f"{i}."} for i in range(9)]
    >>> sets = {"a": {"source": pairs, "by": "human", "cap": 4}, "b": [{"prompt": "why?", "completion": "so."}]}
    >>> source = mixture_source(sets, tokenizer="bytes", template="plain", validation=0)
    >>> len(source.train), source.train.tags, source.train.settings["mixture"]["a"]["capped"]
    (5, ('a', 'b'), 5)
    """
    if not isinstance(sets, Mapping) or not sets:
        raise ConfigError("there are no sets", where="sets", wanted="{NAME: {source: ..., by: ...}}")
    held = None if against is None else Held(_asked_in(against), words, share)
    seen, facts, rows = set[str](), dict[str, dict[str, Any]](), dict[str, list[dict[str, Any]]]()
    for number, (name, spec) in enumerate(sets.items()):
        own = _spec(name, spec)
        fields = Fields(**{field: own[field] for field in _FIELDS if field in own})
        facts[name] = {"by": str(own.get("by", "unknown"))}
        for split, part in read_records(own["source"], fields, own.get("config")).items():
            chats = [_chat(record, name) for record in part.records]
            if split == "train":
                told = _told(held, chats)
                fresh = _fresh([c for c, bad in zip(chats, told, strict=True) if not bad], seen, twice)
                kept = _capped(fresh, own.get("cap"), seed + number, name)
                gone = {"contaminated": sum(told), "twice": len(chats) - sum(told) - len(fresh)}
                facts[name] |= {"records": len(chats), **gone, "capped": len(fresh) - len(kept)}
                if not kept:
                    found = f"{len(chats)} records, " + ", ".join(f"{n} {why}" for why, n in gone.items())
                    raise DataError("nothing is left of a set", where=f"sets.{name}", found=found)
                chats = kept
            rows.setdefault(split, []).extend({"messages": chat, "tag": name} for chat in chats)
    source = language_source(
        rows, tokenizer=tokenizer, messages="messages", tag="tag", template=template, seed=seed, **options
    )
    for split in SPLITS:
        made: Any = getattr(source, split)
        if made is not None:
            made.settings = {**made.settings, "mixture": facts}
    return replace(source, name="mixture")


def _spec(name: str, spec: Any) -> dict[str, Any]:
    """A set's options; what is none of them is where it is read from."""
    if not isinstance(spec, Mapping) or "source" not in spec:
        return {"source": spec}
    for option in spec:
        if option not in ("source", "by", "cap", "config", *_FIELDS):
            wanted = ", ".join(("source", "by", "cap", "config", *_FIELDS))
            raise ConfigError("no such option of a set", where=f"sets.{name}.{option}", wanted=f"one of {wanted}")
    return dict(spec)


def _chat(record: Record, name: str) -> tuple[Message, ...]:
    if record.messages:
        return record.messages
    if len(record.pieces) == 1:
        remedy = "name its columns: prompt and completion, or messages"
        raise DataError("a plain text is no instruction", where=f"sets.{name}, {said(record.place)}", remedy=remedy)
    (asks, _), (answers, _) = record.pieces
    return {"role": "user", "content": asks}, {"role": ASSISTANT, "content": answers}


def _prompt(chat: tuple[Message, ...]) -> str:
    return "\n".join(str(m.get("content") or "") for m in chat if m["role"] != ASSISTANT)


def _told(held: Held | None, chats: list[tuple[Message, ...]]) -> list[bool]:
    return [False] * len(chats) if held is None else held.told([_prompt(chat) for chat in chats])


def _asked_in(against: Any) -> list[str]:
    """What tests ask: prompts where there are such, else whole texts."""
    found = []
    for part in read_records(against, Fields()).values():
        for record in part.records:
            found.append(_prompt(record.messages) if record.messages else record.pieces[0][0])
    return found


def _fresh(chats: list[tuple[Message, ...]], seen: set[str], twice: bool) -> list[tuple[Message, ...]]:
    """Conversations that were not there before."""
    kept = []
    for chat in chats:
        mark = digest(canonical([[m["role"], m.get("content")] for m in chat]))
        if twice or mark not in seen:
            kept.append(chat)
        seen.add(mark)
    return kept


def _capped(chats: list[tuple[Message, ...]], cap: Any, seed: int, name: str) -> list[tuple[Message, ...]]:
    if cap is None:
        return chats
    if isinstance(cap, bool) or not isinstance(cap, int) or cap < 1:
        raise ConfigError("must be a whole number, 1 or more", where=f"sets.{name}.cap", found=repr(cap))
    return [chats[row] for row in sorted(epoch_order(len(chats), seed, 0)[:cap].tolist())]
