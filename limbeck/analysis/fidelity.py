"""How closely a student answers as its teacher does: agreement, and divergences of the two predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional import kl_divergence

from limbeck.core.divergences import binary_kl_rows
from limbeck.core.errors import DataError
from limbeck.core.reduction import check_logits, widen
from limbeck.engine.metrics import as_choices


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Share of places where both name the same class first.

    .. math:: \frac 1 n \sum_i [\arg\max z_{s,i} = \arg\max z_{t,i}]

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``.

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source: Stanton et al., Does Knowledge Distillation Really Work?, 2021, arXiv 2106.05945.

    >>> agreement(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]]))
    tensor(0.5000)
    """
    check_logits(student_logits, teacher_logits)
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean()


def kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Mean divergence of the student's prediction from the teacher's, in nats, at temperature 1.

    .. math:: \frac 1 n \sum_i \mathrm{KL}(p_{t,i} \,\|\, p_{s,i})

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``.

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source: Stanton et al., 2021, arXiv 2106.05945.

    >>> kl(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    tensor(1.5232)
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits)
    return kl_divergence(teacher, student, log_prob=True)


def js(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Mean Jensen-Shannon divergence, in nats: symmetric, and never above :math:`\ln 2`.

    .. math::

        \mathrm{JS} = \tfrac 1 2 \mathrm{KL}(p_t \,\|\, m) + \tfrac 1 2 \mathrm{KL}(p_s \,\|\, m),
        \quad m = \tfrac 1 2 (p_t + p_s)

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``.

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source: Lin, Divergence measures based on the Shannon entropy, 1991.

    >>> round(float(js(torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]]))), 4)  # ln 2
    0.6931
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits)
    middle = torch.logaddexp(student, teacher) - math.log(2)
    return 0.5 * (kl_divergence(teacher, middle, log_prob=True) + kl_divergence(student, middle, log_prob=True))


def binary_agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Share of decisions, one for each sample and class of multi-label data, on which both agree.

    .. math:: \frac 1 {n C} \sum_{i,c} [z_{s,i,c} > 0 \Leftrightarrow z_{t,i,c} > 0]

    >>> binary_agreement(torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 1.0]]))
    tensor(0.5000)
    """
    check_logits(student_logits, teacher_logits)
    return ((student_logits > 0) == (teacher_logits > 0)).float().mean()


def binary_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Mean divergence of the student's yes-or-no predictions from the teacher's, in nats, summed over classes.

    .. math:: \frac 1 n \sum_{i,c} \mathrm{KL}(\mathrm{Bernoulli}(p_{t,i,c}) \,\|\, \mathrm{Bernoulli}(p_{s,i,c}))

    >>> binary_kl(torch.zeros(1, 2), torch.tensor([[1.0, -2.0]]))
    tensor(0.4388)
    """
    check_logits(student_logits, teacher_logits)
    return binary_kl_rows(teacher_logits, student_logits).mean()


def binary_js(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Mean Jensen-Shannon divergence of yes-or-no predictions, in nats, summed over classes.

    >>> round(float(binary_js(torch.tensor([[99.0]]), torch.tensor([[-99.0]]))), 4)  # ln 2
    0.6931
    """
    check_logits(student_logits, teacher_logits)
    return js(as_choices(student_logits), as_choices(teacher_logits)) * student_logits.shape[-1]


def acceptance(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""How often a teacher would accept what the student drafts: the expected rate of speculative decoding.

    .. math:: \frac 1 n \sum_i \sum_v \min(p_{s,i,v}, p_{t,i,v})

    Each place is taken with the text before it as it is in the data; temperature 1.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``.

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023, arXiv 2211.17192.

    >>> acceptance(torch.tensor([[0.0, 0.0]]), torch.tensor([[99.0, 0.0]]))
    tensor(0.5000)
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits)
    return torch.minimum(student, teacher).exp().sum(-1).mean()


#: What is told of each task; predictions that are numbers are held against the labels alone.
_FIGURES = {
    "classification": {"agreement": agreement, "kl": kl, "js": js},
    "multilabel": {"agreement": binary_agreement, "kl": binary_kl, "js": binary_js},
    "regression": {},
}
_FIGURES["language"] = {**_FIGURES["classification"], "acceptance": acceptance}


class Fidelity:
    """Agreement, KL and JS over a whole data set, batch by batch.

    Args:
        task: What the labels mean; multi-label predictions are one yes or no a class. Of language there is
            acceptance, too.

    Example:
        >>> fidelity = Fidelity()
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> fidelity.update(logits, logits); fidelity.compute()
        {'agreement': 1.0, 'kl': 0.0, 'js': 0.0}
    """

    def __init__(self, task: str = "classification") -> None:
        self.places, self._functions = 0, _FIGURES[task]
        self._sums = dict.fromkeys(self._functions, 0.0)

    def update(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Add places ``[n, C]``; none is allowed."""
        count = student_logits.shape[0]
        if count:
            self.places += count
            for name, function in self._functions.items():
                # A divergence is never negative; its rounding error can be.
                self._sums[name] += max(float(function(student_logits, teacher_logits)), 0.0) * count

    def compute(self) -> dict[str, float]:
        """The means over all places added."""
        if not self.places:
            raise DataError("no place was added to the mean", where="fidelity")
        return {name: value / self.places for name, value in self._sums.items()}


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    check_logits(student_logits, teacher_logits)
    student, teacher = (F.log_softmax(widen(z).flatten(0, -2), dim=-1) for z in (student_logits, teacher_logits))
    return student, teacher
