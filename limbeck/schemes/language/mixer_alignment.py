"""Losses between a teacher's layers and those of a student that read the same: token-mixing matrices, hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import check_same_shape, reduce, widen
from limbeck.core.trace import Trace


def mixing_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    r"""Distance of token-mixing matrices, :math:`\| M_S - A_T \|_F^2 / (H L^2)`, the mean over layers.

    Of texts of different lengths the mean is one over tokens: each row's error is divided by its text's own length L.

    Args:
        student, teacher: ``[B, H, L, L]`` of each layer.
        mask: ``[B, L]``, True where there is a token.

    Source: MOHAWK, arXiv 2408.10189, its first stage.

    >>> eye = torch.eye(2).view(1, 1, 2, 2)
    >>> mixing_loss([eye], [torch.zeros_like(eye)], torch.ones(1, 2, dtype=torch.bool))
    tensor(0.5000)
    """
    own = mask.sum(dim=1, keepdim=True).clamp(min=1)
    nothing = ~(mask[:, None, :, None] & mask[:, None, None, :])
    total = student[0].new_zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        check_same_shape(theirs, ours, "teacher_attention", "student_matrix")
        apart = (widen(ours) - widen(theirs.detach())).masked_fill(nothing, 0.0)  # padding may say anything, also NaN
        rows = apart.square().sum(-1).mean(dim=1)  # [B, L]
        total = total + reduce(rows / own, mask)
    return total / len(student)


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    r"""Distance of hidden states, :math:`\| h_S - h_T \|_2^2 / D`, the mean over tokens and layers.

    Args:
        student, teacher: ``[B, L, D]`` of each layer.
        mask: ``[B, L]``, True where there is a token.

    Source: MOHAWK, arXiv 2408.10189, its second stage, squared.

    >>> hidden_loss([torch.ones(1, 2, 4)], [torch.zeros(1, 2, 4)], torch.tensor([[True, False]]))
    tensor(1.)
    """
    total = student[0].new_zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        check_same_shape(theirs, ours, "teacher_state", "student_state")
        total = total + reduce((widen(ours) - widen(theirs.detach())).square().mean(-1), mask)
    return total / len(student)


def tokens_of(batch: Batch) -> Tensor:
    """``[B, L]``, True where a batch of texts has a token.

    Raises:
        ConfigError: It is of packs.
    """
    if isinstance(batch.extras.get("tokens"), Tensor):
        return batch.extras["tokens"]
    if "document" in batch.extras or not isinstance(batch.inputs, Mapping) or "input_ids" not in batch.inputs:
        found = "packs" if "document" in batch.extras else type(batch.inputs).__name__
        remedy = "set pack: false"
        raise ConfigError("a recurrence reads one text in a row", where="data.options.pack", found=found, remedy=remedy)
    there = batch.inputs.get("attention_mask")
    return torch.ones_like(batch.inputs["input_ids"], dtype=torch.bool) if there is None else there > 0


class _OfLayers(Objective):
    contract = Contract(normalizer="tokens", mask=True)
    kind = ""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.student_taps = tuple(f"{self.kind}:{i}" for i in range(depth))

    def both(self, student: Trace, teacher: Trace, end: str) -> tuple[list[Tensor], list[Tensor]]:
        """What student and teacher said of each layer."""
        layers = range(self.depth)
        return [student[f"{self.kind}:{i}"] for i in layers], [teacher[f"model.layers.{i}{end}"] for i in layers]


class MixingMatrices(_OfLayers):
    """:func:`mixing_loss` of all layers of a Llama-style teacher."""

    kind = "mixing"

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.teacher_taps = tuple(f"model.layers.{i}{end}" for i in range(depth) for end in ("@in", ".self_attn[1]"))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return mixing_loss(*self.both(student, teacher, ".self_attn[1]"), tokens_of(batch))


class HiddenStates(_OfLayers):
    """:func:`hidden_loss` of all layers of a Llama-style teacher."""

    kind = "hidden"

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.teacher_taps = tuple(f"model.layers.{i}{end}" for i in range(depth) for end in ("@in", ""))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return hidden_loss(*self.both(student, teacher, ""), tokens_of(batch))
