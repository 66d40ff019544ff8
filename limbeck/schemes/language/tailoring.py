"""What a student makes of examples: questions and rationales judged by how well it answers others after one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.core.divergences import soften
from limbeck.core.errors import DataError
from limbeck.core.item_response import fit_two_parameters
from limbeck.core.survey import dry
from limbeck.core.trace import logits_of
from limbeck.data.language.rewritten import after, parted, text_of
from limbeck.data.language.split import LanguageSplit
from limbeck.data.language.tokens import Tokens
from limbeck.schemes.language.authors import asked
from limbeck.teachers.answers import Answer
from limbeck.teachers.routed import TextTeacher

GAP = "\n\n"  # between an example and the next question
_TURNS = 4  # times that questions are asked for where they come twice
Pair = tuple[str, str]  # a question and what answers it


@dataclass(frozen=True)
class Draft:
    """A question that was written, and the rationales to it.

    Args:
        question: Its text.
        said: What was written to say it.
        rationales: One for each technique.
    """

    question: str
    said: Answer
    rationales: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class Task:
    """What is known of a task: questions to imitate, and questions to judge examples by.

    Args:
        row: Of the data, one that is of it.
        seeds: To imitate.
        held: To judge by.
    """

    row: int
    seeds: list[Pair]
    held: list[Pair]

    @property
    def ending(self) -> str:
        """The white space that all its questions end with."""
        tails = {question[len(question.rstrip()) :] for question, _ in self.seeds}
        return tails.pop() if len(tails) == 1 else ""

    def worked(self, said: Answer) -> str:
        """A rationale as it follows a question: after the white space with which its own answers begin."""
        heads = {answer[: len(answer) - len(answer.lstrip())] for _, answer in self.seeds}
        return (heads.pop() if len(heads) == 1 else "") + said.text.strip()


def tasks_of(split: LanguageSplit, seeds: int, candidates: int) -> list[Task]:
    """The tasks of a labelled set, by its tags: of each the first questions, and the next.

    Raises:
        DataError: A task has no question left to judge by, or rows have no prompts.
    """
    tokens, tags = split.tokens, split.rows.tag
    found: dict[int, dict[str, tuple[str, int]]] = {}
    for row, (prompt, said) in enumerate(parted(split)):
        question, back = text_of(tokens, prompt), tokens.back
        said = said[: -len(back)] if back and said[-len(back) :] == back else said
        if question:
            own = found.setdefault(-1 if tags is None else int(tags[row]), {})
            own.setdefault(question, (tokens.decode(said), row))
    tasks = []
    for number, rows in sorted(found.items()):
        pairs = [(question, said) for question, (said, _) in rows.items()]
        tasks.append(Task(next(iter(rows.values()))[1], pairs[:seeds], pairs[seeds : seeds + candidates]))
        if not tasks[-1].held:
            name = split.tags[number] if 0 <= number < len(split.tags) else "the data"
            wanted = f"more than the {seeds} to imitate"
            raise DataError(
                "there is no question to judge by", where=name, found=f"{len(pairs)} questions", wanted=wanted
            )
    if not tasks:
        remedy = "give records of prompt and completion"
        raise DataError("there are no questions", where="data", found="texts without prompts", remedy=remedy)
    return tasks


def preferred(right: Tensor) -> tuple[Tensor, Tensor]:
    r"""How much a student likes rationales and questions.

    .. math:: s_r = \frac{1}{|V|} \sum_{(q', a') \in V} [S(q, r; q') = a'], \qquad s_q = \frac{1}{n} \sum_r s_r

    Args:
        right: ``[Q, n, V]``: after each of a question's rationales as an example, what became of each question of V;
            booleans, or log-probabilities.

    Returns:
        ``s_r [Q, n]`` and ``s_q [Q]``.

    >>> preferred(torch.tensor([[[True, True], [True, False]]]))
    (tensor([[1.0000, 0.5000]]), tensor([0.7500]))
    """
    values = right.float() if right.dtype == torch.bool else right
    rationales = values.mean(dim=2)
    return rationales, rationales.mean(dim=1)


def question_pairs(scores: Sequence[float], most: int, share: float = 0.25) -> list[tuple[int, int]]:
    """Which questions are preferred to which: the best with the worst, the next best with the next, without ties.

    Args:
        scores: Of each question.
        most: Pairs at most.
        share: Winners are of so much of the top, losers of as much of the bottom.

    >>> question_pairs([0.1, 0.9, 0.5, 0.5, 0.2, 0.8, 0.5, 0.5], most=5)
    [(1, 0), (5, 4)]
    """
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    pairs = zip(order, reversed(order), strict=True)
    return [(a, b) for a, b in list(pairs)[: min(most, int(len(order) * share))] if scores[a] > scores[b]]


def rationale_pairs(scores: Sequence[Sequence[float]]) -> list[tuple[int, int, int]]:
    """Of each question its best and its worst rationale: question, best, worst; none where all are alike.

    >>> rationale_pairs([[0.5, 0.25, 1.0], [0.5, 0.5, 0.5]])
    [(0, 2, 1)]
    """
    found = []
    for number, row in enumerate(scores):
        best, worst = max(range(len(row)), key=row.__getitem__), min(range(len(row)), key=row.__getitem__)
        if row[best] > row[worst]:
            found.append((number, best, worst))
    return found


def final(text: str, answer: re.Pattern[str]) -> str:
    """The answer that a text comes to: what stands behind its last mark, else all of it; in small letters, bare.

    >>> final("2 and 2 are 4. The answer is: Four.", re.compile("answer is:? *(.+)"))
    'four'
    """
    found = answer.findall(text)
    return (found[-1] if found else text).strip().rstrip(".").strip().lower()


def shots(examples: Iterable[Pair], question: str) -> str:
    """Examples, and the question that follows them.

    >>> shots([("1+1=", "2")], "2+2=")
    '1+1=2\\n\\n2+2='
    """
    return "".join(f"{shown}{said.rstrip()}{GAP}" for shown, said in examples) + question


def answered(author: TextTeacher, prompts: Sequence[str], most: int, answer: re.Pattern[str]) -> list[str]:
    """What a student says to each prompt, its likeliest token every time; it may go on with questions of its own."""
    found = author.generate(prompts, max_tokens=most, temperature=0.0)
    return [final(row[0].text.lstrip().split(GAP)[0], answer) for row in found]


def discriminating(
    authors: Sequence[TextTeacher],
    examples: Sequence[Pair],
    held: Sequence[Pair],
    size: int,
    *,
    most: int,
    answer: re.Pattern[str],
) -> list[int]:
    """Which of the questions tell models best apart: those of the largest discrimination in a two-parameter model.

    Args:
        authors: Small models; each answers after none, one, two and three examples.
        examples: To show.
        held: Questions with their answers.
        size: How many are chosen; all where there are no more.
        most, answer: See :func:`answered`.

    Returns:
        Their places, in order.
    """
    if len(held) <= size:
        return list(range(len(held)))
    gold, rows = [final(said, answer) for _, said in held], []
    for author in authors:
        for count in range(min(3, len(examples)) + 1):
            said = answered(author, [shots(examples[:count], question) for question, _ in held], most, answer)
            rows.append([a == b for a, b in zip(said, gold, strict=True)])
    right = torch.tensor(rows)
    discrimination, _, _ = fit_two_parameters(right)
    discrimination[right.all(0) | ~right.any(0)] = 0.0  # what all or none can answer tells nobody apart
    return sorted(discrimination.argsort(descending=True, stable=True)[:size].tolist())


def draft_questions(
    author: TextTeacher,
    prompt: str,
    count: int,
    *,
    known: Iterable[str],
    ending: str,
    most: int,
    temperature: float,
    seed: int,
    keep: bool,
) -> list[Draft]:
    """So many different questions, or as many as come in a few turns.

    Args:
        author: Who writes them.
        prompt: What asks for one.
        count: How many.
        known: Questions that are not wanted, since there they are.
        ending: What questions end with.
        most: Tokens at most.
        temperature: Of drawing.
        seed: Of the first draw.
        keep: Also those that came to no end.
    """
    found, seen = list[Draft](), set(known)
    for turn in range(_TURNS):
        start = seed + turn * count
        (answers,) = author.generate([prompt], max_tokens=most, temperature=temperature, n=count, seed=start)
        for said in answers:
            text = said.text.strip().split(GAP)[0].rstrip() + ending
            if text.strip() and text not in seen and (keep or said.finish_reason != "length"):
                seen.add(text)
                found.append(Draft(text, said))
        if len(found) >= count:
            break
    return found[:count]


def rationales(
    author: TextTeacher, drafts: Sequence[Draft], techniques: Sequence[str], *, most: int, temperature: float, seed: int
) -> list[Draft]:
    """Drafts with what their author says to each of them when asked in each of several ways."""
    prompts = [filled(way, {"question": draft.question}) for draft in drafts for way in techniques]
    rows = iter(author.generate(prompts, max_tokens=most, temperature=temperature, seed=seed)) if prompts else iter(())
    return [Draft(d.question, d.said, tuple(next(rows)[0] for _ in techniques)) for d in drafts]


def likelihoods(
    model: nn.Module, tokens: Tokens, prompts: Sequence[str], answers: Sequence[str], batch_size: int
) -> Tensor:
    """The mean log-probability of each answer's tokens after its prompt, ``[N]``."""
    begin = [asked(tokens, prompt) for prompt in prompts]
    rows = [(*b, *said) for b, said in zip(begin, after(tokens, answers, [True] * len(answers)), strict=True)]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    device, found = next(model.parameters()).device, torch.zeros(len(rows))
    with dry(model):
        for first in range(0, len(rows), batch_size):
            own = order[first : first + batch_size]
            width = max(len(rows[row]) for row in own)
            ids = torch.tensor([[*rows[row], *[tokens.pad] * (width - len(rows[row]))] for row in own])
            place = torch.arange(width)
            start, stop = (torch.tensor([[len(of[row])] for row in own]) for of in (begin, rows))
            given = {"attention_mask": (place < stop).long().to(device)}
            logits = logits_of(model(input_ids=ids.to(device), use_cache=False, **given))[:, :-1]
            said = soften(logits).gather(-1, ids[:, 1:, None].to(device)).squeeze(-1).float().cpu()
            inside = (place[1:] >= start) & (place[1:] < stop)
            found[own] = said.masked_fill(~inside, 0.0).sum(1) / inside.sum(1).clamp(min=1)
    return found


Judge = Callable[[Sequence[Pair], Sequence[Pair]], Tensor]


def judged(
    drafts: Sequence[Draft], task: Task, held: Sequence[Pair], judge: Judge
) -> tuple[list[list[float]], list[float]]:
    """:func:`preferred` of drafts of a task, by a judge who gives ``[E, V]`` for examples and held questions."""
    examples = [(draft.question, task.worked(said)) for draft in drafts for said in draft.rationales]
    right = judge(examples, held).view(len(drafts), -1, len(held))
    first, second = preferred(right)
    return first.tolist(), second.tolist()


def filled(template: str, fields: Mapping[str, str]) -> str:
    """A template with its fields, which may hold braces themselves.

    >>> filled("Q: {question}", {"question": "{x}"})
    'Q: {x}'
    """
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match.group(1), match.group(0)), template)
