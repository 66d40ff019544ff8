"""How a loss over many places becomes one number, and what a loss may be given. Every functional loss ends here."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError

Reduction = Literal["mean", "sum", "none"]


def reduce(values: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    r"""Reduce per-place losses over the places that count.

    .. math:: \text{mean} = \frac{\sum_i m_i v_i}{\max(\sum_i m_i, 1)}

    A place whose mask is False contributes nothing, also where its value is NaN or infinite; a batch with no counted
    place gives 0, so that an empty micro-batch adds nothing.

    Args:
        values: ``[B, *]`` losses.
        mask: ``[B, *]`` booleans, True where a place counts; a prefix of the shape (``[B]`` for ``[B, T]``) is enough.
        reduction: ``"mean"`` over counted places, ``"sum"``, or ``"none"`` (masked places are 0).

    Raises:
        TensorError: The mask is not boolean or its shape does not fit.
        ConfigError: An unknown reduction.

    >>> reduce(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    if mask is not None:
        mask = fit_mask(mask, values)
        values = values.masked_fill(~mask, 0.0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction != "mean":
        raise ConfigError(
            "no such reduction", where="reduction", found=repr(reduction), wanted="'mean', 'sum' or 'none'"
        )
    return values.mean() if mask is None else values.sum() / mask.sum().clamp(min=1)


def fit_mask(mask: Tensor, values: Tensor) -> Tensor:
    """Check a mask against per-place values and spread it over trailing dimensions."""
    if mask.dtype != torch.bool:
        raise TensorError("a mask is boolean", where="mask", found=str(mask.dtype), wanted="torch.bool (True: counts)")
    if mask.ndim > values.ndim or mask.shape != values.shape[: mask.ndim]:
        raise TensorError(
            "the mask does not fit the loss", where="mask", found=list(mask.shape), wanted=list(values.shape)
        )
    return mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim)).expand(values.shape)


def widen(tensor: Tensor) -> Tensor:
    """Half precision as float32, anything wider as it is: sums and exponentials of a loss need the digits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def check_logits(student_logits: Tensor, teacher_logits: Tensor | None = None, labels: Tensor | None = None) -> None:
    """Refuse logits that are not floating ``[B, *, C]`` of one shape, and labels that do not belong to them.

    Labels may be integers ``[B, *]`` or floating ``[B, *, C]``.
    """
    check_floating(student_logits, "student_logits", least=2)
    if teacher_logits is not None:
        check_floating(teacher_logits, "teacher_logits", least=2)
        check_same_shape(student_logits, teacher_logits, "student_logits", "teacher_logits")
    if labels is not None:
        wanted = student_logits.shape if labels.is_floating_point() else student_logits.shape[:-1]
        if labels.shape != wanted:
            raise TensorError(
                "labels do not belong to these logits",
                where="labels",
                found=f"{list(labels.shape)} {labels.dtype}",
                wanted=f"{list(student_logits.shape[:-1])} integers or {list(student_logits.shape)} soft labels",
            )


def check_features(student_feature: Tensor, teacher_feature: Tensor, least: int = 2) -> None:
    """Refuse features that are not floating tensors of one shape."""
    check_floating(student_feature, "student_feature", least)
    check_floating(teacher_feature, "teacher_feature", least)
    check_same_shape(teacher_feature, student_feature, "teacher_feature", "student_feature")


def check_floating(tensor: Tensor, name: str, least: int = 1) -> None:
    """Refuse what is not a floating-point tensor with at least ``least`` dimensions."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim < least:
        found = f"{list(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TensorError(
            "wrong kind of tensor", where=name, found=found, wanted=f"a floating tensor of {least} or more dimensions"
        )


def check_same_shape(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    """Refuse two tensors that should match and do not."""
    if first.shape != second.shape:
        raise TensorError(
            f"{first_name} and {second_name} differ in shape",
            where=second_name,
            found=list(second.shape),
            wanted=f"{list(first.shape)} as {first_name}",
        )


def check_positive(value: float, name: str) -> None:
    """Refuse a setting that must be above zero, and finite."""
    if not 0 < value < math.inf:
        raise ConfigError("must be above zero" + " and finite" * (value == math.inf), where=name, found=value)


def check_inside(
    value: float, name: str, low: float = 0.0, high: float = 1.0, remedy: str | None = None, *, closed: bool = False
) -> None:
    """Refuse a setting that must lie between two bounds and reach neither; ``closed``: it may reach both."""
    if not (low <= value <= high if closed else low < value < high):
        raise ConfigError(f"must lie between {low:g} and {high:g}", where=name, found=value, remedy=remedy)
