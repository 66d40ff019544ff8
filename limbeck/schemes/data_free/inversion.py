"""A frozen teacher asked with gradients to its inputs, and what its batch normalisations remember of its data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck.core.errors import ModelError
from limbeck.core.reduction import widen
from limbeck.core.taps import Listener
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace


def bn_statistics_loss(
    entered: Sequence[Tensor], means: Sequence[Tensor], variances: Sequence[Tensor], *, first: float = 1.0
) -> Tensor:
    r"""How far a batch is from what a network's batch normalisations remember of the data it was trained on.

    .. math:: R = \sum_l \left\| \mu_l(x) - \hat\mu_l \right\|_2 + \left\| \sigma^2_l(x) - \hat\sigma^2_l \right\|_2

    Args:
        entered: What enters each normalisation, ``[B, C]`` or ``[B, C, *]``; its variance is the biased one.
        means, variances: The running statistics, ``[C]`` each.
        first: Weight of the first layer; 10 in the authors' ImageNet script, 1 in that for CIFAR.

    Source: Dreaming to Distill, arXiv 1912.08795, equation 4.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> bn_statistics_loss([x], [torch.tensor([2.0])], [torch.tensor([1.5])])
    tensor(0.5000)
    """
    total: Tensor | float = 0.0
    for number, (value, mean, variance) in enumerate(zip(entered, means, variances, strict=True)):
        value = widen(value)
        dims = [d for d in range(value.ndim) if d != 1]
        found_variance, found_mean = torch.var_mean(value, dim=dims, correction=0)
        part = (found_mean - mean.to(value.dtype)).norm() + (found_variance - variance.to(value.dtype)).norm()
        total = total + (first if number == 0 else 1.0) * part
    assert isinstance(total, Tensor)
    return total


class Inverted:
    """Asks a frozen teacher so that gradients reach its inputs and never its weights.

    Args:
        teacher: A model at hand.
        example: One of its inputs.
        taps: Of it, beside its logits.
        statistics: Listen to its batch normalisations too.
        where: Who asks, for errors.

    Raises:
        ModelError: Statistics are wanted and it has none.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> inverted = Inverted(FrozenTeacher(net), torch.ones(2, 3), statistics=True)
    >>> x = torch.randn(5, 3, requires_grad=True)
    >>> inverted.statistics_loss(inverted(x)).backward(); x.grad.shape, net[0].weight.grad is None
    (torch.Size([5, 3]), True)
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        example: Tensor,
        taps: Iterable[str] = (),
        *,
        statistics: bool = False,
        where: str = "scheme",
    ) -> None:
        self.model = teacher.model
        self.norms = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]
        if statistics and not self.norms:
            raise ModelError(
                "the teacher has no batch normalisation, so it remembers no statistics of its data",
                where=where,
                found=type(self.model).__name__,
                remedy="take dafl or dfad, which ask for none, or set the weight of the statistics to 0",
            )
        listened = [f"{name}@in" for name, _ in self.norms] if statistics else []
        self.taps = listened
        self.listener = Listener(self.model, ["logits", *taps, *listened], example, logits=teacher.where)

    def __call__(self, inputs: Tensor) -> Trace:
        """What the teacher says of inputs."""
        self.model.eval()
        with weights_held(self.model):
            return self.listener(inputs)

    def entered(self, trace: Trace) -> list[Tensor]:
        """What entered each normalisation, in the order of the modules."""
        return [trace[tap] for tap in self.taps]

    def statistics_loss(self, trace: Trace, first: float = 1.0) -> Tensor:
        """:func:`bn_statistics_loss` of what was just asked."""
        means = [module.running_mean for _, module in self.norms]
        variances = [module.running_var for _, module in self.norms]
        return bn_statistics_loss(self.entered(trace), means, variances, first=first)  # type: ignore[arg-type]

    def close(self) -> None:
        """Take the hooks off the teacher."""
        self.listener.close()


@contextlib.contextmanager
def weights_held(model: nn.Module) -> Iterator[None]:
    """A graph made within collects no gradient in a model's weights."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
