"""Alpha-divergence (AlphaNet): a family from KL to reverse KL and beyond, or the worst of several members."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import alpha_rows, softened_divergence
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_positive
from limbeck.core.trace import Trace


def alpha_divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    alphas: list[float] | tuple[float, ...] = (-1.0, 1.0),
    clip: float | None = 5.0,
    renyi: bool = False,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The largest of some alpha-divergences, place by place.

    .. math::
        L = T^2 \max_{\alpha} D_\alpha(p \| q), \qquad D_\alpha = \frac{1}{\alpha (\alpha - 1)}
        \left( \sum_c q_c \left( \frac{p_c}{q_c} \right)^\alpha - 1 \right)

    with :math:`p = \mathrm{softmax}(z^T / T)` and :math:`q = \mathrm{softmax}(z^S / T)`. A negative :math:`\alpha`
    punishes a student that is surer than the teacher, a positive one a student that is less sure; 1 is KL, 0 reverse
    KL. Rényi's divergence, :math:`\log(1 + \alpha (\alpha - 1) D_\alpha) / (\alpha - 1)`, is a function of each.

    Ratios count up to ``clip`` once raised to :math:`\alpha`. The gradient is that of the value without clipping, with
    the clipped ratios as constant weights, so at places that are clipped it is not the derivative of the value.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        alphas: One or more; the paper takes -1 and 1.
        clip: The most a ratio counts; 5 in the paper. ``None``: no limit. KL (1) is never clipped.
        renyi: Rényi's divergences instead; every alpha must be above 0.
        temperature: T; 1 in the paper.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: No alpha, one that ``renyi`` does not take, or ``clip`` below 1.

    Source:
        Wang et al., "AlphaNet: Improved Training of Supernets with Alpha-Divergence", 2021, arXiv 2102.07954.

    Example:
        >>> alpha_divergence_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), alphas=[0.5])
        tensor(1.4078)
    """
    _check(alphas, clip, renyi)

    def rows(teacher: Tensor, student: Tensor) -> Tensor:
        return torch.stack([_rows(teacher, student, a, clip, renyi) for a in alphas]).amax(dim=0)

    return softened_divergence(
        rows, student_logits, teacher_logits, labels, temperature=temperature, mask=mask, reduction=reduction
    )


def _rows(teacher: Tensor, student: Tensor, alpha: float, clip: float | None, renyi: bool) -> Tensor:
    values = alpha_rows(teacher, student, alpha, clip)
    return values if not renyi or alpha == 1 else (alpha * (alpha - 1) * values).log1p() / (alpha - 1)


def _check(alphas: list[float] | tuple[float, ...], clip: float | None, renyi: bool) -> None:
    if not alphas or not all(math.isfinite(a) for a in alphas):
        raise ConfigError("wants one alpha or more", where="alphas", found=list(alphas), wanted="finite numbers")
    if renyi and min(alphas) <= 0:
        raise ConfigError("Rényi's divergence wants alphas above zero", where="alphas", found=list(alphas))
    if clip is not None and not clip >= 1:
        raise ConfigError("must be 1 or more, or none", where="clip", found=clip)


@register(
    Card(
        key="alpha_divergence",
        name="Alpha-divergence (AlphaNet)",
        title="AlphaNet: Improved Training of Supernets with Alpha-Divergence",
        year=2021,
        arxiv="2102.07954",
        code="facebookresearch/AlphaNet",
        knowledge="response",
        equation=r"T^2 \max_{\alpha} \frac{1}{\alpha (\alpha - 1)} \left( \sum_c p_c^\alpha q_c^{1-\alpha} - 1 \right)",
        use="Where a student should be neither surer nor less sure than its teacher: the two alphas punish either. One "
        "alpha between 0 and 1 goes smoothly from reverse KL to KL. AlphaNet also clips gradients, at 1.",
        defaults={
            "alphas": "-1 and 1, the paper's values",
            "clip": "5, the paper's value",
            "renyi": "no: the paper's divergence",
            "temperature": "1, as in the paper",
        },
        evidence="parity",
        evidence_note="values and gradients of facebookresearch/AlphaNet@1df57bf (f_divergence and AdaptiveLossSoft)",
        choices=(
            "The value is the divergence; the authors' loss returns a surrogate that only has the right gradient.",
            "A temperature, with KD's factor T^2, which the paper leaves at 1.",
        ),
    ),
    alpha_divergence_loss,
)
class AlphaDivergence(Objective):
    """The largest of some alpha-divergences; see ``limbeck.functional.alpha_divergence_loss``.

    Args:
        alphas: Which divergences; -1 and 1 by default.
        clip: The most a ratio counts.
        renyi: Rényi's divergences instead.
        temperature: T.

    >>> loss = AlphaDivergence(alphas=[0.5], clip=None)
    """

    contract = Contract(normalizer="positions", mask=True, temperature="squared", spare_class=True, stop_gradient=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(
        self,
        alphas: list[float] | None = None,
        clip: float | None = 5.0,
        renyi: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.alphas = [-1.0, 1.0] if alphas is None else alphas
        _check(self.alphas, clip, renyi)
        check_positive(temperature, "temperature")
        self.clip, self.renyi, self.temperature = clip, renyi, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        options = {n: getattr(self, n) for n in ("alphas", "clip", "renyi", "temperature")}
        return alpha_divergence_loss(student.logits, teacher.logits, mask=batch.mask, **options)
