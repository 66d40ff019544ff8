"""Soft masks over a map: what losses share that compare features region by region."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.layout import to_tokens
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.projectors import ConvProjector
from limbeck.core.reduction import check_floating, reduce, widen
from limbeck.core.trace import Trace


def masked_mean(squares: Tensor, masks: Tensor) -> Tensor:
    r"""Squares under soft masks, by the masks' mass: :math:`\sum_i M_{k,i}^2 q_i / \sum_i M_{k,i}`.

    Args:
        squares: ``[B, N]`` squared gaps :math:`q`.
        masks: ``[B, K, N]``, not negative.

    Returns:
        ``[B, K]``; 0 where a mask is 0 everywhere.

    >>> masked_mean(torch.tensor([[4.0, 9.0]]), torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]))
    tensor([[4.0000, 3.2500]])
    """
    masks = widen(masks)
    share = masks / masks.sum(dim=2, keepdim=True).clamp(min=1e-12)
    return ((share * masks) @ squares.to(masks.dtype).unsqueeze(2)).squeeze(2)


def check_masks(masks: Tensor, places: tuple[int, ...], name: str) -> None:
    """Refuse masks ``[B, K, *]`` that do not lie over these places, ``[B, *]``."""
    check_floating(masks, name, least=3)
    if (masks.shape[0], *masks.shape[2:]) != tuple(places):
        raise TensorError(
            "these masks lie elsewhere",
            where=name,
            found=list(masks.shape),
            wanted=f"[{places[0]}, K, {', '.join(map(str, places[1:]))}]",
        )


def overlap(masks: Tensor) -> Tensor:
    r"""How much the masks of a sample lie over one another: the mean Dice coefficient of its pairs.

    .. math:: \frac{1}{K (K - 1)} \sum_{j \ne k} \frac{2 M_j \cdot M_k}{\|M_j\|^2 + \|M_k\|^2}

    Args:
        masks: ``[B, K, *]``.

    Returns:
        ``[B]``: 1 where all are equal, 0 where none touch or there is only one.

    >>> overlap(torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]))
    tensor([0.3333])
    """
    rows = widen(masks).flatten(2)
    number = rows.shape[1]
    square = rows.square().sum(dim=2)
    dice = 2 * (rows @ rows.mT) / (square.unsqueeze(1) + square.unsqueeze(2)).clamp(min=1e-12)
    pairs = 1 - torch.eye(number, device=rows.device, dtype=rows.dtype)
    return (dice * pairs).sum(dim=(1, 2)) / max(number * (number - 1), 1)


def in_places(feature: Tensor) -> Tensor:
    """A feature as a map: maps stay, tokens ``[B, N, D]`` (all of them) become a row ``[B, D, 1, N]``."""
    return to_tokens(feature, "teacher_feature").mT.unsqueeze(2) if feature.ndim != 4 else feature


class ReceptiveTokens(nn.Module):
    """Learned vectors, each of which marks a region of a map: the places where its product with the feature is large.

    Args:
        width: Channels of the map.
        number: How many.

    >>> tokens = ReceptiveTokens(8, 3)
    >>> tokens.masks(torch.zeros(2, 8, 4, 4)).shape, tokens.weights(torch.zeros(2, 8, 4, 4)).shape
    (torch.Size([2, 3, 4, 4]), torch.Size([2, 3]))
    """

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(0.01 * torch.randn(number, width))
        self.look, self.rate = ConvProjector(width, width, 3, padding=1), nn.Linear(width, number)
        for layer, outputs in ((self.look, 9 * width), (self.rate, number)):
            nn.init.normal_(layer.weight, std=(2 / outputs) ** 0.5)
            nn.init.constant_(layer.get_parameter("bias"), 0.0)

    def masks(self, feature: Tensor) -> Tensor:
        """Where each looks: ``[B, K, H, W]`` from ``[B, C, H, W]``."""
        return (self.tokens @ feature.to(self.tokens.dtype).flatten(2)).sigmoid().unflatten(2, feature.shape[2:])

    def weights(self, feature: Tensor) -> Tensor:
        """How much each counts: ``[B, K]``, of sum 1."""
        return self.rate(self.look(feature).mean(dim=(2, 3))).softmax(dim=1)


class Receptors(Objective):
    """The tokens, and what they learn from: the teacher, seen through the masks, should still say what it says.

    The first stage of masked distillation, where a scheme has two. Its parts: the divergence of what the teacher's
    classifier makes of the masked feature from the teacher's own answer, and the masks' overlap.
    """

    contract = Contract(at_equal=None)
    tokens: ReceptiveTokens | None

    def __init__(self, teacher_tap: str, number: int) -> None:
        super().__init__()
        self.tap, self.number, self.tokens = teacher_tap, number, None
        self.teacher_taps = (teacher_tap, "logits", "logits@weight", "logits@bias")

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        feature, head = in_places(teacher[self.tap]), teacher["logits@weight"]
        if head.shape[1] != feature.shape[1]:
            raise ConfigError(
                "the tokens learn from what the classifier makes of a layer, and this one has another width",
                where="teacher_tap",
                found=f"{feature.shape[1]} channels in {self.tap}",
                wanted=f"{head.shape[1]}, as the classifier takes",
                remedy="name the last layer before the classifier",
            )
        self.tokens = ReceptiveTokens(feature.shape[1], self.number).to(feature.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        feature, tokens = in_places(teacher[self.tap].detach()), self.ready("tokens")
        masks = tokens.masks(feature)
        seen = feature * torch.einsum("bk,bkhw->bhw", tokens.weights(feature), masks).unsqueeze(1)
        answer, head, bias = (teacher[t].detach() for t in self.teacher_taps[1:])
        told = seen.flatten(2).mT @ head.to(seen.dtype).mT + bias  # by place, [B, N, C]; it commutes with pooling
        if answer.ndim == 2:
            told = told.mean(dim=1)
        kept = kl_rows(soften(answer), soften(told)).reshape(len(told), -1).mean(dim=1)
        return {"kept": reduce(kept), "overlap": reduce(overlap(masks))}
