"""What both fused losses are as operators: sums with their gradients come out, backward only scales."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef

from limbeck.core.errors import TensorError
from limbeck.core.labels import split_labels
from limbeck.core.reduction import fit_mask, widen
from limbeck.kernels import torch_rows, triton_rows
from limbeck.kernels.arguments import check_labels, check_normalizer
from limbeck.kernels.bucket_rows import Labels
from limbeck.kernels.loop import Gradients, RowStep, add_up, kept_dtype

#: Total, divergence and cross-entropy, each summed; gradients of the total by hidden states, weight and bias.
Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
#: An operator waits for a count on the host, which a captured graph cannot.
TAGS: dict[str, Any] = {"tags": torch.Tag.cudagraph_unsafe} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


class FusedLoss(NamedTuple):
    """A loss and its parts.

    Args:
        total: ``weight * divergence + label_weight * cross_entropy``; it carries the gradient.
        divergence: Mean over counted places, :math:`T^2` included; detached.
        cross_entropy: Mean over counted places with a label, 0 without labels; detached.
    """

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor


class Counted(NamedTuple):
    """Which places count, and how sums over them become means."""

    mask: Tensor | None  # [N]
    labels: Tensor | None  # [N]
    label_factor: Tensor | None  # the cross-entropy's weight where the total is a sum
    normalizer: Tensor | float
    label_normalizer: Tensor | float

    def means(self, total: Tensor, divergence: Tensor, cross_entropy: Tensor) -> FusedLoss:
        """From sums."""
        return FusedLoss(
            total / self.normalizer,
            divergence.detach() / self.normalizer,
            cross_entropy.detach() / self.label_normalizer,
        )


def count(
    hidden: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    label_weight: float,
    normalizer: float | Tensor | None,
) -> Counted:
    """Check what says which places count, and count them."""
    places = hidden.detach()[..., 0]
    check_normalizer(normalizer)
    check_labels(labels, label_weight, places.shape)
    mask = None if mask is None else fit_mask(mask, places).reshape(-1)
    labels = None if labels is None else labels.reshape(-1)
    factor = None if labels is None else widen(places.new_empty(0)).new_full((), label_weight)
    if normalizer is not None:
        own = normalizer.detach().reshape(()) if isinstance(normalizer, Tensor) else normalizer
        return Counted(mask, labels, factor, own, own)
    own = max(places.numel(), 1) if mask is None else mask.sum().clamp(min=1)
    if labels is None or factor is None:
        return Counted(mask, None, None, own, 1)
    labelled = (labels >= 0 if mask is None else (labels >= 0) & mask).sum().clamp(min=1)
    return Counted(mask, labels, factor * own / labelled, own, labelled)


def labels_of(labels: Tensor | None, factor: Tensor | None, mask: Tensor | None, classes: int) -> Labels | None:
    """Labels as a chunk's rows take them; those of places that do not count are not looked at."""
    if labels is None or factor is None:
        return None
    if mask is not None:
        labels = labels.masked_fill(~mask, -1)
    target, known = split_labels(labels, classes)
    return Labels(target, known, known * factor)


def run(
    gradients: Gradients, mask: Tensor | None, chunk: int, step: RowStep, weight: float, label_factor: Tensor | None
) -> Sums:
    """An operator's outputs, once it is known what becomes of a chunk; see ``loop.add_up``."""
    places = gradients.head.hidden.shape[0] if mask is None else mask.nonzero().squeeze(1)
    divergence, cross_entropy = add_up(gradients, places, chunk, step)
    total = divergence * weight
    if label_factor is not None:
        total += label_factor * cross_entropy
    return total, divergence, cross_entropy, *gradients.results()


def rows_module(hidden: Tensor) -> ModuleType:
    """Who treats a chunk's rows where these hidden states are."""
    if hidden.is_cuda and triton_rows.AVAILABLE and hidden.dtype != torch.float64:
        return triton_rows
    return torch_rows


def register(operator: CustomOpDef) -> None:
    """Give an operator its shapes and its backward.

    Its first three inputs are the student's hidden states, weight and bias, its last three say which of their
    gradients are wanted.
    """
    operator.register_fake(_shapes)
    operator.register_autograd(_backward, setup_context=_keep)


def _shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Sums:
    """What comes out, without a value."""
    wide = widen(hidden.new_empty(0)).dtype
    sums = [hidden.new_empty((), dtype=wide) for _ in range(3)]
    wants_hidden, wants_weight, wants_bias = others[-3:]
    dtype = kept_dtype(weight.dtype)
    gradients = (
        torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=dtype) if wants_weight else weight.new_empty(0, dtype=dtype),
        weight.new_empty(weight.shape[0], dtype=dtype) if wants_bias else weight.new_empty(0, dtype=dtype),
    )
    return (*sums, *gradients)  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Sums) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])
    ctx.wanted, ctx.others = inputs[-3:], len(inputs) - 3
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]


def _backward(ctx: Any, total: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The kept gradients, scaled. Of all that comes out only the total is ever differentiated."""
    if any(gradient is not None for gradient in others):
        raise TensorError(
            "a fused loss has no second derivative",
            where="total",
            remedy="take the loss from the full logits (limbeck.functional), which autograd differentiates twice",
        )
    scaled: list[Tensor | None] = [None] * 3
    if total is not None:
        for place, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            if ctx.wanted[place]:
                scaled[place] = (gradient * total).to(dtype)
    return (*scaled, *([None] * ctx.others))
