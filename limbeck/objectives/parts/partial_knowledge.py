"""Teachers that know a part of what a teacher knows: how sure it is of a sample, or how classes are alike."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.reduction import check_positive


def confidence_alone(probabilities: Tensor, target: Tensor) -> Tensor:
    r"""KD-pt: the probability of the label as it is, what is left spread evenly.

    .. math:: \rho_y = p_y, \qquad \rho_c = \frac{1 - p_y}{C - 1}

    Args:
        probabilities: p, ``[*, C]``.
        target: ``[*]`` classes from 0 on.

    >>> import torch
    >>> confidence_alone(torch.tensor([0.6, 0.3, 0.1]), torch.tensor(0))
    tensor([0.6000, 0.2000, 0.2000])
    """
    classes, place = probabilities.shape[-1], target.unsqueeze(-1)
    if classes < 2:
        raise TensorError("there is no class beside the label", where="teacher_logits", found=f"{classes} class")
    sure = probabilities.gather(-1, place)
    return ((1 - sure) / (classes - 1)).expand_as(probabilities).scatter(-1, place, sure)


def top_alone(probabilities: Tensor, count: int) -> Tensor:
    r"""KD-topk: the k highest probabilities as they are, what is left spread evenly.

    Args:
        probabilities: p, ``[*, C]``.
        count: k; C or more leaves p as it is.

    >>> import torch
    >>> top_alone(torch.tensor([0.5, 0.3, 0.2, 0.0]), 2)
    tensor([0.5000, 0.3000, 0.1000, 0.1000])
    """
    if count < 1:
        raise ConfigError("one class is kept at least", where="top", found=count)
    classes = probabilities.shape[-1]
    if count >= classes:
        return probabilities
    best = probabilities.topk(count, dim=-1)
    rest = (1 - best.values.sum(dim=-1, keepdim=True)).clamp(min=0) / (classes - count)
    return rest.expand_as(probabilities).scatter(-1, best.indices, best.values)


def classes_alike(weights: Tensor, sharpness: float) -> Tensor:
    r"""KD-sim: to each class how like all are to it by the teacher's own weights for them, ``[C, C]``.

    .. math:: \rho_y = \mathrm{softmax}\left( \hat W \hat w_y / \alpha \right)

    Args:
        weights: W, ``[C, D]``, of the teacher's last layer; rows are taken at length 1.
        sharpness: :math:`\alpha`.

    >>> import torch
    >>> classes_alike(torch.eye(3), 1.0)[0]
    tensor([0.5761, 0.2119, 0.2119])
    """
    check_positive(sharpness, "sharpness")
    if weights.ndim != 2:
        raise TensorError("weights of classes are a matrix", where="class_weights", found=list(weights.shape))
    rows = F.normalize(weights.float(), dim=1)
    return ((rows @ rows.T) / sharpness).softmax(dim=1)
