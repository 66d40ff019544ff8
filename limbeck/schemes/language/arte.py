"""ARTE: the teacher learns to write what its student likes to learn from, then writes the training data."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.reduction import check_positive
from limbeck.core.schedules import Constant
from limbeck.core.teacher import FrozenTeacher, Teacher
from limbeck.engine.stage import Stage
from limbeck.objectives.parts.preference import DPO
from limbeck.schemes.language.authors import check_author
from limbeck.schemes.language.preferences import Preferences
from limbeck.schemes.language.tailor import Tailor
from limbeck.schemes.language.writing import author_of, texts_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register

QUESTION = (
    "Here are some questions of one kind:\n\n{questions}\n\nWrite one more question of this kind about something else. "
    "Say nothing but the question.\n\n"
)
PLAIN = "{question}\n\nThink step by step, and end with 'The answer is: ' and the answer.\n\n"
TECHNIQUES = (
    PLAIN,
    "{question}\n\nExplain it as to a five-year-old, and end with 'The answer is: ' and the answer.\n\n",
    "{question}\n\nReason in mathematical symbols, and end with 'The answer is: ' and the answer.\n\n",
    "{question}\n\nReason in as few words as you can, and end with 'The answer is: ' and the answer.\n\n",
)
ANSWER = r"(?:####|answer is:?) *(.+)"


@register(
    Card(
        key="arte",
        name="ARTE",
        title="Aligning Teacher with Student Preferences for Tailored Training Data Generation",
        year=2024,
        arxiv="2406.19227",
        code="THU-KEG/ARTE",
        knowledge="scheme",
        equation=r"s_r = \frac{1}{|V|} \sum_{(q', a') \in V} [S(q, r; q') = a'], \qquad "
        r"L_{DPO} = -\log \sigma\left( \beta \left[ \log \frac{\pi(y_w \mid x)}{\pi_{ref}(y_w \mid x)} - "
        r"\log \frac{\pi(y_l \mid x)}{\pi_{ref}(y_l \mid x)} \right] \right)",
        use="For a small student of a task with few labelled questions, and a teacher that can be trained: it writes "
        "the training set. With loss cross_entropy. The data are the labelled questions; tags tell tasks apart.",
        defaults={
            "drafts": "250 a task, the paper's",
            "techniques": "four, the paper's number; it names three of them",
            "preference": "40 of 100 questions, the paper's",
            "question_pairs": "50 a task, of the best and worst quarter, the paper's",
            "beta": "0.1, as in DPO's own paper; this one does not say",
            "align": "1 epoch in batches of 16 at 1e-7, a tenth of it warm-up, cosine: the paper's",
            "questions": "250 a task, which makes the paper's 6,750 examples of 27 tasks",
        },
        evidence="reading",
        evidence_note="the authors' repository holds a readme only; loss, scores and pairs equal the paper's "
        "definitions, computed independently",
        choices=(
            "the recipe's training data are the labelled set: a task's first questions are imitated, the next judge; "
            "so held-out data stay unseen",
            "questions of the best quarter are paired with those of the worst by rank, ties are left out",
            "questions that tell small models apart are told by the student after 0 to 3 examples, and by players",
            "score: likelihood judges by the log-probability of the answers, for students that are hardly ever right",
            "a teacher that only answers (writer) is not aligned: of its rationales the student learns the one that "
            "it likes best, as the paper's baseline",
            "the prompts' words are ours",
        ),
        tasks=("language",),
        cost="Before the student trains, it answers each judging question after every draft, and the teacher trains.",
    )
)
class ARTE(Scheme):
    r"""Two trainings: the teacher's on its student's preferences, then the student's on what the teacher writes.

    .. math:: s_r = \frac{1}{|V|} \sum_{(q', a') \in V} [S(q, r; q') = a'], \qquad s_q = \frac{1}{n} \sum_r s_r

    The teacher drafts questions, and to each several rationales by different techniques. What the student likes is
    told by how well it answers V after one of them as an example. By direct preference optimisation the teacher learns
    to write questions of the best quarter, not of the worst, and of each question the best rationale, not the worst,
    when asked plainly. Then it writes the questions and rationales that the student learns.

    All that is written lies in ``written/`` of the run's folder, and is not written again.

    Args:
        drafts: Questions that are drafted for each task.
        techniques: Prompts for rationales, with ``{question}``.
        plain: The prompt that the aligned teacher is asked with.
        question: The prompt for a question, with ``{questions}``, those to imitate.
        seeds: Questions to imitate, the first of each task.
        candidates, preference: Of so many of the next, so many judge: those that tell small models apart.
        judges: Players that help to tell which do.
        score: ``accuracy`` of the student's answers, or ``likelihood`` of the right ones.
        answer: What an answer stands behind, a regular expression with one group; without it all of a text counts.
        question_pairs: For each task at most.
        share: Winning and losing questions are so much of the best and of the worst.
        beta: Of the loss.
        align: Settings of the teacher's training: ``lr``, ``epochs``, ``batch_size``, ``warmup``.
        questions: That the aligned teacher writes for each task.
        temperature: At which questions and drafts are drawn; tailored rationales are the likeliest.
        question_tokens, rationale_tokens, answer_tokens: Of a text at most.
        unfinished: What becomes of texts that came to no end: ``drop`` or ``keep``.
        chat: The teacher is asked in its chat template.
        batch_size: Texts that are written at a time.
        writer: Who writes in the teacher's place, and cannot be aligned: see :class:`SeqKD`.

    Source: Aligning Teacher with Student Preferences, arXiv 2406.19227, sections 3 and 4.

    >>> ARTE(drafts=50).beta
    0.1
    """

    def __init__(
        self,
        drafts: int = 250,
        techniques: list[str] = list(TECHNIQUES),  # noqa: B006  never changed
        plain: str = PLAIN,
        question: str = QUESTION,
        seeds: int = 3,
        candidates: int = 100,
        preference: int = 40,
        judges: list[str] = [],  # noqa: B006  never changed
        score: str = "accuracy",
        answer: str = ANSWER,
        question_pairs: int = 50,
        share: float = 0.25,
        beta: float = 0.1,
        align: dict[str, float] = {},  # noqa: B006  never changed
        questions: int = 250,
        temperature: float = 1.0,
        question_tokens: int = 256,
        rationale_tokens: int = 512,
        answer_tokens: int = 256,
        unfinished: str = "drop",
        chat: bool = False,
        batch_size: int = 16,
        writer: Any = None,
    ) -> None:
        numbers = {"drafts": drafts, "seeds": seeds, "candidates": candidates, "preference": preference}
        for name, value in {**numbers, "questions": questions, "batch_size": batch_size}.items():
            if value < 1:
                raise ConfigError("must be 1 or more", where=f"scheme.{name}", found=value)
        choices = {"score": (score, "accuracy or likelihood"), "unfinished": (unfinished, "drop or keep")}
        for name, (said, wanted) in choices.items():
            if said not in wanted.split(" or "):
                raise ConfigError("no such choice", where=f"scheme.{name}", found=repr(said), wanted=wanted)
        prompts = {"plain": plain, **{f"techniques.{n}": text for n, text in enumerate(techniques)}}
        fields = [
            *((name, text, "{question}") for name, text in prompts.items()),
            ("question", question, "{questions}"),
        ]
        for name, text, mark in fields:
            if mark not in text:
                raise ConfigError("the prompt lacks its field", where=f"scheme.{name}", found=repr(text), wanted=mark)
        if not techniques:
            raise ConfigError("there is no technique", where="scheme.techniques", wanted="one or more")
        if not 0 < share <= 0.5:
            raise ConfigError("must lie above 0, and 0.5 at most", where="scheme.share", found=share)
        check_positive(beta, "scheme.beta")
        check_positive(temperature, "scheme.temperature")
        self.align = {"lr": 1e-7, "epochs": 1, "batch_size": 16, "warmup": 0.1}
        for name in align:
            if name not in self.align:
                known = ", ".join(self.align)
                raise ConfigError("no such setting", where=f"scheme.align.{name}", wanted=f"one of {known}")
        self.align |= align
        try:
            self.answer = re.compile(answer, re.IGNORECASE)
        except re.error as error:
            raise ConfigError(f"cannot be read: {error}", where="scheme.answer", found=repr(answer)) from error
        if self.answer.groups != 1:
            raise ConfigError("must have one group, the answer", where="scheme.answer", found=repr(answer))
        self.drafts, self.techniques, self.plain, self.question = drafts, list(techniques), plain, question
        self.seeds, self.candidates, self.preference, self.judges = seeds, candidates, preference, list(judges)
        self.score, self.pairs, self.share, self.beta = score, question_pairs, share, beta
        self.questions, self.temperature, self.chat, self.batch_size = questions, temperature, chat, batch_size
        self.lengths = {"question": question_tokens, "rationale": rationale_tokens, "answer": answer_tokens}
        self.keep, self.writer = unfinished == "keep", None if writer is None else check_author(writer)

    def trainings(self, cast: Cast) -> Iterator[Training]:
        tailor = Tailor(self, cast, texts_of(cast.train, "arte"))
        teacher: Teacher | None = cast.teacher
        if self.writer is None:
            first = cast.need_teacher("the texts are written by")
            model = author_of(first, "teacher")
            assert isinstance(first, FrozenTeacher)
            policy = copy.deepcopy(model).requires_grad_(True)
            terms = Terms([DPO(self.beta)], [Constant(1.0)], ["dpo"])
            aligned = Preferences(policy, terms, FrozenTeacher(model, logits=first.where), logits=first.where)
            changes = {"optimizer": "adamw", "optimizer_options": {}, "lr": self.align["lr"], "weight_decay": 0.0}
            changes |= {"steps": None, "epochs": int(self.align["epochs"]), "warmup": self.align["warmup"]}
            changes |= {"schedule": "cosine", "schedule_options": {}, "patience": None, "select": "last", "ema": None}
            stage = Stage("align", aligned, cast.config.model_copy(update={**changes, "monitor": "auto"}))
            yield Training([stage], "align", lambda: tailor.pairs(aligned, model), judged=False)
            teacher = FrozenTeacher(policy, logits=first.where)
        distiller = Distiller(cast.student, cast.loss, teacher, logits=cast.logits)
        stage = Stage("arte", distiller, cast.config)
        yield Training([stage], train=lambda: tailor.tailored(teacher))
