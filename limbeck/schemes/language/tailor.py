"""What ARTE is trained on: drafts that the student has judged, and what its aligned teacher writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError, DataError
from limbeck.core.files import write_json
from limbeck.core.teacher import FrozenTeacher, Teacher
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.rewritten import after, marked, rewritten
from limbeck.data.language.tokens import Tokens
from limbeck.schemes.language.authors import WRITTEN, ModelAuthor, asked, author_of_texts
from limbeck.schemes.language.preferences import Preferences
from limbeck.schemes.language.tailoring import (
    GAP,
    Draft,
    Pair,
    Task,
    answered,
    discriminating,
    draft_questions,
    filled,
    final,
    judged,
    likelihoods,
    question_pairs,
    rationale_pairs,
    rationales,
    shots,
    tasks_of,
)
from limbeck.schemes.scheme import Cast
from limbeck.teachers.answers import Answer
from limbeck.teachers.routed import TextTeacher

if TYPE_CHECKING:
    from limbeck.schemes.language.arte import ARTE


class Tailor:
    """Makes the data of both trainings; what it has written once it does not write again.

    Args:
        scheme: Its options.
        cast: Its models and folder.
        loader: The labelled questions.
    """

    def __init__(self, scheme: ARTE, cast: Cast, loader: LanguageLoader) -> None:
        self.scheme, self.cast, self.loader, self.split = scheme, cast, loader, loader.split
        self.tasks = tasks_of(loader.split, scheme.seeds, scheme.candidates)
        self.facts: dict[str, Any] = {"drafts": 0}
        if self.reads_two and scheme.keep:
            raise ConfigError(
                "texts without an end are not cut into two tokenizers' tokens",
                where="scheme.unfinished",
                found="keep",
                wanted="drop, or a loss that asks no teacher",
            )

    @property
    def teacher_tokens(self) -> Tokens:
        """What the teacher writes in."""
        return self.split.teacher_tokens or self.split.tokens

    @property
    def reads_two(self) -> bool:
        """Whether batches hold the teacher's tokens beside the student's."""
        return self.split.teacher_tokens is not None and bool(self.cast.loss.teacher_taps)

    def pairs(self, distiller: Preferences, model: nn.Module) -> LanguageLoader:
        """Of what the teacher drafts the better and the worse, as the student finds them.

        Raises:
            DataError: It finds none better.
        """
        scheme, tokens, found = self.scheme, self.teacher_tokens, list[tuple[str, Answer, Answer]]()
        author = self._author(model, tokens, scheme.chat)
        for task in self.tasks:
            drafts, of_rationales, of_questions = self._judged(author, task)
            for best, worst in question_pairs(of_questions, scheme.pairs, scheme.share):
                found.append((self._asks(task), drafts[best].said, drafts[worst].said))
            for number, best, worst in rationale_pairs(of_rationales):
                prompt, said = filled(scheme.plain, {"question": drafts[number].question}), drafts[number].rationales
                found.append((prompt, said[best], said[worst]))
        found = [(x, a, b) for x, a, b in found if a.text != b.text and a.text and b.text and self._counts(a)]
        self.facts["pairs"] = len(found)
        if not found:
            raise DataError(
                "the student is as good after every draft, so there is nothing to align its teacher to",
                where="scheme arte",
                found=f"{self.facts['drafts']} drafts",
                remedy="take a student that learns from an example, more drafts, or score: likelihood",
            )
        sides = [[better for _, better, _ in found], [worse for _, _, worse in found]]
        return distiller.pairs(
            self.split,
            tokens,
            [asked(tokens, prompt, scheme.chat) for prompt, _, _ in found],
            [after(tokens, [said.text for said in side], [_ended(said) for said in side]) for side in sides],
            batch_size=int(scheme.align["batch_size"]),
            device=self.loader.device,
            seed=self.cast.seed,
        )

    def tailored(self, teacher: Teacher | None) -> LanguageLoader:
        """What the student learns: questions with rationales, as its teacher now writes them.

        Raises:
            DataError: Nothing came to an end.
        """
        said = [(task, *pair) for task in self.tasks for pair in self._written(task, teacher)]
        kept = [one for one in said if one[2].text.strip() and self._counts(one[2])]
        facts = {**self.facts, "written": len(said), "rows": len(kept)}
        if self.cast.folder is not None and int(os.environ.get("RANK", "0")) == 0:
            write_json(self.cast.folder / WRITTEN / "summary.json", facts)
        if not kept:
            raise DataError(
                "nothing of what the teacher wrote can be learned",
                where="scheme arte",
                found=f"{len(said)} questions, of which none has an answer that came to an end",
                remedy="raise question_tokens or rationale_tokens, or set unfinished: keep",
            )
        tokens, loader = self.split.tokens, self.loader
        made = rewritten(
            self.split,
            [task.row for task, _, _ in kept],
            [marked(tokens, question) for _, question, _ in kept],
            after(tokens, [task.worked(a) for task, _, a in kept], [_ended(a) for _, _, a in kept]),
            teacher=self.reads_two,
        )
        own = {name: getattr(loader, name) for name in ("shuffle", "drop_last", "device", "seed")}
        return LanguageLoader(made, batch_size=loader.batch_size, **own)

    def _written(self, task: Task, teacher: Teacher | None) -> list[tuple[str, Answer]]:
        """A task's questions, each with its rationale."""
        scheme, seed = self.scheme, self.cast.seed
        if scheme.writer is None:
            assert isinstance(teacher, FrozenTeacher)
            own = self._author(teacher.model, self.teacher_tokens, scheme.chat)
            drafts = self._questions(own, task, scheme.questions)
            most = scheme.lengths["rationale"]
            drafts = rationales(own, drafts, [scheme.plain], most=most, temperature=0.0, seed=seed)
            return [(draft.question, draft.rationales[0]) for draft in drafts]
        with author_of_texts(scheme.writer, self.cast.folder) as author:
            drafts, scores, _ = self._judged(author, task)
        best = [max(range(len(row)), key=row.__getitem__) for row in scores]
        return [(draft.question, draft.rationales[place]) for draft, place in zip(drafts, best, strict=True)]

    def _judged(self, author: TextTeacher, task: Task) -> tuple[list[Draft], list[list[float]], list[float]]:
        """Drafts of a task, and how much the student likes rationales and questions."""
        scheme, tokens, seed = self.scheme, self.split.tokens, self.cast.seed
        readers = [self._author(model, tokens) for model in (self.cast.student, *map(self.cast.player, scheme.judges))]

        def judge(examples: Sequence[Pair], held: Sequence[Pair]) -> Tensor:
            prompts = [shots([example], question) for example in examples for question, _ in held]
            gold = [said for _ in examples for _, said in held]
            if scheme.score == "likelihood":
                return likelihoods(readers[0].model, tokens, prompts, gold, scheme.batch_size)
            said = answered(readers[0], prompts, scheme.lengths["answer"], scheme.answer)
            return torch.tensor([a == final(b, scheme.answer) for a, b in zip(said, gold, strict=True)])

        most = scheme.lengths["answer"]
        chosen = discriminating(readers, task.seeds, task.held, scheme.preference, most=most, answer=scheme.answer)
        questions, most = self._questions(author, task, scheme.drafts), scheme.lengths["rationale"]
        how: dict[str, Any] = {"most": most, "temperature": scheme.temperature, "seed": seed}
        drafts = rationales(author, questions, scheme.techniques, **how)
        self.facts["drafts"] += len(drafts)
        if not drafts:
            return [], [], []
        return drafts, *judged(drafts, task, [task.held[place] for place in chosen], judge)

    def _questions(self, author: TextTeacher, task: Task, count: int) -> list[Draft]:
        return draft_questions(
            author,
            self._asks(task),
            count,
            known=[question for question, _ in (*task.seeds, *task.held)],
            ending=task.ending,
            most=self.scheme.lengths["question"],
            temperature=self.scheme.temperature,
            seed=self.cast.seed,
            keep=self.scheme.keep,
        )

    def _asks(self, task: Task) -> str:
        """The prompt for one more question of a task."""
        return filled(self.scheme.question, {"questions": GAP.join(question.strip() for question, _ in task.seeds)})

    def _author(self, model: nn.Module, tokens: Tokens, chat: bool = False) -> ModelAuthor:
        folder = None if self.cast.folder is None else self.cast.folder / WRITTEN
        known: dict[str, Any] = {"batch_size": self.scheme.batch_size, "seed": self.cast.seed}
        return ModelAuthor(model.to(self.loader.device), tokens, folder=folder, chat=chat, **known)

    def _counts(self, said: Answer) -> bool:
        return self.scheme.keep or _ended(said)


def _ended(said: Answer) -> bool:
    return said.finish_reason != "length"
