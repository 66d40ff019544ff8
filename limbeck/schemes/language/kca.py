"""A student is not taught to assert what it does not know: its teacher's answers are sorted by an exam."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.files import write_json
from limbeck.core.reduction import check_inside
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.rewritten import Ids, after, parted, rewritten, text_of, unended
from limbeck.data.loader import Loader
from limbeck.engine.stage import Stage
from limbeck.schemes.language.annotating import Asks
from limbeck.schemes.language.authors import WRITTEN, told
from limbeck.schemes.language.examining import (
    EXAM,
    KNOWLEDGE,
    LETTERS,
    NEED,
    SHOTS,
    Question,
    choices,
    read_exam,
    read_need,
    shots_of,
)
from limbeck.schemes.language.tailoring import filled
from limbeck.schemes.language.telling import Telling
from limbeck.schemes.language.writing import same_tokens, texts_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register

SORRY = "Sorry, I don't know the factual information required to answer this question."
STRATEGIES, UNREAD = ("open_book", "discard", "refuse"), ("drop", "keep")


@register(
    Card(
        key="kca",
        name="KCA",
        title="Mitigating Hallucinations of Large Language Models via Knowledge Consistent Alignment",
        year=2024,
        arxiv="2401.10768",
        code="fanqiwan/KCA",
        knowledge="scheme",
        equation=r"L = - \sum_t \log p_S(y'_t \mid x', y'_{<t}), \qquad "
        r"(x', y') = \begin{cases} (x, y) & \text{no facts needed, or } a(x) > \tau \\ (k x, y) & \text{open book} \\ "
        r"(x, \text{sorry}) & \text{refusal} \end{cases}",
        use="Before a base model is tuned on answers of a stronger one, which state facts that it never learned: such "
        "answers teach it to invent. Data are prompts with those answers; with cross_entropy.",
        defaults={
            "strategy": "open_book, the paper's first; discard and refuse are its others",
            "threshold": "0.6, the authors' code, above which all is well (of three questions two do)",
            "questions": "3, the authors' code",
            "shots": "five, as in the authors' code; the questions are ours",
        },
        evidence="reading",
        evidence_note="fanqiwan/KCA 8cd429ce275efcbc80d1564461fe1f3778784061 was read; where the student knows all, "
        "weights are those of plain tuning bit for bit",
        choices=(
            "prompts say in our words what the authors' ask for",
            "the student answers by its likeliest letter, as in the authors' code",
            "knowledge stands before the whole prompt, in a conversation before its first turn",
            "an answer of the examiner that cannot be read takes the row out, as in the authors' code; or keeps it",
        ),
        tasks=("language",),
        cost="Training costs what its loss costs; before it an examiner writes up to three times for each row.",
    )
)
class KCA(Scheme):
    r"""An examiner tells which facts an answer needs and asks the student about them; then the student is trained.

    Rows are of four classes: ``no_need`` (no facts are needed), ``known`` (the student passes), ``unknown`` (it does
    not), ``unread`` (the examiner could not be understood). Those that are unknown are changed by the strategy:
    ``open_book`` puts the facts before the prompt, ``discard`` leaves the row out, ``refuse`` has the student say that
    it does not know. ``written/summary.json`` in the run's folder counts the classes, and the rows that are longer than
    ``data.options.length`` now: leave room for the facts.

    Args:
        strategy: See above.
        threshold: Of the share of right answers, above which a row is known.
        inclusive: At the threshold, too.
        questions: In an exam.
        shots: Questions with answers before each question: ``{question, options, answer}``.
        refusal: What is learned by ``refuse``.
        unread: ``drop`` or ``keep`` what the examiner said nothing readable about.
        need, knowledge, exam: Other prompts, with ``{instruction}``; with ``{instruction}``, ``{analysis}`` and
            ``{output}``; with ``{knowledge}`` and ``{number}``.
        tokens: Of an answer of the examiner at most.
        chat: An examiner at hand is asked in its chat template.
        batch_size: Texts at a time, of an examiner at hand and of the student's exam.
        writer: Who examines in the teacher's place; see :class:`SeqKD`.

    Source: Knowledge Consistent Alignment, arXiv 2401.10768.

    >>> KCA().passes(2, 3), KCA().passes(3, 5), KCA(inclusive=True).passes(3, 5)
    (True, False, True)
    """

    def __init__(
        self,
        strategy: str = "open_book",
        threshold: float = 0.6,
        inclusive: bool = False,
        questions: int = 3,
        shots: list[dict[str, Any]] = SHOTS,
        refusal: str = SORRY,
        unread: str = "drop",
        need: str = NEED,
        knowledge: str = KNOWLEDGE,
        exam: str = EXAM,
        tokens: int = 1024,
        chat: bool = False,
        batch_size: int = 16,
        writer: Any = None,
    ) -> None:
        for name, value, known in (("strategy", strategy, STRATEGIES), ("unread", unread, UNREAD)):
            if value not in known:
                raise ConfigError("no such choice", where=f"scheme.{name}", found=repr(value), wanted=", ".join(known))
        check_inside(threshold, "scheme.threshold", closed=True)
        if questions < 1:
            raise ConfigError("must be 1 or more", where="scheme.questions", found=questions)
        for name, text, mark in (
            ("need", need, "{instruction}"),
            ("knowledge", knowledge, "{instruction}"),
            ("exam", exam, "{knowledge}"),
        ):
            if mark not in text:
                raise ConfigError("the template leaves something out", where=f"scheme.{name}", wanted=mark)
        self.shots = [_shot(shot, number) for number, shot in enumerate(shots)]
        self.examiner = Asks(writer, tokens=tokens, chat=chat, batch_size=batch_size)
        self.strategy, self.threshold, self.inclusive, self.questions = strategy, threshold, inclusive, questions
        self.refusal, self.unread, self.prompts = refusal, unread, {"need": need, "knowledge": knowledge, "exam": exam}

    def passes(self, right: int, number: int) -> bool:
        """Whether so many right answers are enough."""
        share = right / number
        return share > self.threshold or (self.inclusive and share >= self.threshold)

    def trainings(self, cast: Cast) -> Iterator[Training]:
        loader = texts_of(cast.train, "kca")
        self.examiner.check(cast)
        same_tokens(loader, "kca")
        names = ("strategy", "threshold", "inclusive", "questions", "refusal", "unread")
        facts = {**{name: getattr(self, name) for name in names}, **self.prompts}
        stage = Stage("kca", Telling(cast, cast.teacher, facts), cast.config)
        yield Training([stage], train=lambda: self._aligned(cast, loader))

    def _aligned(self, cast: Cast, loader: LanguageLoader) -> Loader:
        """The data, once the student has been examined."""
        split, tokens = loader.split, loader.split.tokens
        sides = list(parted(split))
        texts = [(text_of(tokens, prompt), tokens.decode(unended(said, tokens.back))) for prompt, said in sides]
        classes, known = self.classify(cast, loader, texts)
        rows, prompts, said = list[int](), list[Ids](), list[Ids]()
        for row, (kind, (prompt, answer)) in enumerate(zip(classes, sides, strict=True)):
            if (kind == "unread" and self.unread == "drop") or (kind == "unknown" and self.strategy == "discard"):
                continue
            if kind == "unknown" and self.strategy == "refuse":
                space = texts[row][1][: len(texts[row][1]) - len(texts[row][1].lstrip())]
                answer = after(tokens, [space + self.refusal], [True])[0]
            elif kind == "unknown":
                prompt = before(prompt, tuple(tokens.encode([known[row] + "\n"])[0][0].tolist()), tuple(tokens.front))
            rows.append(row)
            prompts.append(prompt)
            said.append(answer)
        most = split.rows.layout.length
        long = 0 if most is None else sum(len(a) + len(b) > most for a, b in zip(prompts, said, strict=True))
        counts = {kind: classes.count(kind) for kind in ("no_need", "known", "unknown", "unread")}
        if cast.folder is not None and int(os.environ.get("RANK", "0")) == 0:
            facts = {"rows": len(rows), "too_long": long, "classes": counts}
            write_json(cast.folder / WRITTEN / "summary.json", facts)
        if not rows:
            found = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            remedy = "another strategy, another examiner, or unread: keep"
            raise DataError("nothing is left to learn", where="scheme kca", found=found, remedy=remedy)
        options = {name: getattr(loader, name) for name in ("batch_size", "shuffle", "drop_last", "device", "seed")}
        return LanguageLoader(rewritten(split, rows, prompts, said), **options)

    def classify(
        self, cast: Cast, loader: LanguageLoader, texts: list[tuple[str, str]]
    ) -> tuple[list[str], dict[int, str]]:
        """The class of each row, and the facts that rows need which need some.

        Args:
            cast: With the student, who is examined, and the examiner.
            loader: The data.
            texts: Prompts with their answers.
        """
        classes, knowledge = ["unread"] * len(texts), dict[int, str]()
        with self.examiner.author(cast, loader) as author:

            def ask(name: str, fields: list[dict[str, str]]) -> list[str]:
                prompts = [filled(self.prompts[name], own) for own in fields]
                answers = told(author, prompts, max_tokens=self.examiner.tokens, temperature=0.0) if prompts else []
                return [answer.text for (answer, *_) in answers]

            needs = [read_need(said) for said in ask("need", [{"instruction": prompt.strip()} for prompt, _ in texts])]
            wanting, asked = list[int](), list[dict[str, str]]()
            for row, (need, (prompt, answer)) in enumerate(zip(needs, texts, strict=True)):
                if need is not None and need[0]:
                    wanting.append(row)
                    asked.append({"instruction": prompt.strip(), "analysis": need[1], "output": answer.strip()})
                elif need is not None:
                    classes[row] = "no_need"
            knowledge = {n: said.strip() for n, said in zip(wanting, ask("knowledge", asked), strict=True)}
            number = str(self.questions)
            exams = ask("exam", [{"knowledge": knowledge[row], "number": number} for row in wanting])
        head, questions, owners = shots_of(self.shots), list[Question](), list[int]()
        for row, exam in zip(wanting, exams, strict=True):
            own = read_exam(exam)[: self.questions]
            questions += own
            owners += [row] * len(own)
        said = choices(
            cast.student.to(loader.device),
            loader.split.tokens,
            [head + question.asked() for question in questions],
            device=loader.device,
            batch_size=self.examiner.batch_size,
            logits=cast.logits,
        )
        marks = dict[int, list[bool]]()
        for row, question, letter in zip(owners, questions, said, strict=True):
            marks.setdefault(row, []).append(question.answer == letter)
        for row, hits in marks.items():
            classes[row] = "known" if self.passes(sum(hits), len(hits)) else "unknown"
        return classes, knowledge


def before(prompt: Ids, more: Ids, front: Ids) -> Ids:
    """A prompt's tokens with others before them, behind the marks of a document's beginning.

    >>> before((1, 5, 6), (7, 8), (1,))
    (1, 7, 8, 5, 6)
    """
    marks = front if front and prompt[: len(front)] == front else ()
    return (*marks, *more, *prompt[len(marks) :])


def _shot(shot: Mapping[str, Any], number: int) -> Question:
    options = tuple(shot.get("options", ()))
    if set(shot) != {"question", "options", "answer"} or len(options) != len(LETTERS) or shot["answer"] not in LETTERS:
        wanted = "{question: ..., options: [four], answer: A, B, C or D}"
        raise ConfigError("no such question", where=f"scheme.shots.{number}", wanted=wanted)
    return Question(str(shot["question"]), options, str(shot["answer"]))
