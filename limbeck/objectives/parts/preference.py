"""Direct preference optimisation: of two texts the one that is preferred becomes likelier."""

from __future__ import annotations

import torch  # noqa: F401  for the example
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.divergences import soften
from limbeck.core.errors import DataError, TensorError
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_floating, check_positive, reduce
from limbeck.core.trace import Trace

LABELS, PLACES = "pair_labels", "pair_places"  # of both texts of each pair, in the extras of a batch


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The loss of direct preference optimisation.

    .. math:: L = -\log \sigma\left( \beta \left[ \log \frac{\pi(y_w \mid x)}{\pi_{\text{ref}}(y_w \mid x)} -
        \log \frac{\pi(y_l \mid x)}{\pi_{\text{ref}}(y_l \mid x)} \right] \right)

    Args:
        chosen, rejected: ``[B]``, log-probabilities of whole texts in the model that learns.
        reference_chosen, reference_rejected: ``[B]``, those of the model it started from; detached.
        beta: How far it may leave that model; 0.1 is what Rafailov et al. use.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Source: Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, equation 7.

    >>> even = torch.zeros(2)
    >>> dpo_loss(even, even, even, even)
    tensor(0.6931)
    """
    check_positive(beta, "beta")
    sides = {"chosen": chosen, "rejected": rejected}
    sides |= {"reference_chosen": reference_chosen, "reference_rejected": reference_rejected}
    for name, side in sides.items():
        check_floating(side, name)
        if side.shape != chosen.shape:
            raise TensorError("pairs differ in number", where=name, found=list(side.shape), wanted=list(chosen.shape))
    gain = (chosen - reference_chosen.detach()) - (rejected - reference_rejected.detach())
    return reduce(F.softplus(-beta * gain), None, reduction)


def text_log_probs(logits: Tensor, labels: Tensor, places: Tensor) -> Tensor:
    """The log-probability of each row's text, ``[B]``: a sum over its places.

    Args:
        logits: ``[B, L, V]``.
        labels: ``[B, L]``, the token that each place predicts.
        places: ``[B, L]``, True where that token is of the text.

    >>> text_log_probs(torch.zeros(1, 2, 4), torch.tensor([[3, -1]]), torch.tensor([[True, False]]))
    tensor([-1.3863])
    """
    said = soften(logits).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return reduce(said, places, "none").sum(dim=1)


class DPO(Objective):
    """:func:`dpo_loss` of a batch whose first half of rows is preferred to its second, row by row.

    Args:
        beta: See there.
    """

    contract = Contract(normalizer="samples", at_equal=0.6931471805599453, mask=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        check_positive(beta, "beta")
        self.beta = beta

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        if LABELS not in batch.extras:
            raise DataError("this loss is of pairs of texts", where="batch.extras", found="none", wanted=LABELS)
        labels, places = batch.extras[LABELS], batch.extras[PLACES]
        sides = [text_log_probs(trace.logits, labels, places).chunk(2) for trace in (student, teacher)]
        return dpo_loss(*sides[0], *sides[1], beta=self.beta)
