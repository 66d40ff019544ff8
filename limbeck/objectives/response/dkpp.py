"""DKPP: the teacher's answers with its lesser classes exchanged; a control for what it says about them."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce
from limbeck.core.trace import Trace


def exchange_others(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Every row with its greatest entry in its place and the others in a random order, ``[*, C]``.

    Draws come from torch's random state.

    Args:
        logits: ``[*, C]``.
        mask: ``[*]`` booleans, True where a row counts; what does not count changes no other row's draw.

    >>> exchange_others(torch.tensor([[1.0, 5.0]]))
    tensor([[1., 5.]])
    """
    best = torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1])
    others = best.argsort(dim=-1, stable=True)[..., :-1]  # their places, the greatest one's left out
    order = torch.rand(others.shape, device=logits.device).flatten(0, -2).argsort(dim=-1)
    if mask is not None:  # rows that count take the first draws
        order = order[(mask.flatten().cumsum(dim=0) - 1).clamp(min=0)]
    order = order.view(others.shape)
    return logits.scatter(-1, others, logits.gather(-1, others.gather(-1, order)))


def dkpp_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence from the teacher's prediction with all but its greatest probability in a random order.

    .. math:: L = T^2\, \mathrm{KL}(\phi(p) \,\|\, q), \qquad p = \mathrm{softmax}(z^T / T), \quad
        q = \mathrm{softmax}(z^S / T)

    Args:
        student_logits, teacher_logits: ``[B, *, C]``; the teacher's are detached.
        labels: Not used; taken so that all response losses are called alike.
        temperature: :math:`T`; 1 in the paper.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: The temperature is not above zero.

    Source:
        Furlanello et al., "Born Again Neural Networks", 2018, arXiv 1805.04770, equation 10.

    Example:
        >>> dkpp_loss(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[5.0, 0.0, 0.0]]))
        tensor(1.7688)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature, "temperature")
    wanted = soften(teacher_logits.detach(), temperature)
    wanted = exchange_others(wanted, None if mask is None else fit_mask(mask, wanted[..., 0]))
    return temperature**2 * reduce(kl_rows(wanted, soften(student_logits, temperature)), mask, reduction)


@register(
    Card(
        key="dkpp",
        name="DKPP",
        title="Born Again Neural Networks",
        year=2018,
        arxiv="1805.04770",
        knowledge="response",
        equation=r"T^2\, \mathrm{KL}(\phi(p) \,\|\, q), \quad \phi \text{ permutes all but } \max_c p_c",
        use="A control for KD: the teacher's confidence and the shape of its answers stay, what they say of each other "
        "class is lost. Alone, in scheme ban as in the paper.",
        defaults={"temperature": "1, the paper's"},
        evidence="formula",
        evidence_note="probabilities stay the same multiset with the greatest in its place; value and gradient by hand",
        choices=(
            "A new order for every sample in every step. Divergence where the paper has cross-entropy: the same "
            "gradient.",
        ),
    ),
    dkpp_loss,
)
class DKPP(Objective):
    """The teacher's answers with lesser classes exchanged; see ``limbeck.functional.dkpp_loss``.

    Args:
        temperature: T.

    >>> loss = DKPP()
    """

    contract = Contract("positions", None, mask=True, decomposes=False, temperature="squared", permutation=False)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.temperature = temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return dkpp_loss(student.logits, teacher.logits, temperature=self.temperature, mask=batch.mask)
