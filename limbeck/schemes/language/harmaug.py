"""A classifier with a rare class learns from its teacher, on texts of that class which a language model has written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import map_tensors
from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.files import write_json
from limbeck.core.survey import call_model, dry
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import logits_of
from limbeck.data.balanced import BalancedLoader
from limbeck.data.language.load import load_tokens
from limbeck.data.loader import IndexedLoader, Loader
from limbeck.data.resident import ResidentLoader
from limbeck.data.sources.texts import TextSplit
from limbeck.engine.stage import Stage
from limbeck.models.generating import check_writes
from limbeck.schemes.language.authors import WRITTEN, ModelAuthor, author_of_texts, check_author
from limbeck.schemes.language.prefilled import GOES_ON, Prefilled, responses
from limbeck.schemes.language.telling import Telling
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.routed import TextTeacher

ASK = "Write a single short message that a spam filter should catch."
PREFIX = "I have an idea for a message:"


@register(
    Card(
        key="harmaug",
        name="HarmAug",
        title="HarmAug: Effective Data Augmentation for Knowledge Distillation of Safety Guard Models",
        year=2024,
        arxiv="2410.01524",
        code="imnotkind/HarmAug",
        knowledge="scheme",
        equation=r"L = \tfrac 1 2 \left( -\log p_y + \mathrm{KL}(t \,\|\, p) \right), \qquad "
        r"y = \arg\max t(\tilde x), \quad \tilde x \sim G(\cdot \mid \mathrm{ask}, \mathrm{prefix})",
        use="For a small classifier of texts, one class of which is rare in the data (guards, spam, toxicity), and a "
        "teacher that knows it well. The paper's loss is `{cross_entropy: 0.5, kd: {weight: 0.5, temperature: 1}}`.",
        defaults={
            "ask": "harmless, and of spam: say what your rare class is; the paper asks for what its guard shall find",
            "prefix": "the paper's, of a message instead of a prompt",
            "balance": "on, as in the authors' code: draws with replacement, 1 / the size of a text's class",
            "number": "1000, our choice",
            "train": "the authors': adamw at 3e-5, weight decay 0.1, batches of 256, 3 epochs, 100 steps of warm-up, "
            "falling linearly, gradients clipped at 1",
        },
        evidence="formula",
        evidence_note="the sum of the two terms equals the definition, with the card's numbers; imnotkind/HarmAug "
        "c9d716c43474f80f134d39d5bc9aff0396971791 was read, which trains on texts that were generated before",
        choices=(
            "the teacher reads what the student reads, and is asked again in every step, which gives the scores that "
            "the authors keep in a file",
            "texts of the data keep their labels; those without one (-1) get their teacher's, as what was written does",
            "a text and the answer to it are one text (`pair`), since the tokenizer of tables has no pairs",
            "of several classes the teacher's likeliest is the label; F1 and AUPRC are those of "
            "`limbeck.analysis.rare.assess_rare`",
        ),
        tasks=("classification",),
        cost="Training costs what its loss costs; before it a language model writes once.",
    )
)
class HarmAug(Scheme):
    r"""One stage on the data and what was written beside them, all classes as likely.

    .. math:: L = \tfrac 1 2 \left( -\log p_y + \mathrm{KL}(t \,\|\, p) \right)

    A language model is asked for texts of the rare class, and its answer is begun for it, so that it goes on. Each
    text may be answered by another. The teacher says what class they are of. What was written lies in ``written/`` of
    the run's folder, with ``summary.json``.

    Args:
        ask: What the language model is asked; say here what the rare class is.
        prefix: How its answer begins.
        number: Of texts that are drawn; equal ones count once.
        respond: The prompt for an answer to each text, with ``{text}``; empty: there are no answers.
        pair: A text with the answer to it, ``{text}`` and ``{answer}``, as the data have it.
        chat: Ask in messages; else in one text that is gone on with.
        balance: Draw all classes alike.
        temperature: Of drawing texts.
        tokens, answer_tokens: Of a text, and of the answer to it, at most.
        extra: Fields of a request that make a server go on with a message.
        writer: Who writes: a ``ServedTeacher`` or its like, or its arguments; ``None``: the player ``generator``.
        responder: Who answers; ``None``: who writes.
        tokenizer: The player's; see :func:`~limbeck.data.language.load_tokens`.
        batch_size: Texts that the player writes at a time.

    Source: HarmAug, arXiv 2410.01524.

    >>> HarmAug(number=50).asks.prompt[1]["content"]
    'I have an idea for a message:'
    """

    def __init__(
        self,
        ask: str = ASK,
        prefix: str = PREFIX,
        number: int = 1000,
        respond: str = "",
        pair: str = "{text}\n{answer}",
        chat: bool = True,
        balance: bool = True,
        temperature: float = 1.0,
        tokens: int = 128,
        answer_tokens: int = 256,
        extra: dict[str, Any] = GOES_ON,
        writer: Any = None,
        responder: Any = None,
        tokenizer: Any = None,
        batch_size: int = 16,
    ) -> None:
        self.asks = Prefilled(ask, prefix, chat, number, temperature, tokens, dict(extra))
        for name, text, marks in (("respond", respond, ["{text}"]), ("pair", pair, ["{text}", "{answer}"])):
            missing = [mark for mark in marks if text and mark not in text]
            if missing or (name == "pair" and not text):
                raise ConfigError(
                    "the template leaves something out", where=f"scheme.{name}", wanted=" and ".join(marks)
                )
        if answer_tokens < 1:
            raise ConfigError("must be 1 or more", where="scheme.answer_tokens", found=answer_tokens)
        self.writer = None if writer is None else check_author(writer)
        self.responder = None if responder is None else check_author(responder, "scheme.responder")
        self.respond, self.pair, self.balance, self.answer_tokens = respond, pair, balance, answer_tokens
        self.tokenizer, self.batch_size = tokenizer, batch_size

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher = cast.need_teacher("what was written is labelled by")
        if not isinstance(teacher, FrozenTeacher):
            wanted = "a model at hand, since it is asked about new texts"
            raise ConfigError(
                "this teacher knows the data only", where="teacher", found=type(teacher).__name__, wanted=wanted
            )
        loader = cast.train
        if not isinstance(loader, IndexedLoader) or not isinstance(loader.split, TextSplit):
            wanted = "texts with classes, as a table with a text column"
            raise DataError("no texts to add to", where="scheme harmaug", found=type(loader).__name__, wanted=wanted)
        if self.writer is None:
            check_writes(cast.player("generator"), "players.generator")
            if self.tokenizer is None:
                raise ConfigError("who writes has a tokenizer", where="scheme.tokenizer", found="none")
        facts = {"asks": dataclasses.asdict(self.asks), "respond": self.respond, "pair": self.pair}
        distiller = Telling(cast, teacher, {**facts, "balance": self.balance})
        yield Training([Stage("harmaug", distiller, cast.config)], train=lambda: self._more(cast, loader, teacher))

    def _more(self, cast: Cast, loader: IndexedLoader, teacher: FrozenTeacher) -> Loader:
        """The data and what was written beside them."""
        split: TextSplit = loader.split
        texts, facts = self._written(cast)
        new = split.tokenizer(texts) if texts else map_tensors(split.inputs, lambda t: t[:0])
        inputs = {name: torch.cat([own, new[name]]) for name, own in split.inputs.items()}
        known = torch.full((len(split),), -1) if split.labels is None else split.labels
        labels = torch.cat([known, torch.full((len(texts),), -1)])
        without = (labels < 0).nonzero().flatten()
        scores = scored(teacher, map_tensors(inputs, lambda t: t[without]), loader.device, split.measured)
        labels[without] = scores.argmax(dim=1)
        made = replace(split, inputs=inputs, labels=labels)
        counts = {"data": labels[: len(split)].bincount().tolist(), "written": labels[len(split) :].bincount().tolist()}
        if cast.folder is not None and int(os.environ.get("RANK", "0")) == 0:
            write_json(cast.folder / WRITTEN / "summary.json", {**facts, "added": len(texts), "classes": counts})
        own = {
            name: getattr(loader, name) for name in ("shuffle", "drop_last", "device", "seed", "classes", "class_names")
        }
        found = ResidentLoader(made.load(), made.labels, batch_size=loader.batch_size, augment=loader.augment, **own)
        found.task, found.vocabulary, found.split = made.task, made.vocabulary, made
        return BalancedLoader(found) if self.balance else found

    def _written(self, cast: Cast) -> tuple[list[str], dict[str, int]]:
        with author_of_texts(self.writer or self._player(cast), cast.folder) as author:
            texts, facts = self.asks.texts(author, cast.seed)
            if not self.respond:
                return texts, facts
            if self.responder is None:
                return self._paired(author, texts, cast.seed), facts
        with author_of_texts(self.responder, cast.folder, "scheme.responder") as author:
            return self._paired(author, texts, cast.seed), facts

    def _paired(self, author: TextTeacher, texts: list[str], seed: int) -> list[str]:
        said = responses(author, texts, self.respond, self.answer_tokens, seed)
        return [self.pair.replace("{answer}", a).replace("{text}", t) for t, a in zip(texts, said, strict=True)]

    def _player(self, cast: Cast) -> ModelAuthor:
        folder = None if cast.folder is None else cast.folder / WRITTEN
        device = getattr(cast.train, "device", torch.device("cpu"))
        tokens = load_tokens(self.tokenizer, where="scheme.tokenizer")
        known: dict[str, Any] = {"folder": folder, "batch_size": self.batch_size, "seed": cast.seed}
        return ModelAuthor(cast.player("generator").to(device), tokens, **known)


def scored(teacher: FrozenTeacher, inputs: dict[str, Tensor], device: torch.device, size: int = 512) -> Tensor:
    """The teacher's probability of each class ``[N, C]``.

    Args:
        teacher: A model at hand.
        inputs: A row a text.
        device: Where it works.
        size: Texts at a time.
    """
    model, found = teacher.model.to(device), [torch.zeros(0, 1)]
    count = len(next(iter(inputs.values())))
    with dry(model):
        for first in range(0, count, size):
            some = {name: value[first : first + size].to(device) for name, value in inputs.items()}
            found.append(logits_of(call_model(model, some), teacher.where).softmax(dim=-1).cpu())
    return torch.cat(found[1:] or found)
