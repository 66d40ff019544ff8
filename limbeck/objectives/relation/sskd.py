"""SSKD: what a self-supervised task on turned copies brings out of the teacher, beside its answers."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import DataError
from limbeck.core.objective import DataInfo, Objective
from limbeck.core.reduction import Reduction, check_positive, reduce
from limbeck.core.relations import check_same_batch
from limbeck.core.trace import Trace
from limbeck.core.views import quarter_turns
from limbeck.objectives.parts.pretext import Pretext, affinity, embed, task_head
from limbeck.objectives.response.kd import kd_loss


def sskd_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    *,
    temperature: float = 0.5,
    share: float = 0.75,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence between the two models' guesses of which sample a turned copy was made from.

    .. math::
        L = \tau^2 \frac 1 {|K|} \sum_{i \in K} \mathrm{KL}\big(\mathrm{softmax}(A^t_i / \tau) \,\|\,
        \mathrm{softmax}(A^s_i / \tau)\big), \qquad A_{i,j} = \cos(\tilde z_i, z_j)

    Row i of A compares a turned copy with every upright sample of the batch. K are the rows where the teacher is right,
    and a share of those where it is wrong: the ones in which the right sample ranks highest.

    Args:
        student_embedding: ``[4 B, D]``: the B upright samples, then three times as many copies, turn after turn.
        teacher_embedding: ``[4 B, E]``; detached.
        temperature: :math:`\tau`; 0.5 in the paper.
        share: Of the rows where the teacher is wrong; 0.75 in the paper.
        mask: ``[3 B]`` booleans, True where a copy counts.
        reduction: ``"mean"`` over the rows of K, ``"sum"``, or ``"none"`` (``[3 B]``, 0 outside of K).

    Raises: TensorError: Not as many embeddings of both, or not four for each sample.

    Source: Xu, Liu, Li and Loy, "Knowledge Distillation Meets Self-Supervision", 2020, arXiv 2006.07114, section 3.

    >>> import torch
    >>> right, wrong = torch.eye(2).repeat(4, 1), torch.cat([torch.eye(2), torch.eye(2).flip(0).repeat(3, 1)])
    >>> sskd_loss(right, wrong, temperature=1.0, share=1.0)
    tensor(0.4621)
    """
    check_positive(temperature, "temperature")
    check_same_batch(student_embedding, teacher_embedding, "student_embedding", "teacher_embedding")
    student, source = affinity(student_embedding, "student_embedding")
    teacher, _ = affinity(teacher_embedding.detach(), "teacher_embedding")
    divergence = kl_rows(soften(teacher, temperature), soften(student, temperature))
    rank = (teacher > teacher.gather(1, source.unsqueeze(1))).sum(dim=1)
    right = (rank == 0).sum()
    kept = rank.argsort(stable=True).argsort() < right + (share * (len(rank) - right)).floor()
    return temperature**2 * reduce(divergence, kept if mask is None else kept & mask, reduction)


@register(
    Card(
        key="sskd",
        name="SSKD",
        title="Knowledge Distillation Meets Self-Supervision",
        year=2020,
        arxiv="2006.07114",
        code="xuguodong03/SSKD",
        knowledge="relation",
        equation=r"0.9\,\mathrm{KD}(x) + 2.7\,\mathrm{KD}(\tilde x) + 10\,\tau^2\,\mathrm{KL}\big(\mathrm{softmax}("
        r"A^t / \tau)\,\|\,\mathrm{softmax}(A^s / \tau)\big), \quad A_{i,j} = \cos(\tilde z_i, z_j)",
        use="For images, where answers alone teach little: few or noisy labels, other architectures. KD is part of it.",
        cost="Every image is seen four times, upright and turned, by both models.",
        defaults={"upright": "0.9, turned 2.7, contrast 10, labels 0.1, temperature 4: all as in the authors' code"},
        evidence="parity",
        evidence_note="values and gradients of all terms, and of the head's, of xuguodong03/SSKD@661b972",
        choices=(
            "The copies are turns of one crop; in the authors' code each is cropped anew. All count, as there.",
            "The paper trains the teacher's head first, as scheme hint_then_kd does; else it learns with the student.",
            "Of rows with equal rank the first are taken; the authors' sort leaves it open.",
        ),
        with_labels={"cross_entropy": 0.1},
    ),
    sskd_loss,
)
class SSKD(Objective):
    """Self-supervision as a second teacher; see ``limbeck.functional.sskd_loss``.

    ``prepare`` makes every batch four times as large; labels stay with the upright samples.

    Args:
        tap: The feature to embed; the mean of its places.
        teacher_tap: The teacher's, where it is called otherwise.
        upright: Weight of KD on the samples.
        turned: Weight of KD on their copies.
        contrast: Weight of ``sskd_loss``.
        temperature: Of KD; contrast_temperature: and ``share``: of ``sskd_loss``.
    """

    contract = Pretext.contract
    student_head: nn.Sequential | None

    def __init__(
        self,
        tap: str = "penultimate",
        teacher_tap: str | None = None,
        upright: float = 0.9,
        turned: float = 2.7,
        contrast: float = 10.0,
        temperature: float = 4.0,
        contrast_temperature: float = 0.5,
        share: float = 0.75,
    ) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        check_positive(contrast_temperature, "contrast_temperature")
        self.tap, self.upright, self.turned, self.contrast = tap, upright, turned, contrast
        self.temperature, self.contrast_temperature, self.share = temperature, contrast_temperature, share
        self.pretext, self.student_head, self.opened = Pretext(teacher_tap or tap), None, False
        self.student_taps, self.teacher_taps = ("logits", tap), ("logits", self.pretext.tap)

    def opening(self) -> Objective:
        self.opened = True
        return self.pretext

    def prepare(self, batch: Batch) -> Batch:
        return quarter_turns(batch)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        self.pretext.setup(student, teacher, batch, data)
        self.pretext.requires_grad_(not self.opened)
        self.student_head = task_head(student[self.tap])

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        if batch.extras.get("views") != 4:
            raise DataError("the batch was not turned", where="batch", remedy="compare the models on prepare(batch)")
        s = embed(self.ready("student_head"), student[self.tap], "student_feature")
        t = self.pretext.embed(teacher).detach()
        size, own, other = len(s) // 4, student.logits, teacher.logits
        parts = {
            "upright": self.upright * kd_loss(own[:size], other[:size], temperature=self.temperature),
            "turned": self.turned * kd_loss(own[size:], other[size:], temperature=self.temperature),
            "contrast": self.contrast * sskd_loss(s, t, temperature=self.contrast_temperature, share=self.share),
        }
        return parts if self.opened else {**parts, "head": self.pretext(student, teacher, batch)}
