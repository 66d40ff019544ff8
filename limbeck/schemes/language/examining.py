"""What a model knows by heart: facts an answer needs, questions about them, and the options that it chooses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from limbeck.core.survey import call_model, dry
from limbeck.core.trace import logits_of
from limbeck.data.language.rewritten import marked
from limbeck.data.language.tokens import Tokens

LETTERS = "ABCD"
NEED = (
    "Judge whether facts are needed to do what is asked below: facts that can be verified, such as those of history, "
    "science, statistics, technology, geography, news, law, medicine, economics, education, or a person's life. First "
    "explain, then end with '#Prediction:' and either <need> or <no need>.\n\n"
    "#Command:\nWho painted the ceiling of the Sistine Chapel?\n#Analysis:\nThis asks for a verifiable fact of art "
    "history.\n#Prediction:\n<need>\n\n"
    "#Command:\nPut this sentence into the past tense: I walk home.\n#Analysis:\nThe sentence is given, and no fact "
    "about the world is asked for.\n#Prediction:\n<no need>\n\n"
    "#Command:\n{instruction}\n#Analysis:\n"
)
KNOWLEDGE = (
    "Write down the facts that somebody without any knowledge of the matter needs in order to do what is asked below. "
    "Give the background as a whole, not only the answer.\n\n#Instruction:\n{instruction}\n\n#Why facts are needed:\n"
    "{analysis}\n\n#An answer:\n{output}\n\n#Facts:\n"
)
EXAM = (
    "Write {number} multiple-choice questions, each with four options, one of which is right, about the facts below "
    "and nothing else. Each has this form:\n\n#Question:\nWhich planet is the largest of the solar system?\n#Options:\n"
    "(A) Mars\n(B) Jupiter\n(C) Venus\n(D) Saturn\n#Analysis:\nJupiter is larger than all others.\n#Answer:\n(B)\n\n"
    "#Facts:\n{knowledge}\n\nThe questions:\n"
)
HEAD = "The following are multiple choice questions (with answers) about factual knowledge.\n\n"
_SHOTS = (
    ("What does a thermometer measure?", ("Weight", "Length", "Temperature", "Time"), "C"),
    ("Which of these animals is a mammal?", ("Whale", "Trout", "Eagle", "Frog"), "A"),
    ("What is the capital of Japan?", ("Osaka", "Kyoto", "Nagoya", "Tokyo"), "D"),
    ("Which gas do plants take in to grow?", ("Helium", "Carbon dioxide", "Neon", "Argon"), "B"),
    ("How many sides does a hexagon have?", ("Six", "Five", "Seven", "Eight"), "A"),
)
SHOTS: list[dict[str, Any]] = [{"question": q, "options": list(o), "answer": a} for q, o, a in _SHOTS]
_MARK = re.compile(r"#?\s*\b(Options|Analysis|Answer)\s*:", re.IGNORECASE)
_OPTION = re.compile(r"(?:^|\s)\(?([A-D])[).]\s*")


@dataclass(frozen=True)
class Question:
    """A question with four options, of which one is right."""

    question: str
    options: tuple[str, ...]
    answer: str

    def asked(self, *, answered: bool = False) -> str:
        """As it is put to a model, with its answer or open.

        >>> print(Question("Why?", ("a", "b", "c", "d"), "C").asked())
        Why?
        A. a
        B. b
        C. c
        D. d
        Answer:
        """
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True)]
        return "\n".join([self.question, *lines, f"Answer: {self.answer}\n\n" if answered else "Answer:"])


def read_need(answer: str) -> tuple[bool, str] | None:
    """Whether facts are needed, and why, as an examiner said; ``None`` where it said neither.

    >>> read_need("It is fiction.\\n#Prediction:\\n<no need>"), read_need("yes")
    ((False, 'It is fiction.'), None)
    """
    why, found, verdict = answer.partition("Prediction:")
    told = re.match(r"\s*<(no )?need>", verdict)
    return None if not found or told is None else (told[1] is None, why.rstrip().rstrip("#").strip())


def read_exam(answer: str) -> list[Question]:
    """The questions of an examiner's answer; those that lack an option or a right one are left out.

    >>> text = "#Question:\\nWhy?\\n#Options:\\n(A) a\\n(B) b\\n(C) c\\n(D) d\\n#Analysis:\\nSo.\\n#Answer:\\n(C)"
    >>> read_exam(text)
    [Question(question='Why?', options=('a', 'b', 'c', 'd'), answer='C')]
    """
    found = []
    for part in re.split(r"#?\s*\bQuestion\s*\d*\s*:", answer, flags=re.IGNORECASE)[1:]:
        first, *rest = _MARK.split(part)
        said = {name.lower(): text.strip() for name, text in zip(rest[::2], rest[1::2], strict=True)}
        _, *told = _OPTION.split(" " + said.get("options", ""))
        letters, options = told[::2], tuple(text.strip() for text in told[1::2])
        right = re.match(r"\W*([A-D])\b", said.get("answer", ""), re.IGNORECASE)
        if first.strip() and "".join(letters) == LETTERS and all(options) and right is not None:
            found.append(Question(first.strip(), options, right[1].upper()))
    return found


def shots_of(questions: Sequence[Question]) -> str:
    """What stands before a question: some others with their answers."""
    return HEAD + "".join(question.asked(answered=True) for question in questions)


def choices(
    model: nn.Module,
    tokens: Tokens,
    prompts: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    logits: str | None = None,
) -> list[str]:
    """The option that a model finds likeliest after each prompt: the letter whose token has the greatest logit.

    Args:
        model: A causal language model; its mode is as before afterwards.
        tokens: Its tokenizer.
        prompts: That end where a letter follows.
        device: Where it works.
        batch_size: Prompts at a time.
        logits: Where they stand in the model's output.
    """
    letters = torch.tensor([int(own[-1]) for own, _ in tokens.continued([f" {letter}" for letter in LETTERS])])
    asked = [marked(tokens, prompt) for prompt in prompts]
    order = sorted(range(len(asked)), key=lambda row: len(asked[row]))
    found = [""] * len(asked)
    with dry(model):
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            width = max(len(asked[row]) for row in rows)
            ids = torch.tensor([[*asked[row], *[tokens.pad] * (width - len(asked[row]))] for row in rows])
            there = torch.tensor([[1] * len(asked[row]) + [0] * (width - len(asked[row])) for row in rows])
            inputs = {"input_ids": ids.to(device), "attention_mask": there.to(device)}
            scores = logits_of(call_model(model, inputs), logits)
            last = scores[torch.arange(len(rows)), there.sum(dim=1) - 1][:, letters]
            for row, best in zip(rows, last.argmax(dim=1).tolist(), strict=True):
                found[row] = LETTERS[best]
    return found
