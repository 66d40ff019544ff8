"""Multi-aspect distillation (MaKD): beside its classes, a student answers questions that a large model has answered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_floating, check_same_shape
from limbeck.core.relations import pooled
from limbeck.core.trace import Trace
from limbeck.objectives.response.binary_cross_entropy import binary_cross_entropy_loss


def makd_loss(
    aspect_logits: Tensor, answers: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Binary cross-entropy between a student's answers to yes-or-no questions and those of a large model.

    .. math:: L = -\frac 1 Q \sum_q a_q \log \sigma(z_q) + (1 - a_q) \log (1 - \sigma(z_q))

    Args:
        aspect_logits: :math:`z`, ``[B, Q]``: one logit a question.
        answers: :math:`a`, ``[B, Q]``: probability of yes, from 0 to 1; negative where a question was not asked, which
            adds nothing.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Shapes or dtypes do not fit, or answers above 1.

    Source:
        Lee et al., "Multi-aspect Knowledge Distillation with Large Language Model", 2025, arXiv 2501.13341.

    Example:
        >>> makd_loss(torch.zeros(1, 2), torch.tensor([[0.5, 0.9]]))
        tensor(0.6931)
    """
    check_floating(aspect_logits, "aspect_logits", least=2)
    check_floating(answers, "answers", least=2)
    check_same_shape(aspect_logits, answers, "aspect_logits", "answers")
    summed = binary_cross_entropy_loss(aspect_logits, answers.detach(), mask=mask, reduction=reduction)
    return summed / answers.shape[-1]


def read_answers(path: str) -> Tensor:
    """A table of answers ``[samples, Q]`` by sample id: ``.npy``, or ``.json`` (a list of lists, or ``{id: list}``).

    A sample that the table leaves out has -1 everywhere: nothing is known of it.

    Raises:
        ConfigError: No such file, or no such table in it.
    """
    file = Path(path)
    try:
        if file.suffix == ".json":
            rows = json.loads(file.read_text(encoding="utf-8"))
            rows = dict(enumerate(rows)) if isinstance(rows, list) else {int(k): v for k, v in rows.items()}
            table = np.full((max(rows) + 1, len(next(iter(rows.values())))), -1.0, dtype=np.float32)
            table[list(rows)] = np.asarray(list(rows.values()), dtype=np.float32)
        else:
            table = np.load(file, allow_pickle=False).astype(np.float32)
        if table.ndim != 2:
            raise ValueError(f"shape {list(table.shape)}")
    except (OSError, ValueError, TypeError, AttributeError, StopIteration) as error:
        raise ConfigError(
            "no table of answers can be read", where="answers", found=f"{path}: {error}", wanted="[samples, questions]"
        ) from None
    return torch.from_numpy(table)


@register(
    Card(
        key="makd",
        name="MaKD",
        title="Multi-aspect Knowledge Distillation with Large Language Model",
        year=2025,
        arxiv="2501.13341",
        code="taegyeong-lee/MaKD-Multi-aspect-knowledge-distillation-with-Large-Language-Model",
        knowledge="response",
        equation=r"\mathrm{BCE}(\sigma(z_\mathrm{aspects}), a), \quad a_q = P(\text{yes} \mid x, q)",
        use="Where a large multimodal model can look at the training images but is no classifier of these classes: ask "
        "it yes-or-no questions once, and let the student answer them beside its task. Goes with any other method.",
        defaults={
            "answers": "those of the batch, batch.extras['aspects']",
            "tap": "what enters the classifier, so that head and classifier are the paper's one widened layer",
        },
        evidence="parity",
        evidence_note="value and gradient of taegyeong-lee/MaKD-Multi-aspect-knowledge-distillation-with-Large-Language"
        "-Model@582f837",
        choices=(
            "The units of the aspects are a head of their own, dropped when the student ships: the same function as a "
            "classifier widened by Q outputs, and the student's logits stay those of its classes.",
            "An answer may be unknown (negative).",
            "Detection is left out: the paper does not say where the outputs stand.",
        ),
        needs=("extras",),
        tasks=("aspects",),
        with_labels={"cross_entropy": 1.0},
        weight=4.0,
    ),
    makd_loss,
)
class MaKD(Objective):
    """Multi-aspect distillation; see ``limbeck.functional.makd_loss``.

    Args:
        answers: A file with the answers to all samples, by sample id (see ``read_answers``). ``None``: each batch
            brings its own, ``[B, Q]`` in ``batch.extras["aspects"]``.
        tap: What the head reads; the mean of its places that count.

    >>> from limbeck.objectives import CrossEntropy
    >>> loss = CrossEntropy() + 4.0 * MaKD()
    """

    contract = Contract(normalizer="samples", at_equal=None, mask=True)
    aspects: nn.Module | None

    def __init__(self, answers: str | None = None, tap: str = "penultimate") -> None:
        super().__init__()
        self.answers, self.tap, self.student_taps, self.aspects = answers, tap, (tap,), None
        table = None if answers is None else read_answers(answers)
        self.register_buffer("table", table, persistent=False)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        feature, _ = pooled(student[self.tap], name="student_feature")
        self.aspects = LinearProjector(feature.shape[1], self._wanted(batch).shape[1]).to(feature.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        feature, counts = pooled(student[self.tap], batch.mask, "student_feature")
        return makd_loss(self.ready("aspects")(feature), self._wanted(batch), mask=counts)

    def _wanted(self, batch: Batch) -> Tensor:
        if isinstance(self.table, Tensor):
            return self.table[batch.require("index")]
        wanted = batch.extras.get("aspects")
        if not isinstance(wanted, Tensor) or wanted.ndim != 2:
            found = list(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
            remedy = "let the collator put [B, Q] answers there, or give answers='FILE'"
            raise DataError("this objective needs answers", where="batch.extras['aspects']", found=found, remedy=remedy)
        return wanted
