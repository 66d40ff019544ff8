"""One linear layer for the labels and one for the teacher, mixed when the student is used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.divergences import soften
from limbeck.core.reduction import check_inside, check_positive, widen
from limbeck.core.survey import dry
from limbeck.core.taps import Listener
from limbeck.models.heads.plan import Head, Plan, Site, exchange

#: What is tried for alpha and beta: the grid of DHO's code.
ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)


class DualHead(Head):
    r"""Two linear layers on one feature. In training it gives ``ce``, which the labels teach; in evaluation both, as

    .. math:: \log \big( \alpha\, \mathrm{softmax}(z_{ce}) + (1 - \alpha)\, \mathrm{softmax}(z_{kd} / \beta) \big)

    :math:`\alpha` and :math:`\beta` are buffers, so they ship with the weights; :func:`settle_head` chooses them.

    >>> DualHead(8, 3).eval()(torch.ones(1, 8)).exp().sum().round(decimals=4)
    tensor(1., grad_fn=<RoundBackward1>)
    """

    alpha: Tensor
    beta: Tensor

    def __init__(self, features: int, classes: int, bias: bool = True, alpha: float = 0.5, beta: float = 0.5) -> None:
        super().__init__()
        self.ce = nn.Linear(features, classes, bias)
        self.kd = nn.Linear(features, classes, bias)
        self.register_buffer("alpha", torch.tensor(alpha))
        self.register_buffer("beta", torch.tensor(beta))

    def forward(self, x: Tensor) -> Tensor:
        ce, kd = self.ce(x), self.kd(x)
        return ce if self.training else dual_log_probabilities(ce, kd, self.alpha, self.beta)


def dual_log_probabilities(ce: Tensor, kd: Tensor, alpha: float | Tensor, beta: float | Tensor) -> Tensor:
    r"""Log-probabilities of both heads together, see :class:`DualHead`.

    >>> dual_log_probabilities(torch.zeros(1, 2), torch.tensor([[9.0, 0.0]]), alpha=1.0, beta=1.0).exp()
    tensor([[0.5000, 0.5000]])
    """
    share = torch.as_tensor(alpha, device=ce.device)
    first, second = soften(ce), soften(kd, beta)
    return torch.logaddexp(first + share.log(), second + (1 - share).log())


@dataclass(frozen=True)
class Dual(Plan):
    """DHO's head, arXiv 2505.07675.

    Args:
        layer: See :class:`Plan`.
        alpha: The share of the labels' head in what it says. 0.5 and 0.5 are the paper's on ImageNet.
        beta: The temperature of the other head there.
        search: A recipe's run chooses both by accuracy on the validation data, where it reports on others.
    """

    name: ClassVar[str] = "dual"
    alpha: float = 0.5
    beta: float = 0.5
    search: bool = True

    def put(self, site: Site) -> None:
        check_inside(self.alpha, "head.alpha", closed=True)
        check_positive(self.beta, "head.beta")
        linear = site.linear
        head = DualHead(linear.in_features, linear.out_features, linear.bias is not None, self.alpha, self.beta)
        head.plan = self
        exchange(site.model, site.layer, head, like=linear)


def settle_head(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Choose on held-out data what a head leaves open: of ``dual`` alpha and beta, by accuracy over the paper's grid.

    Args:
        model: A student; its modes are as before afterwards.
        batches: Labelled data that nothing is reported on, such as ``loader.batches()``.

    Returns:
        What was chosen; empty where there is nothing to choose.
    """
    head = next((m for m in model.modules() if isinstance(m, DualHead)), None)
    if head is None or (isinstance(head.plan, Dual) and not head.plan.search):
        return {}
    ce, kd, labels = _said(model, batches)
    alpha, beta = search_dual(ce, kd, labels)
    with torch.no_grad():
        head.alpha.fill_(alpha)
        head.beta.fill_(beta)
    if isinstance(head.plan, Dual):
        head.plan = replace(head.plan, alpha=alpha, beta=beta)
    return {"alpha": alpha, "beta": beta}


def search_dual(ce: Tensor, kd: Tensor, labels: Tensor) -> tuple[float, float]:
    """The alpha and beta of highest accuracy, the first of equals: a grid of 21 and 7 values, as in DHO's code.

    Args:
        ce, kd: Logits of both heads, ``[N, C]``.
        labels: ``[N]``; negative ones do not count.

    >>> search_dual(torch.eye(2), torch.eye(2).flip(0), torch.tensor([0, 1]))
    (0.65, 0.5)
    """
    known = labels >= 0
    ce, kd, labels = widen(ce[known]), widen(kd[known]), labels[known]
    best, chosen = 0, (0.0, 1.0)
    first = ce.softmax(dim=-1)
    for beta in BETAS:
        second = (kd / beta).softmax(dim=-1)
        for alpha in ALPHAS:
            right = int(((alpha * first + (1 - alpha) * second).argmax(dim=-1) == labels).sum())
            if right > best:
                best, chosen = right, (alpha, beta)
    return chosen


def _said(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """What both heads say of all samples, and their labels."""
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    listener: Listener | None = None
    try:
        for batch in batches:
            listener = listener or Listener(model, ("head.ce", "head.kd"), batch.inputs)
            labels = batch.require("labels")
            with dry(model):
                trace = listener(batch.inputs)
            for part, tensor in zip(found, (trace["head.ce"], trace["head.kd"]), strict=False):
                part.append(tensor.reshape(-1, tensor.shape[-1]))
            found[2].append(labels.reshape(-1))
    finally:
        if listener is not None:
            listener.close()
    return torch.cat(found[0]), torch.cat(found[1]), torch.cat(found[2])
