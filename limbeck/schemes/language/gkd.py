"""On-policy distillation: the student learns from what the teacher says about texts that it wrote itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError
from limbeck.core.reduction import check_inside
from limbeck.core.teacher import FrozenTeacher
from limbeck.engine.stage import Stage
from limbeck.models.generating import Decoding, check_writes
from limbeck.schemes.language.writing import WritingDistiller, author_of, same_tokens, texts_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="gkd",
        name="GKD",
        title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        year=2023,
        arxiv="2306.13649",
        knowledge="scheme",
        equation=r"(1 - \lambda)\, \mathbb{E}_{(x, y) \sim \mathcal{D}} \left[ D(p_T \| p_S)(y \mid x) \right] + "
        r"\lambda\, \mathbb{E}_{x} \mathbb{E}_{y \sim p_S(\cdot \mid x)} \left[ D(p_T \| p_S)(y \mid x) \right]",
        use="For language models that will write by themselves: the student is corrected where its own words take it. "
        "With any loss over tokens; jsd and reverse_kl are the paper's best, after a start from plain distillation.",
        defaults={
            "lmbda": "0.5, the paper's mixture; 1 is its purely on-policy form, 0 plain distillation",
            "teacher_share": "0; 1 with lmbda 0 is the paper's sequence-level form, with fresh texts in every step",
            "max_new_tokens": "128, as in TRL",
            "temperature": "1, the paper's",
        },
        evidence="formula",
        evidence_note="with lmbda 0 equal to plain distillation bit for bit; with 1 value and gradient of the "
        "divergence over texts that plain forwards draw; GKD has released no code",
        choices=(
            "lambda is drawn once for all of a step, as in the paper's algorithm, where one batch is a step; so ranks "
            "and micro-batches change nothing",
            "no gradient runs through the drawing, as in the paper",
            "texts that the student wrote have no labels: terms that learn from labels take data and the teacher's "
            "texts alone, since nobody says that the student's are right",
            "texts longer than max_new_tokens are cut there, and learned as far as they go",
        ),
        tasks=("language",),
        cost="Writing a text takes a forward of the student for each of its tokens.",
    )
)
class GKD(Scheme):
    r"""One stage; in a share of its steps the batch's completions are those that the student, or the teacher, writes.

    .. math:: L = D(p_T \| p_S)(y \mid x), \qquad y \sim p_S(\cdot \mid x) \text{ with probability } \lambda,
        \text{ else from } p_T \text{ with probability } \tau, \text{ else from the data}

    A row's prompt is what stands before the first token that it is to predict.

    Args:
        lmbda: :math:`\lambda`.
        teacher_share: :math:`\tau`.
        max_new_tokens: Of a completion at most.
        temperature: Of drawing; 0 takes the likeliest token every time.
        top_k: Draw among so many likeliest tokens; 0: among all.
        top_p: Draw among the likeliest tokens that together have this probability.
        prompt: Tokens of a prompt at least; of whole texts, where everything is learned, the first so many.

    Source: On-Policy Distillation of Language Models, arXiv 2306.13649, algorithm 1.

    >>> GKD(lmbda=1.0).decoding.max_new_tokens
    128
    """

    def __init__(
        self,
        lmbda: float = 0.5,
        teacher_share: float = 0.0,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        prompt: int = 1,
    ) -> None:
        check_inside(lmbda, "scheme.lmbda", closed=True)
        check_inside(teacher_share, "scheme.teacher_share", closed=True)
        if prompt < 1:
            raise ConfigError("must be 1 or more", where="scheme.prompt", found=prompt)
        self.lmbda, self.teacher_share, self.prompt = lmbda, teacher_share, prompt
        self.decoding = Decoding(max_new_tokens, temperature, top_k, top_p)

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher = cast.need_teacher("on-policy distillation asks")
        loader = texts_of(cast.train, "gkd")
        if not cast.loss.teacher_taps:
            raise ConfigError(
                "nothing in this loss asks the teacher, and the student's own texts teach nothing else",
                where="loss",
                found=", ".join(cast.loss.names),
                remedy="use jsd, reverse_kl or kd",
            )
        if self.lmbda or self.teacher_share:
            same_tokens(loader, "gkd")
            author_of(teacher, "teacher")
        if self.lmbda:
            check_writes(cast.student, "student")
        distiller = OnPolicy(cast.student, cast.loss, teacher, logits=cast.logits)
        distiller.plan(self, loader, cast.seed)
        distiller.share(self.lmbda, self.teacher_share)
        yield Training([Stage("gkd", distiller, cast.config)])


class OnPolicy(WritingDistiller):
    """Chooses in each step who wrote its texts; see :class:`GKD`."""

    def share(self, lmbda: float, teacher_share: float) -> None:
        """Take the probabilities."""
        self.lmbda, self.teacher_share = lmbda, teacher_share

    def settled(self) -> dict[str, Any]:
        return {**super().settled(), "lmbda": self.lmbda, "teacher_share": self.teacher_share}

    def author(self, step: int) -> str:
        """``student``, ``teacher`` or ``data``."""
        chance = self.chance(step)
        if chance < self.lmbda:
            return "student"
        return "teacher" if chance < self.lmbda + (1 - self.lmbda) * self.teacher_share else "data"

    def made(self, batch: Batch) -> Batch:
        step = self.step_key(batch)
        author = self.author(step)
        if author == "data":
            return batch
        if author == "student":
            made, _ = self.written(batch, self.student, step)
            made.labels = torch.full_like(made.require("labels"), -1)
            return made
        assert isinstance(self.teacher, FrozenTeacher)
        return self.written(batch, self.teacher.model, step)[0]
