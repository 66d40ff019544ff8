"""CAKD: a convolutional student learns a transformer's attention and tokens, through a projector for each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.layout import to_tokens
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_features, reduce, widen
from limbeck.core.relations import gram
from limbeck.core.trace import Trace
from limbeck.core.views import perturbed
from limbeck.objectives.parts.cakd_released import Released
from limbeck.objectives.parts.contest import contest, judge
from limbeck.objectives.parts.map_to_tokens import MapToTokens


@without_autocast
def cakd_loss(
    student_qkv: list[Tensor],
    teacher_qkv: list[Tensor],
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    share: float = 0.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distances, by element, of partially crossed attention, of how values relate, and of tokens.

    .. math::
        L = \overline{\big(A(Q_T, K_T, V_T) - A(g(Q_S), g(K_S), g(V_S))\big)^2} + \tfrac 1 d
            \overline{\big(V_T V_T^\top - V_S V_S^\top\big)^2} + \overline{(h_T - h_S')^2}, \qquad
        A(Q, K, V) = \mathrm{softmax}(Q K^\top / \sqrt d)\, V

    g takes every entry of a matrix from the teacher with probability ``share``, and else from the student.

    Args:
        student_qkv: Three times ``[B, N, d]``: queries, keys and values projected from the student's map.
        student_feature: ``[B, N, D]``: tokens projected from the student's map.
        teacher_qkv, teacher_feature: The teacher's, of the same shapes; detached.
        share: Of the teacher's entries; 0.5 in the paper.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises: TensorError: Shapes differ. Source: Liu et al., CAKD, 2022, arXiv 2207.05273, equations 1 to 6.

    >>> q = torch.zeros(1, 4, 2)
    >>> cakd_loss([q, q, q], [q, q, q], torch.zeros(1, 4, 3), torch.ones(1, 4, 3))
    tensor(1.)
    """
    for s, t in zip(student_qkv, teacher_qkv, strict=True):
        check_features(s, t, least=3)
    check_features(student_feature, teacher_feature, least=3)
    own, other = [widen(s) for s in student_qkv], [widen(t.detach()) for t in teacher_qkv]
    drawn = torch.rand(3, *own[0].shape, device=own[0].device) < share
    mixed = [torch.where(take, t, s) for take, s, t in zip(drawn, own, other, strict=True)]
    gaps = (
        attend(mixed[0], mixed[1], mixed[2]) - attend(other[0], other[1], other[2]),
        (gram(own[2]) - gram(other[2])) * own[2].shape[-1] ** -0.5,
        widen(student_feature) - widen(teacher_feature.detach()),
    )
    each = [gap.square().mean(dim=(1, 2)) for gap in gaps]
    return reduce(each[0] + each[1] + each[2], mask, reduction)


@register(
    Card(
        key="cakd",
        name="CAKD",
        title="Cross-Architecture Knowledge Distillation",
        year=2022,
        arxiv="2207.05273",
        code="yufanLIU/CrossArch_KD",
        knowledge="feature",
        equation=r"\| \mathrm{Attn}_T - \mathrm{PCAttn}_S \|^2 + \tfrac 1 d \| V_T V_T^\top - V_S V_S^\top \|^2 + "
        r"\| h_T - h_S' \|^2 + \lambda \log(1 - D(h_S'))",
        use="From a transformer with global attention to a convolutional network, on images, beside the labels.",
        defaults={"adversarial": "0.1, ours: the paper leaves it open; with more, tokens were matched less closely"},
        evidence="parity",
        evidence_note="the released variant with its projectors: value and gradients of yufanLIU/CrossArch_KD@1bc8a66; "
        "the paper's form, which has no code, by its equations",
        choices=(
            "Norms are means over elements; one head; no dropout, whose rate is not given; the judge sees tokens, and "
            "has the student's optimizer; what another view is (see ``perturbed``) is ours.",
            "The released variant has no judge: the script detaches what it sees, so that the student learns nothing.",
        ),
        with_labels={"cross_entropy": 1.0},
    ),
    cakd_loss,
)
class CAKD(MapToTokens):
    """Cross-architecture distillation; see ``limbeck.functional.cakd_loss``.

    Args:
        tap: The student's layer, or a role: the one nearest in resolution to teacher_tap: the teacher's tokens.
        attention: The teacher's attention, by number; its queries, keys and values are tapped.
        variant: The paper's loss, or that of the authors' script for ``ReleasedRamp`` (teacher_heads: its attention's).
        share: As in ``cakd_loss``.
        views: Probability that in training the student sees an image otherwise than the teacher.
    """

    contract = Contract(at_equal=None, decomposes=False, permutation=False, stop_gradient=True)

    def __init__(
        self,
        tap: str = "stages",
        teacher_tap: str = "blocks:-1",
        attention: int = -1,
        variant: Literal["paper", "released"] = "paper",
        share: float = 0.5,
        views: float = 0.5,
        adversarial: float = 0.1,
        teacher_heads: int = 12,
    ) -> None:
        super().__init__(tap, teacher_tap, attention)
        self.share, self.views, self.adversarial = share, views, adversarial
        self.released = Released(tap, teacher_tap, attention, teacher_heads) if variant == "released" else None
        if self.released is not None:
            self.student_taps, self.teacher_taps = self.released.student_taps, self.released.teacher_taps

    def prepare(self, batch: Batch) -> Batch:
        images, other = batch.inputs, batch.teacher_inputs
        if self.released is None and self.training and isinstance(images, Tensor) and images.ndim == 4:
            other = images if other is None else other
            return batch.replace(inputs=perturbed(images, self.views), teacher_inputs=other)
        return batch

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        if self.released is not None:
            return self.released.setup(student, teacher, batch, data)
        own, qkv, goal = self.features(student, teacher)
        self.learn(own, goal, qkv[0].shape[2], kernel=3)
        self.judge = judge(goal.shape[1]).to(own.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor | dict[str, Tensor]:
        if self.released is not None:
            return self.released(student, teacher, batch)
        own, qkv, goal = self.features(student, teacher)
        (crossed, fake), real = self.projected(own), to_tokens(goal)
        loss = cakd_loss(crossed, qkv, fake, real, share=self.share)
        judged, fooled = contest(self.judge, widen(real), fake)
        return {"projected": loss, "judge": judged.mean(), "adversarial": self.adversarial * fooled.mean()}
