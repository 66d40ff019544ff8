"""A gradient step that can itself be differentiated, for who judges what comes after it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from limbeck.core.ranks import mean_gradients


def stepped(
    loss: Tensor, weights: Mapping[str, Tensor], rate: float, *, second_order: bool = True
) -> dict[str, Tensor]:
    r"""Weights after one gradient step, :math:`\theta' = \theta - \alpha \nabla L(\theta)`; loss and step may both be
    differentiated further.

    Of several processes each has its part of the loss, as for a step of the engine; the gradient is that of the whole,
    and so is every further one, averaged over processes.

    Args:
        loss: Of the weights.
        weights: By name; one that the loss does not know stays.
        rate: :math:`\alpha`.
        second_order: :math:`\nabla L` depends on the weights; else it is a constant.

    >>> w = torch.tensor(2.0, requires_grad=True)
    >>> new = stepped(w**2 / 2, {"w": w}, 0.1)["w"]
    >>> torch.autograd.grad((new - 1) ** 2 / 2, w)[0].round(decimals=4)
    tensor(0.7200)
    """
    found = torch.autograd.grad(
        loss, list(weights.values()), create_graph=second_order, retain_graph=True, allow_unused=True
    )
    known = {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}
    known = dict(zip(known, mean_gradients(list(known.values())), strict=True))
    return {name: weight - rate * known[name] if name in known else weight for name, weight in weights.items()}
