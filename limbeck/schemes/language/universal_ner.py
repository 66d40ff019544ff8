"""A language model learns to name the entities of any type, from passages that another one has annotated."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.files import write_json
from limbeck.core.plain import digest
from limbeck.data.language.arrange import arrange
from limbeck.data.language.corpus import encode
from limbeck.data.language.entities import (
    SYSTEM,
    Annotated,
    Entity,
    conversation,
    frequencies,
    questions,
    read_list,
    read_tuples,
)
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.read import tables
from limbeck.data.language.records import ASSISTANT, Record, said, text_of
from limbeck.data.language.rewritten import text_of as text_in
from limbeck.data.language.rewritten import unended
from limbeck.data.language.split import LanguageSplit
from limbeck.data.loader import Loader
from limbeck.engine.stage import Stage
from limbeck.schemes.language.annotating import Asks
from limbeck.schemes.language.authors import WRITTEN, told
from limbeck.schemes.language.telling import Telling
from limbeck.schemes.language.writing import texts_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.routed import TextTeacher

_HEAD = "You are a helpful information extraction system.\n\nGiven a passage, your task is to extract all entities and "
TEMPLATES = {
    "type": _HEAD + "identify their entity types. The output should be in a list of tuples of the following format: "
    '[("entity 1", "type of entity 1"), ... ].\n\nPassage: {passage}\n',
    "definition": _HEAD + "to say in one short sentence what kind of thing each of them is. The output should be in a "
    'list of tuples of the following format: [("entity 1", "definition of its type"), ... ].\n\nPassage: {passage}\n',
}
NEGATIVES = ("frequency", "uniform", "none")


@register(
    Card(
        key="universal_ner",
        name="UniversalNER",
        title="UniversalNER: Targeted Distillation from Large Language Models for Open Named Entity Recognition",
        year=2023,
        arxiv="2308.03279",
        code="universal-ner/universal-ner",
        knowledge="scheme",
        equation=r"L = - \frac{1}{|A|} \sum_{t \in A} \log p_S(y_t \mid y_{<t}), \qquad "
        r"p(t^-) \propto n_{t^-} [t^- \notin x]",
        use="To make a small language model that finds entities of any type out of plain passages of many kinds, and a "
        "language model that can. With cross_entropy; `data.options.template` may be the paper's, "
        "`limbeck.data.language.entities.IE_AS_QA`.",
        defaults={
            "kind": "type, the paper's usual one",
            "negatives": "frequency, the paper's best",
            "most": "as many as the passage's own types, 10 at most, our choice",
            "verify": "on, our choice; the paper keeps what can be read",
            "data.options.length": "the paper's passages have 256 tokens at most, cut from a diverse corpus",
            "train": "2e-5, 3 epochs, batches of 256, cosine",
        },
        evidence="formula",
        evidence_note="what counts are the answers' tokens, compared with a conversation that is written out by hand; "
        "names in normal form are those of universal-ner/universal-ner 844e0e12262f2606d1d61ed5e9a89ce06ea6b5e3",
        choices=(
            "the acknowledgement of the passage is not learned, the answers are",
            "types are one whatever their case; their frequency is that of their entities",
            "a passage without entities has no questions, and is left out",
            "the words of the definitions' prompt are ours",
            "the first list of an answer may hold brackets, which the authors' parser cuts off",
        ),
        tasks=("language",),
        cost="Training costs what its loss costs; before it a language model answers once for each passage.",
    )
)
class UniversalNER(Scheme):
    r"""A teacher lists the entities of each passage; the student learns to answer one question for each type.

    .. math:: L = - \frac{1}{|A|} \sum_{t \in A} \log p_S(y_t \mid y_{<t})

    A row is a conversation: the passage, then ``What describes TYPE in the text?`` with a JSON list for an answer, in
    a random order; among them types that the passage has none of. A are the answers' tokens. Answers of the teacher
    lie in ``written/`` of the run's folder, with ``summary.json``. Rows of the data are passages.

    Args:
        kind: The teacher says a ``type``, or a ``definition`` in its place.
        template: Another prompt, with ``{passage}``; empty: that of the kind.
        verify: Entities that do not stand in the passage are left out.
        negatives: How types that are not there are drawn: ``frequency``, ``uniform`` or ``none``.
        most: Of these in a passage, at most.
        system: The first message of a conversation.
        length: Tokens of a conversation at most; the rest is cut off.
        gold: Passages that people labelled, to learn beside the others: records, or a file, with ``text``,
            ``entities`` (pairs of name and type) and, if sets label differently, ``dataset``.
        samples, agree, temperature, tokens, chat, batch_size, writer: See :class:`ADELLMDistill`.

    Source: UniversalNER, arXiv 2308.03279.

    >>> UniversalNER(negatives="uniform").asks("Rome is old.")[-22:]
    'Passage: Rome is old.\n'
    """

    def __init__(
        self,
        kind: str = "type",
        template: str = "",
        verify: bool = True,
        negatives: str = "frequency",
        most: int = 10,
        system: str = SYSTEM,
        length: int | None = 2048,
        gold: Any = None,
        samples: int = 1,
        agree: float = 0.5,
        temperature: float = 1.0,
        tokens: int = 512,
        chat: bool = False,
        batch_size: int = 16,
        writer: Any = None,
    ) -> None:
        for name, value, known in (("kind", kind, tuple(TEMPLATES)), ("negatives", negatives, NEGATIVES)):
            if value not in known:
                raise ConfigError("no such choice", where=f"scheme.{name}", found=repr(value), wanted=", ".join(known))
        self.template = template or TEMPLATES[kind]
        if "{passage}" not in self.template:
            raise ConfigError("the template leaves something out", where="scheme.template", wanted="{passage}")
        if most < 0:
            raise ConfigError("must be 0 or more", where="scheme.most", found=most)
        self.teacher = Asks(writer, samples, agree, temperature, tokens, chat, batch_size)
        self.verify, self.negatives, self.most, self.system = verify, negatives, most, system
        if length is not None and length < 2:
            raise ConfigError("must be 2 or more", where="scheme.length", found=length)
        self.length = length
        self.gold = [] if gold is None else _gold(gold)

    def asks(self, passage: str) -> str:
        """What the teacher is asked about a passage."""
        return self.template.replace("{passage}", passage)

    def trainings(self, cast: Cast) -> Iterator[Training]:
        loader = texts_of(cast.train, "universal_ner")
        self.teacher.check(cast)
        names = ("template", "verify", "negatives", "most", "system", "length")
        distiller = Telling(cast, None, {name: getattr(self, name) for name in names})
        stage = Stage("universal_ner", distiller, cast.config)
        yield Training([stage], train=lambda: self._conversations(cast, loader), judged=False)

    def _conversations(self, cast: Cast, loader: LanguageLoader) -> Loader:
        """Questions and answers about the passages, once the teacher has named their entities."""
        passages, facts = self.annotate(cast, loader)
        passages += self.gold
        known = frequencies(passages)
        records, counts = [], {"questions": 0, "negatives": 0}
        for number, passage in enumerate(passages):
            seed = cast.seed + 1000003 * number
            asked = questions(passage, known, negatives=self.negatives, most=self.most, seed=seed)
            if asked:
                records.append(record(passage, asked, self.system))
                counts["questions"] += len(asked)
                counts["negatives"] += sum(not names for _, names in asked)
        if not records:
            found = f"{facts['asked']} answers, {facts['unreadable']} of them unreadable"
            wanted = '[("entity", "type"), ...]'
            raise DataError("no entity was named", where="scheme universal_ner", found=found, wanted=wanted)
        split = told_in(loader.split, records, self.length)
        if cast.folder is not None and int(os.environ.get("RANK", "0")) == 0:
            facts |= {**counts, "rows": len(split), "gold": len(self.gold), "types": len(known)}
            write_json(cast.folder / WRITTEN / "summary.json", facts)
        options = {name: getattr(loader, name) for name in ("batch_size", "shuffle", "drop_last", "device", "seed")}
        return LanguageLoader(split, **options)

    def annotate(self, cast: Cast, loader: LanguageLoader) -> tuple[list[Annotated], dict[str, int]]:
        """Passages with what the teacher named in them, those left out that cannot be read; and how many they are."""
        texts, tokens = list[str](), loader.split.tokens
        for row in range(len(loader.split)):
            batch = loader.rows.batch(torch.tensor([row]))
            ids = batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0] > 0].tolist()
            texts.append(text_in(tokens, unended(tuple(ids), tokens.back)))
        with self.teacher.author(cast, loader) as author:
            answers: list[list[Entity] | None] = self.teacher.items(
                author, [self.asks(text) for text in texts], read_tuples, cast.seed
            )
        facts = {"asked": len(texts), "unreadable": sum(a is None for a in answers), "entities": 0, "not_there": 0}
        found = []
        for text, entities in zip(texts, answers, strict=True):
            if entities is not None:
                there = [e for e in entities if not self.verify or e[0].casefold() in text.casefold()]
                facts["entities"] += len(entities)
                facts["not_there"] += len(entities) - len(there)
                found.append(Annotated(text, tuple(there)))
        return found, facts


def record(passage: Annotated, asked: Sequence[tuple[str, list[str]]], system: str = SYSTEM) -> Record:
    """A conversation of which the answers are learned."""
    messages = conversation(passage.text, asked, system, passage.dataset)
    first = next(n for n, message in enumerate(messages) if message["role"] == ASSISTANT) + 1
    return Record(messages=tuple(messages), first=first)


def told_in(split: LanguageSplit, records: Sequence[Record], length: int | None = None) -> LanguageSplit:
    """Other records as a split, laid out as another one, with rows of another length."""
    own = split.tokens
    corpus = encode(records, own)
    layout = replace(split.rows.layout, length=length)
    rows, _ = arrange(corpus, layout, pad=own.pad, long="truncate", where="conversations")
    made = digest(corpus.ids.numpy().tobytes(), corpus.learned.byte().numpy().tobytes())
    return replace(split, rows=rows, tags=(), teacher_tokens=None, settings={**split.settings, "written": made})


def find_entities(
    author: TextTeacher, text: str, types: Sequence[str], *, tokens: int = 256, system: str = SYSTEM
) -> dict[str, list[str]]:
    """What a student names in a passage, for each type, in normal form: one greedy answer each.

    Args:
        author: The student, as a :class:`~limbeck.schemes.language.authors.ModelAuthor`.
        text: The passage.
        types: What is asked for.
        tokens: Of an answer at most.
        system: As it was trained with.
    """
    prompts = [conversation(text, [(kind, None)], system) for kind in types]
    answers = told(author, prompts, max_tokens=tokens, temperature=0.0)
    return {kind: read_list(answer.text) for kind, (answer, *_) in zip(types, answers, strict=True)}


def _gold(spec: Any) -> list[Annotated]:
    found = []
    for _, name, unit, rows in tables(spec):
        for row, number in rows:
            place = (name, unit, number)
            pairs = row.get("entities") if isinstance(row, Mapping) else None
            if pairs is None or not all(len(p) == 2 and all(isinstance(s, str) for s in p) for p in pairs):
                where, wanted = f"scheme.gold, {said(place)}", "{text: ..., entities: [[name, type], ...]}"
                raise DataError("this is no labelled passage", where=where, wanted=wanted)
            entities = tuple((str(a), str(b)) for a, b in pairs)
            found.append(Annotated(text_of(row.get("text"), place, "text"), entities, str(row.get("dataset") or "")))
    return found
