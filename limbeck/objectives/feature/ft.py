"""Factor transfer (FT): the teacher's feature paraphrased, the student's translated, and the two compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.layout import same_places
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_features, check_positive, reduce, widen
from limbeck.core.relations import project, unit
from limbeck.core.trace import Trace
from limbeck.objectives.parts.paraphraser import Paraphrase, Paraphraser, last_map, three_layers


def ft_loss(
    student_factor: Tensor,
    teacher_factor: Tensor,
    *,
    p: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Distance between the student's and the teacher's factors, each a unit vector.

    .. math:: L = \frac 1 n \sum_{i=1}^n \left| \frac{f^S_i}{\|f^S\|_2} - \frac{f^T_i}{\|f^T\|_2} \right|^p

    Args:
        student_factor: What the translator gave, ``[B, *]`` of n entries a sample.
        teacher_factor: What the paraphraser gave, the same shape; detached.
        p: 1, as in the paper's main results; it tries 2, too.
        mask: Booleans ``[B]``, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Factors of different shapes, or a mask that does not fit.
        ConfigError: ``p`` not above zero.

    Source:
        Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", 2018, arXiv
        1802.04977.

    Example:
        >>> import torch
        >>> ft_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor(0.6000)
    """
    check_features(student_factor, teacher_factor)
    check_positive(p, "p")
    gap = unit(widen(student_factor).flatten(1)) - unit(widen(teacher_factor.detach()).flatten(1))
    return reduce((gap.abs() if p == 1 else gap.abs().pow(p)).mean(dim=1), mask, reduction)


@register(
    Card(
        key="ft",
        name="FT",
        title="Paraphrasing Complex Network: Network Compression via Factor Transfer",
        year=2018,
        arxiv="1802.04977",
        code="Jangho-Kim/Factor-Transfer-pytorch",
        knowledge="feature",
        equation=r"\frac 1 n \sum_i \left| \frac{f^S_i}{\|f^S\|_2} - \frac{f^T_i}{\|f^T\|_2} \right|^p",
        use="Digested hints: what an autoencoder, learned in a first stage, makes of the teacher's last map. Widths or "
        "kinds of networks may differ; combines with KD.",
        defaults={
            "p": "1, as in the authors' code",
            "rate": "0.5, as in the authors' code",
            "tap": "the last stage, as in the authors' code",
            "reconstruction": "1/500, which makes it 1 under the usual weight; ours",
        },
        evidence="parity",
        evidence_note="value and gradient, paraphraser and translator, of Jangho-Kim/Factor-Transfer-pytorch@19cce26; "
        "RepDistiller compares the factors' attention maps instead",
        choices=(
            "The paraphraser learns by the squared error, as in the paper; the authors' code has the absolute one.",
            "In one stage it learns beside the student, by its own loss alone.",
            "Factors of maps of different sizes: the larger is pooled.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=500.0,
        scheme="hint_then_kd",
    ),
    ft_loss,
)
class FT(Objective):
    """Factor transfer; see ``limbeck.functional.ft_loss``.

    With ``scheme: hint_then_kd`` the paraphraser is trained in a first stage and then stays as it is, as in the paper.
    Without, its reconstruction error is a second part of the loss, from which only it learns.

    Args:
        tap: The student's map.
        teacher_tap: The teacher's, where it is called otherwise.
        p: Power of the distance.
        rate: Channels of the factors over those of the teacher's map.
        reconstruction: Weight of the paraphraser's own loss where there is one stage.

    >>> loss = 500.0 * FT("layer3")
    """

    contract = Contract(normalizer="samples", at_equal=None, mask=True)
    translator: nn.Module | None

    def __init__(
        self,
        tap: str = "stages:-1",
        teacher_tap: str | None = None,
        p: float = 1.0,
        rate: float = 0.5,
        reconstruction: float = 0.002,
    ) -> None:
        super().__init__()
        check_positive(p, "p")
        check_positive(rate, "rate")
        self.tap, self.teacher_tap, self.p, self.reconstruction = tap, teacher_tap or tap, p, reconstruction
        self.student_taps, self.teacher_taps = (self.tap,), (self.teacher_tap,)
        self.paraphraser, self.translator, self.two_stages = Paraphraser(rate), None, False

    def opening(self) -> Objective:
        """The paraphraser's own loss; from now on this goes on with what it learned."""
        self.two_stages = True
        return Paraphrase(self.paraphraser, self.teacher_tap)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        feature = last_map(student, self.tap, "student_feature")
        factors = self.paraphraser.size(last_map(teacher, self.teacher_tap, "teacher_feature"))
        self.paraphraser.requires_grad_(not self.two_stages)
        self.translator = three_layers(nn.Conv2d, feature.shape[1], feature.shape[1], factors, factors).to(
            feature.device
        )

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor | dict[str, Tensor]:
        translator = self.ready("translator")
        own = project(translator, last_map(student, self.tap, "student_feature"), "student_feature")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.two_stages):
            factor, error = self.paraphraser(last_map(teacher, self.teacher_tap, "teacher_feature").detach())
        loss = ft_loss(*same_places(own, factor.detach()), p=self.p, mask=batch.mask)
        if self.two_stages:
            return loss
        return {"factor": loss, "paraphrase": self.reconstruction * reduce(error, batch.mask)}
