"""Integer labels: which places have one, and whether they name a class."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from limbeck.core.errors import TensorError


def split_labels(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Labels that can be indexed with (0 where there is none), and True where there is one.

    A negative label means that the place has none. Values are looked at on the CPU only: on a device the look would
    make every step wait.

    Raises:
        TensorError: A label names no class.

    >>> split_labels(torch.tensor([2, -100]), classes=3)
    (tensor([2, 0]), tensor([ True, False]))
    """
    labels = labels.long()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel() and labels.max() >= classes:
        raise TensorError(
            "a label names no class", where="labels", found=int(labels.max()), wanted=f"0 to {classes - 1}, or negative"
        )
    return labels.clamp(min=0), labels >= 0


def class_labels(
    labels: Tensor | None, classes: int, method: str, *, others: bool = False, soft: bool = False
) -> tuple[Tensor, Tensor]:
    """``split_labels`` for a loss that has to know the class of each place.

    Args:
        labels: Integers.
        classes: How many.
        method: Who asks, for the error.
        others: It also looks at the other classes, so there must be one.
        soft: Soft labels will do; they name the class that they favour.

    Raises:
        TensorError: No labels, soft labels that will not do, a label that names no class, or no other class.

    >>> class_labels(torch.tensor([1]), 3, "PLD")
    (tensor([1]), tensor([True]))
    """
    if others and classes < 2:
        raise TensorError(f"{method} needs a class beside the target", where="student_logits", found=f"{classes} class")
    if labels is None or (labels.is_floating_point() and not soft):
        found, wanted = "none" if labels is None else f"{list(labels.shape)} {labels.dtype}", "integer labels"
        wanted += " or soft ones" * soft
        raise TensorError(f"{method} needs to know the class", where="labels", found=found, wanted=wanted)
    if labels.is_floating_point():
        labels = labels.argmax(dim=-1)
    return split_labels(labels, classes)


def binary_labels(labels: Tensor | None, logits: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Multi-label targets ``[B, *, C]``, one yes or no a class (0 where it is unknown), and True where it is known.

    A negative entry means that nobody knows whether the sample is of that class; entries between 0 and 1 are soft.
    Values are looked at on the CPU only, as in ``split_labels``.

    Raises:
        TensorError: No labels, labels of another shape than the logits, or an entry above 1.

    >>> binary_labels(torch.tensor([[1.0, 0.0, -1.0]]), torch.zeros(1, 3), "MLD")
    (tensor([[1., 0., 0.]]), tensor([[ True,  True, False]]))
    """
    if labels is None or not labels.is_floating_point() or labels.shape != logits.shape:
        raise TensorError(
            f"{method} needs a yes or no for each class",
            where="labels",
            found="none" if labels is None else f"{list(labels.shape)} {labels.dtype}",
            wanted=f"{list(logits.shape)} floating, from 0 to 1, negative where it is not known",
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel() and labels.max() > 1:
        raise TensorError(
            "a label is neither yes nor no", where="labels", found=float(labels.max()), wanted="at most 1"
        )
    return labels.clamp(min=0), labels >= 0


def soft_labels(labels: Tensor, classes: int) -> Tensor:
    """Integers as shares of one, all zeros where there is no label; soft labels as they are.

    Raises:
        TensorError: A label names no class.

    >>> soft_labels(torch.tensor([1, -100]), classes=2)
    tensor([[0., 1.],
            [0., 0.]])
    """
    if labels.is_floating_point():
        return labels
    target, labelled = split_labels(labels, classes)
    return torch.nn.functional.one_hot(target, classes).float() * labelled.unsqueeze(-1)


def class_means(parts: Iterable[tuple[Tensor, Tensor]], classes: int) -> tuple[Tensor, Tensor]:
    """The mean row of each class, ``[C, D]``, and how many rows it has, ``[C]``; zeros where it has none.

    Args:
        parts: Rows ``[n, D]`` and their classes ``[n]``, part by part; at least one part.
        classes: How many.

    >>> class_means([(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]))], 3)
    (tensor([[2.],
            [5.],
            [0.]]), tensor([2., 1., 0.]))
    """
    totals: Tensor | None = None  # and, in the last column, how many
    for rows, labels in parts:
        ones = torch.nn.functional.pad(rows.detach().float(), (0, 1), value=1.0)
        totals = ones.new_zeros(classes, ones.shape[1]) if totals is None else totals
        totals.index_add_(0, labels, ones)
    if totals is None:
        raise TensorError("there are no rows to take means of", where="labels", found="no part", wanted="one or more")
    return totals[:, :-1] / totals[:, -1:].clamp(min=1), totals[:, -1]
