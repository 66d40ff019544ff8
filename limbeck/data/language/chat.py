"""Conversations as text: which characters of a rendered chat are the assistant's turns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.core.errors import DataError, MissingExtra
from limbeck.data.language.records import ASSISTANT, Message, Place, said

#: ``role: content`` and the end-of-text token for each message; the template of tokenizers that are trained here.
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation.

    Args:
        text: What is written.
        learned: It is the assistant's, so its tokens are predicted.
        content: What the message says, without what the template puts around it; ``None`` where it is not learned.
        marks: Ids after the text, where the end of a turn has no text.
    """

    text: str
    learned: bool
    content: str | None = None
    marks: tuple[int, ...] = ()


def plain_turns(messages: Sequence[Message], first: int, marks: tuple[int, ...]) -> list[Segment]:
    """``role: content`` for each message, ended by marks.

    >>> chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    >>> [segment.text for segment in plain_turns(chat, 0, (1,))]
    ['user: a', 'assistant: ', 'b']
    """
    found = []
    for number, message in enumerate(messages):
        head, content = f"{message['role']}: ", message.get("content", "")
        if message["role"] == ASSISTANT and number >= first:
            found += [Segment(head, False), Segment(content, True, content, marks)]
        else:
            found.append(Segment(head + content, False, None, marks))
    return found


def template_turns(
    template: str,
    messages: Sequence[Message],
    first: int,
    place: Place,
    *,
    named: Mapping[str, Any],
    specials: Sequence[str],
) -> list[Segment]:
    """A conversation rendered by a template.

    Where the template marks what the assistant generates (``{% generation %}``), that is learned. Where it does not,
    the conversation is rendered up to each turn, with the header that asks for an answer, and up to its end: the turn
    is what lies between. White space that a template writes after the end token of a turn is not part of it.

    Args:
        template: In Jinja.
        messages: Of the conversation.
        first: Turns before this message are not learned.
        place: For messages.
        named: Special tokens by the names that templates use, such as ``eos_token``.
        specials: Every special token.

    Raises:
        DataError: The template refuses the conversation, or a turn cannot be found in it.
    """
    turns = [number for number, m in enumerate(messages) if m["role"] == ASSISTANT]
    if _GENERATION.search(template):
        whole, spans = _render(template, messages, place, named, marked=True)
        if len(spans) != len(turns):
            raise DataError(
                "the chat template does not mark every turn of the assistant",
                where=said(place),
                found=f"{len(spans)} marked as generated, of {len(turns)} turns",
                remedy="put {% generation %} and {% endgeneration %} around a whole turn in the template",
            )
    else:
        whole, _ = _render(template, messages, place, named)
        spans = [_span(template, messages, turn, whole, place, named, specials) for turn in turns]
    found, last = [], 0
    for turn, (start, stop) in zip(turns, spans, strict=True):
        if turn < first:
            continue
        if start < last:
            raise DataError("turns of the assistant overlap in the rendered chat", where=said(place))
        found += [Segment(whole[last:start], False)] if start > last else []
        found.append(Segment(whole[start:stop], True, messages[turn].get("content", "")))
        last = stop
    return found + ([Segment(whole[last:], False)] if last < len(whole) else [])


def _span(
    template: str,
    messages: Sequence[Message],
    turn: int,
    whole: str,
    place: Place,
    named: Mapping[str, Any],
    specials: Sequence[str],
) -> tuple[int, int]:
    """Where a turn stands in the rendered chat: between the header that asks for it, and its end."""
    head = _render(template, messages[:turn], place, named, ask=True)[0] if turn else ""
    upto = _render(template, messages[: turn + 1], place, named)[0]
    if not upto.startswith(head) or not whole.startswith(upto):
        broken, longer = (head, upto) if not upto.startswith(head) else (upto, whole)
        at = next((i for i, (a, b) in enumerate(zip(broken, longer, strict=False)) if a != b), len(longer))
        raise DataError(
            "the chat template writes the beginning of a conversation otherwise once it goes on",
            where=f"{said(place)}, message {turn + 1}",
            found=f"{broken[max(0, at - 20) : at + 20]!r}, later {longer[max(0, at - 20) : at + 20]!r}",
            remedy="mark the assistant's turns in the template with {% generation %}, or split the conversation into "
            "one record a turn",
        )
    turned = upto.rstrip()
    if any(turned.endswith(token) for token in specials) and len(turned) > len(head):
        upto = turned
    return len(head), len(upto)


def _render(
    template: str,
    messages: Sequence[Message],
    place: Place,
    named: Mapping[str, Any],
    *,
    ask: bool = False,
    marked: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where its template marks what was generated."""
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise MissingExtra("transformers", extra="language") from error
    try:
        found: Any = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            add_generation_prompt=ask,
            return_assistant_tokens_mask=marked,
            **named,
        )
    except Exception as error:  # templates raise what they like
        raise DataError(
            "the chat template does not take this conversation",
            where=said(place),
            found=f"{type(error).__name__}: {error}",
            remedy="check roles and their order",
        ) from error
    (text,), spans = found
    return text, spans[0] if marked else []
