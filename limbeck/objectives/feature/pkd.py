"""Patient knowledge distillation (PKD): the student's layers follow the teacher's, one summary vector each."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.pairing import Mapping
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_features, reduce, widen
from limbeck.core.relations import first_counted, pooled, unit
from limbeck.core.trace import Trace


def pkd_loss(
    student_states: Tensor,
    teacher_states: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance between normalised hidden states, summed over layers.

    .. math:: L = \sum_{j=1}^M \left\| \frac{h^S_j}{\|h^S_j\|_2} - \frac{h^T_{I(j)}}{\|h^T_{I(j)}\|_2} \right\|_2^2

    The authors' code averages over layers and width instead, which is :math:`M D` times less.

    Args:
        student_states: ``[B, M, D]``: of each sample one vector a layer (the class token), or ``[B, D]``.
        teacher_states: The same shape; detached.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: States of different shapes.

    Source: Sun et al., "Patient Knowledge Distillation for BERT Model Compression", 2019, arXiv 1908.09355, equation 7.

    >>> import torch
    >>> pkd_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor(2.)
    """
    check_features(student_states, teacher_states)
    gap = unit(widen(student_states)) - unit(widen(teacher_states.detach()))
    return reduce(gap.square().flatten(1).sum(dim=1), mask, reduction)


@register(
    Card(
        key="pkd",
        name="PKD",
        title="Patient Knowledge Distillation for BERT Model Compression",
        year=2019,
        arxiv="1908.09355",
        code="intersun/PKD-for-BERT-Model-Compression",
        knowledge="feature",
        equation=r"\sum_{j=1}^M \left\| \frac{h^S_j}{\|h^S_j\|_2} - \frac{h^T_{I(j)}}{\|h^T_{I(j)}\|_2} \right\|_2^2",
        use="To compress a fine-tuned transformer into one with fewer layers of the same width, beside KD.",
        defaults={
            "tap": "the repeated blocks; the last, which the logits already teach, is left out, as in the paper",
            "mapping": "'skip', the better of the paper's two",
            "token": "the first that counts: the class token of BERT and ViT; maps are averaged over their places",
        },
        evidence="parity",
        evidence_note="value and gradient of intersun/PKD-for-BERT-Model-Compression@9e9e860, which rounds its value "
        "to half precision",
        choices=(
            "The paper's sum over layers and width. The weight is the 500 of the authors' example over its 5 layers of "
            "width 768; they search 10 to 1000.",
            "Where widths differ, which the paper does not consider, a learned linear map leads to the teacher's.",
        ),
        tasks=("text classification", "classification"),
        with_labels={"cross_entropy": 0.3, "kd": 0.7},
        weight=0.13,
    ),
    pkd_loss,
)
class PKD(LayerObjective):
    """Patient knowledge distillation over all layers but the last; see ``limbeck.functional.pkd_loss``.

    Args:
        tap: The layers: a plural role, or several places in order; the last one of both models is not compared.
        teacher_tap: The teacher's, where they are called otherwise.
        mapping: Which of the teacher's layers: ``"skip"`` (every so many) or ``"last"``.
        token: What sums a sequence up: its ``"first"`` token that counts, or the ``"mean"``.

    >>> loss = 0.13 * PKD(mapping="last")
    """

    contract = Contract(normalizer="samples", mask=True)
    projectors: nn.ModuleList | None

    def __init__(
        self,
        tap: Tap = "blocks",
        teacher_tap: Tap | None = None,
        mapping: Mapping = "skip",
        token: Literal["first", "mean"] = "first",
    ) -> None:
        super().__init__(tap, teacher_tap)
        self.mapping, self.token, self.projectors = mapping, token, None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        def layer(s: Tensor, t: Tensor) -> nn.Module:
            same = s.shape[1] == t.shape[1]
            return nn.Identity() if same else LinearProjector(s.shape[1], t.shape[1]).to(s.device)

        self.projectors = nn.ModuleList(layer(s, t) for s, t, _ in self._states(student, teacher, batch.mask))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        states = self._states(student, teacher, batch.mask)
        layers = zip(self.ready("projectors"), states, strict=True)
        losses = [pkd_loss(widen(layer(s)), widen(t), mask=counts) for layer, (s, t, counts) in layers]
        return sum(losses[1:], losses[0])

    def _states(
        self, student: Trace, teacher: Trace, mask: Tensor | None
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """The pairs of summary vectors, and which samples count."""
        pairs = self.mapped(student, teacher, self.mapping)[:-1]
        if not pairs:
            raise ConfigError("the last layer is not compared, and there is no other", where="tap", found="one layer")
        counts = None if mask is None else mask.reshape(len(mask), -1).any(dim=1)
        return [(self._summary(s, mask), self._summary(t, mask), counts) for s, t in pairs]

    def _summary(self, feature: Tensor, mask: Tensor | None) -> Tensor:
        if feature.ndim != 3 or self.token == "mean":
            return pooled(feature, mask)[0]
        return first_counted(feature, mask)
