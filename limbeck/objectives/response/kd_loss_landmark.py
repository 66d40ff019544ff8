"""KD-Loss: coordinates learned from a tough teacher (trained on the truth) and a tolerant one (on smoother shapes)."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import DataError
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_floating, check_same_shape, reduce, widen
from limbeck.core.trace import Trace


def kd_loss_landmark_loss(
    student_output: Tensor,
    tough_output: Tensor,
    tolerant_output: Tensor,
    labels: Tensor,
    *,
    main_weight: float = 2.0,
    tough_weight: float = 1.0,
    tolerant_weight: float = 1.0,
    tough_slopes: tuple[float, float] = (1.9, -0.45),
    tolerant_slopes: tuple[float, float] = (1.8, -0.4),
    knee: float = 0.15,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Distance to the truth, and an assistive term for each teacher, which is a point to pass on the way there.

    .. math::
        L &= \lambda L_\mathrm{main} + \lambda_1 A(t^\mathrm{tough}) + \lambda_2 A(t^\mathrm{tol}), \qquad
        L_\mathrm{main} = \begin{cases} 3 e & e \le d \\ e^2 + 3 d - d^2 & e > d \end{cases} \\
        A(t) &= w\,|t' - p|, \qquad t' = g + \mathrm{sign}(p - g)\,|t - g|

    p is a predicted number, g the truth, e = |p - g| and d = |t^tol - g|. The teacher is reflected to the prediction's
    side. w is the first slope where p is beyond t' (pulled back), the negative second one between t' and the knee
    (pushed past), and 0 nearer to g than ``knee`` of the way to t'. The mean runs over numbers and samples.

    Args:
        student_output: ``[B, *, P]`` predicted numbers, such as coordinates of landmarks.
        tough_output: The teacher's that was trained on the truth; detached.
        tolerant_output: The teacher's that was trained on softened targets (``limbeck.data.ShapeModel``); detached.
        labels: The truth, ``[B, *, P]``.
        main_weight: :math:`\lambda`; 2 in the authors' README.
        tough_weight, tolerant_weight: :math:`\lambda_1, \lambda_2`; 1 there.
        tough_slopes, tolerant_slopes: w beyond each teacher, and before it; the code's. Together the negative ones must
            stay above ``-3 main_weight``, or the truth repels.
        knee: Where the push ends; 0.15 in the code.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source: Fard and Mahoor, "Facial Landmark Points Detection Using KD-Based Neural Networks", 2021, arXiv 2111.07047.

    Example:
        >>> import torch
        >>> zero, teacher = torch.zeros(1, 1), torch.full((1, 1), 0.2)
        >>> kd_loss_landmark_loss(torch.full((1, 1), 0.5), teacher, teacher, zero, main_weight=0, tolerant_weight=0)
        tensor(0.5700)
    """
    check_floating(student_output, "student_output", least=2)
    for value, name in ((tough_output, "tough_output"), (tolerant_output, "tolerant_output"), (labels, "labels")):
        check_floating(value, name, least=2)
        check_same_shape(student_output, value, "student_output", name)
    p = widen(student_output)
    g, tough, tolerant = (t.detach().to(p.dtype) for t in (labels, tough_output, tolerant_output))
    e, d = (p - g).abs(), (tolerant - g).abs()
    values = main_weight * (3 * e).where(e <= d, e.square() + 3 * d - d.square())
    terms = (tough_weight, (tough - g).abs(), tough_slopes), (tolerant_weight, d, tolerant_slopes)
    for weight, reach, (pull, push) in terms:
        before = (e >= knee * reach) & (e <= reach)
        slope = pull * (e > reach).to(p.dtype) + push * before.to(p.dtype)
        values = values + weight * slope * (g + (p - g).detach().sign() * reach - p).abs()
    return reduce(values.mean(dim=-1), mask, reduction)


@register(
    Card(
        key="kd_loss_landmark",
        name="KD-Loss",
        title="Facial Landmark Points Detection Using Knowledge Distillation-Based Neural Networks",
        year=2021,
        arxiv="2111.07047",
        code="aliprf/KD-Loss",
        knowledge="response",
        equation=r"\lambda L_\mathrm{main}(p, g) + \lambda_1 w_1 |t_1' - p| + \lambda_2 w_2 |t_2' - p|",
        use="Regression of coordinates with two teachers, one trained on the truth and one on smoothed shapes "
        "(limbeck.data.ShapeModel). It holds the labels' loss already.",
        defaults={"main_weight": "2, the README's", "tough_weight": "1, likewise", "tolerant_weight": "1, likewise"},
        evidence="parity",
        evidence_note="value and gradient of aliprf/KD-Loss@5f6f045 (kd_loss), its TensorFlow calls done by torch",
        choices=(
            "The distiller's teacher is the tough one; the tolerant one's answers are a tap of it, or in the batch.",
        ),
        needs=("labels",),
        tasks=("regression",),
    ),
    kd_loss_landmark_loss,
)
class KDLossLandmark(Objective):
    """KD-Loss with a tough and a tolerant teacher; see ``limbeck.functional.kd_loss_landmark_loss``.

    Args:
        main_weight: Of the distance to the truth.
        tough_weight: Of the term of the tough teacher, which is the distiller's.
        tolerant_weight: Of the tolerant teacher's term.
        tolerant: A place in the teacher that gives the tolerant one's answer, as in a module that holds and runs both;
            default ``batch.extras["tolerant"]``.

    >>> loss = KDLossLandmark(tolerant="tolerant")
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True)
    student_taps = ("logits",)

    def __init__(
        self,
        main_weight: float = 2.0,
        tough_weight: float = 1.0,
        tolerant_weight: float = 1.0,
        tolerant: str | None = None,
    ) -> None:
        super().__init__()
        self.main_weight, self.tough_weight, self.tolerant_weight = main_weight, tough_weight, tolerant_weight
        self.tolerant = tolerant
        self.teacher_taps = ("logits",) if tolerant is None else ("logits", tolerant)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        tolerant = teacher[self.tolerant] if self.tolerant is not None else batch.extras.get("tolerant")
        if tolerant is None:
            raise DataError(
                "the tolerant teacher's answers are not there",
                where="batch.extras",
                wanted="'tolerant'",
                remedy="name the place in the teacher that gives them with tolerant, or put them into the batch",
            )
        return kd_loss_landmark_loss(
            student.logits,
            teacher.logits,
            tolerant,
            batch.require("labels"),
            main_weight=self.main_weight,
            tough_weight=self.tough_weight,
            tolerant_weight=self.tolerant_weight,
            mask=batch.mask,
        )
