"""MiniLLM: the reverse divergence of whole texts, by its policy gradient over texts that student and teacher write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.schedules import Constant
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.language.written import of_the_second, together
from limbeck.engine.stage import Stage
from limbeck.models.generating import Decoding, check_writes
from limbeck.objectives.parts.policy import DRAWN, SAID, WRITTEN, Policy
from limbeck.schemes.language.writing import WritingDistiller, author_of, same_tokens, texts_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="minillm",
        name="MiniLLM",
        title="MiniLLM: Knowledge Distillation of Large Language Models",
        year=2023,
        arxiv="2306.08543",
        code="microsoft/LMOps",
        knowledge="scheme",
        equation=r"\nabla L = \mathbb{E}_{y \sim \tilde p} \sum_t w_t \left( \nabla\, \mathrm{KL}(q_t \| p_t) - "
        r"R^{\mathrm{norm}}_{t+1} \nabla \log q(y_t) \right) + \nabla L_{\mathrm{PT}}, \qquad "
        r"\tilde p = (1 - \alpha) q + \alpha p, \quad w_t = \frac{q(y_t)}{\tilde p(y_t)}",
        use="For students that were trained on labels before and are to write what the teacher would call likely, to "
        "the end of the text and not only in the next token. The recipe's loss is the language modelling beside it.",
        defaults={
            "alpha": "0.2, the paper's",
            "clip": "0.2, the authors'",
            "data_weight": "1, the authors'",
            "max_new_tokens": "128; the authors write up to 512 tokens, prompt included",
            "temperature": "1, the paper's",
        },
        evidence="formula",
        evidence_note="the mean of the gradient over all texts of a small vocabulary equals the gradient of the "
        "divergence itself in float64, where nothing is clipped or normalised; texts come as often as the mixture says",
        choices=(
            "every text is used for one step; the authors use it for four, with ratios to the student that wrote it",
            "the sum of rewards begins after the token, as in the paper's equation; in the authors' code with it",
            "weights w also weigh the part of the next token, as in the paper; in the authors' code they do not",
            "rewards are neither whitened, scaled, discounted nor cut; in the authors' code they are",
            "the mean runs over all tokens of a step, as in the authors' code",
            "texts longer than max_new_tokens are cut there, and judged as far as they go",
        ),
        tasks=("language",),
        cost="Writing a text takes a forward of student and teacher for each of its tokens.",
    )
)
class MiniLLM(Scheme):
    r"""One stage; in every step a text is written for each prompt, and both models judge it token by token.

    .. math:: L = \mathrm{KL}\big( q(y \mid x) \,\|\, p(y \mid x) \big) + \lambda L_{\mathrm{PT}}

    Tokens are drawn from a mixture of student q and teacher p, so that texts the teacher would never write are not all
    there is to learn from, and importance weights put that right. The gradient of the next token's own divergence is
    taken as a whole; what comes after it counts by the mean of its rewards :math:`\log p - \log q`. The recipe's loss
    is learned from the data themselves in the same step: cross-entropy, with distillation beside it or not.

    Args:
        alpha: The teacher's share in writing; 0: the student writes alone.
        single_step: Take the next token's divergence as a whole.
        length_norm: Rewards of what follows are averaged, so that short texts have no advantage.
        clip: Of importance weights, as in proximal policy optimisation; ``None``: none.
        data_weight: :math:`\lambda`, of the recipe's loss; 0 leaves it out.
        max_new_tokens: Of a completion at most.
        temperature: Of drawing; the weights put it right.
        prompt: Tokens of a prompt at least; of whole texts, where everything is learned, the first so many.

    Source: MiniLLM: Knowledge Distillation of Large Language Models, arXiv 2306.08543, algorithm 1.

    >>> MiniLLM(clip=None).alpha
    0.2
    """

    def __init__(
        self,
        alpha: float = 0.2,
        single_step: bool = True,
        length_norm: bool = True,
        clip: float | None = 0.2,
        data_weight: float = 1.0,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        prompt: int = 1,
    ) -> None:
        if not 0 <= alpha < 1:
            remedy = "what the student never draws has no weight"
            raise ConfigError("must be 0 or above, and below 1", where="scheme.alpha", found=alpha, remedy=remedy)
        if clip is not None:
            check_inside(clip, "scheme.clip")
        check_positive(temperature, "scheme.temperature")
        if data_weight < 0:
            raise ConfigError("must be 0 or above", where="scheme.data_weight", found=data_weight)
        if prompt < 1:
            raise ConfigError("must be 1 or more", where="scheme.prompt", found=prompt)
        self.alpha, self.single_step, self.length_norm, self.clip = alpha, single_step, length_norm, clip
        self.data_weight, self.prompt = data_weight, prompt
        self.decoding = Decoding(max_new_tokens, temperature)

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher = cast.need_teacher("rewards come from")
        loader = texts_of(cast.train, "minillm")
        same_tokens(loader, "minillm")
        author_of(teacher, "teacher")
        check_writes(cast.student, "student")
        if cast.config.monitor == "total":
            raise ConfigError(
                "what this scheme minimises is told by texts that are written in training",
                where="train.monitor",
                found="total",
                wanted="auto, which is perplexity here",
            )
        policy = Terms([Policy(self.single_step, self.length_norm, self.clip)], [Constant(1.0)], ["minillm"])
        loss = cast.loss * self.data_weight + policy if self.data_weight else policy
        distiller = PolicyDistiller(cast.student, loss, teacher, logits=cast.logits)
        distiller.plan(self, loader, cast.seed)
        distiller.share(self.alpha, self.data_weight > 0)
        yield Training([Stage("minillm", distiller, cast.config)])


class PolicyDistiller(WritingDistiller):
    """Has a text written for each row, and puts it beside the row; see :class:`MiniLLM`."""

    def share(self, alpha: float, data: bool) -> None:
        """Take the teacher's share in writing, and whether the data are learned too."""
        self.alpha, self.data = alpha, data

    def settled(self) -> dict[str, Any]:
        return {**super().settled(), "alpha": self.alpha, "data": self.data}

    def made(self, batch: Batch) -> Batch:
        assert isinstance(self.teacher, FrozenTeacher)
        mixed = self.teacher.model if self.alpha else None
        written, drawn = self.written(batch, self.student, self.step_key(batch), mixed=mixed, share=self.alpha)
        labels, mask = written.require("labels"), written.require("mask")
        if self.data:
            made = together(batch, written, self.pad)
            labels, mask, drawn = (of_the_second(values, made) for values in (labels, mask, drawn))
        else:
            made = written
        made.extras |= {WRITTEN: mask, SAID: labels, DRAWN: drawn}
        return made
