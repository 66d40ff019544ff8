"""Distillation from a stronger teacher (DIST): match how predictions correlate instead of their values."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce, widen
from limbeck.core.relations import pearson
from limbeck.core.trace import Trace


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    eps: float = 1e-8,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Pearson distance between predictions, within each place (inter-class) and within each class (intra-class).

    .. math::
        L &= \tau^2 \left( \beta L_\mathrm{inter} + \gamma L_\mathrm{intra} \right), \qquad
            Y = \mathrm{softmax}(z / \tau) \in \mathbb{R}^{N \times C} \\
        L_\mathrm{inter} &= \frac 1 N \sum_i \left( 1 - \rho(Y^S_{i,:}, Y^T_{i,:}) \right), \qquad
        L_\mathrm{intra} = \frac 1 C \sum_c \left( 1 - \rho(Y^S_{:,c}, Y^T_{:,c}) \right)

    The ``N`` rows are all places that count: samples, or positions of all samples. The intra-class part ties the places
    of a batch together, so the loss of a batch is not the mean of the losses of its parts.

    Where student and teacher both do not vary, :math:`\rho` is 1; where one does not, it is 0; neither passes a
    gradient. So the intra-class part of a single place is exactly 0.

    Args:
        student_logits: ``[B, *, C]`` with two classes or more.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; every response loss takes them.
        beta: Weight of the inter-class part; 1 in the authors' code (whose runs give the sum of both parts weight 2).
        gamma: Weight of the intra-class part; 1 in the authors' code.
        tau: Temperature; 1 in the authors' ImageNet runs, 4 in those on CIFAR-100.
        eps: Added to the product of norms in :math:`\rho`, as in the authors' code: classes whose probability hardly
            varies in the batch count less. 0 gives the paper's plain correlation.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"``; ``"sum"``, the mean times the count; ``"none"``, ``[B, *]`` inter-class parts, each with
            the whole intra-class part added, so that their mean is the loss.

    Raises:
        TensorError: Logits of different shapes.
        ConfigError: ``tau`` not above zero.

    Source:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022, arXiv 2205.10536, equations 8 to 10.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
        >>> dist_loss(student, torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]]))
        tensor(1.9335)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(tau, "tau")
    y_student = (widen(student_logits) / tau).softmax(dim=-1)
    y_teacher = (widen(teacher_logits.detach()) / tau).softmax(dim=-1)

    places = y_student.shape[:-1]
    inter = 1 - pearson(y_student, y_teacher, eps)
    counts = y_student.new_ones(places) if mask is None else fit_mask(mask, inter).to(y_student.dtype)
    by_class = (y_student.flatten(0, -2).T, y_teacher.flatten(0, -2).T)
    intra = (1 - pearson(*by_class, eps, counts.flatten())).mean()

    return reduce(tau**2 * (beta * inter + gamma * intra), mask, reduction)


@register(
    Card(
        key="dist",
        name="DIST",
        title="Knowledge Distillation from A Stronger Teacher",
        year=2022,
        arxiv="2205.10536",
        code="hunto/DIST_KD",
        knowledge="response",
        equation=r"\tau^2 \left( \beta \frac 1 N \sum_i (1 - \rho(Y^S_{i,:}, Y^T_{i,:})) "
        r"+ \gamma \frac 1 C \sum_c (1 - \rho(Y^S_{:,c}, Y^T_{:,c})) \right)",
        use="For teachers much stronger than the student, whose exact probabilities it could not match anyway. "
        "Wants batches in which classes vary; positions of all samples are rows alike.",
        defaults={
            "beta": "1, as in the authors' code",
            "gamma": "1, as in the authors' code",
            "tau": "1, the authors' value on ImageNet; 4 on CIFAR-100",
            "eps": "1e-8, as in the authors' code",
        },
        evidence="parity",
        evidence_note="value and gradient of hunto/DIST_KD@2418f18 (segmentation, tau 1) and of its classification "
        "code, hunto/image_classification_sota@6f7a70a",
        choices=(
            "Where student and teacher do not vary at all their correlation counts as 1 (so one sample has no "
            "intra-class part), where one does not, as 0; the code's epsilon would pass gradients of 1e7 there.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=2.0,
    ),
    dist_loss,
)
class DIST(Objective):
    """Distillation from a stronger teacher; see ``limbeck.functional.dist_loss``.

    Args:
        beta: Weight of the inter-class part.
        gamma: Weight of the intra-class part.
        tau: Temperature.
        eps: Added to the product of norms in each correlation.

    >>> loss = 2.0 * DIST(tau=4.0)
    """

    # At equality each correlation falls short of 1 by what epsilon is beside its norms.
    contract = Contract(normalizer="positions", at_equal=None, mask=True, decomposes=False)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, tau: float = 1.0, eps: float = 1e-8) -> None:
        super().__init__()
        check_positive(tau, "tau")
        self.beta, self.gamma, self.tau, self.eps = beta, gamma, tau, eps

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        options = {name: getattr(self, name) for name in ("beta", "gamma", "tau", "eps")}
        return dist_loss(student.logits, teacher.logits, mask=batch.mask, **options)
