"""What one step sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import DataError
from limbeck.core.reduction import fit_mask

Unit = str  # "samples", "positions", "labels", or the name of a mask in a batch's extras (boxes, aligned tokens)


@dataclass
class Batch:
    """What one step sees: inputs, and everything a loss may ask about them.

    ``totals`` makes a loss independent of how its batch was cut: it holds, for each unit, how many there are in the
    whole optimizer step (all micro-batches, all ranks). Empty means that this batch is the whole step.

    Shapes: ``B`` samples; ``*`` the positions of a sample (tokens, pixels, nodes; none for a plain classifier).

    Args:
        inputs: Whatever the model takes: a tensor, a tuple (positional), a dict (keywords), a graph.
        labels: ``[B, *]`` integers (negative: this position has no label), ``[B, *, C]`` soft labels, or targets.
        index: ``[B]`` stable sample ids; memory banks and caches key on them.
        view: Which view of its sample each is, ``[B]`` integers, or one number for all; caches key on it too.
        mask: ``[B, *]`` booleans, True where a position counts. ``None``: all count.
        progress: 0 at the start of training, 1 at its end; a 0-d tensor keeps compiled graphs from being rebuilt.
        teacher_inputs: What the teacher sees where that differs from ``inputs`` (another tokenizer, the edges).
        totals: Counts in the whole optimizer step, by unit.
        extras: Anything else a collator wants to hand to an objective or scheme, by name.
    """

    inputs: Any
    labels: Tensor | None = None
    index: Tensor | None = None
    mask: Tensor | None = None
    progress: float | Tensor = 0.0
    teacher_inputs: Any = None
    totals: Mapping[str, Tensor | float] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    view: int | Tensor | None = None

    @property
    def size(self) -> int:
        """Samples in this batch."""
        for value in (self.labels, self.index, self.mask):
            if value is not None and value.ndim:
                return value.shape[0]
        return batch_size_of(self.inputs)

    def count(self, unit: Unit) -> Tensor | int:
        """How many samples, positions or labels of this batch count; a sample does where any of its places does."""
        if unit == "samples":
            return self.size if self.mask is None else self.mask.reshape(len(self.mask), -1).any(dim=1).sum()
        if unit == "positions":
            if self.mask is not None:
                return self.mask.sum()
            # Without a mask, labels tell how many positions there are: micro-batches of tokens differ in length.
            labels = self.labels
            return self.size if labels is None or labels.is_floating_point() else labels.numel()
        if unit != "labels":
            places = self.extras.get(unit)
            if isinstance(places, Tensor) and places.dtype == torch.bool:
                return places.sum()
            raise DataError(
                "no such unit",
                where="normalizer",
                found=repr(unit),
                wanted="'samples', 'positions' or 'labels', or a mask of that name in batch.extras",
            )
        labels = self.require("labels")
        if labels.is_floating_point():
            return self.count("positions")
        valid = labels >= 0
        if self.mask is not None and self.mask.ndim <= valid.ndim:  # else the mask is of places inside a sample
            valid = valid & fit_mask(self.mask, valid)
        return valid.sum()

    def share(self, unit: Unit) -> Tensor | float:
        """This batch's part of the step, ``count / total``: turns a mean over it into its part of the step's mean."""
        if not self.totals:
            return 1.0
        if unit not in self.totals:
            raise DataError(
                "this unit was not counted over the step",
                where="batch.totals",
                found=f"counts of {', '.join(sorted(self.totals))}",
                wanted=unit,
                remedy="add up batch.count(unit) over all micro-batches and ranks, for the unit of every objective",
            )
        return self.count(unit) / self.totals[unit]

    def require(self, name: str) -> Tensor:
        """The named field, or an error that says who must give it."""
        value = getattr(self, name)
        if value is None:
            raise DataError(
                f"this objective needs {name}, and the batch has none",
                where=f"batch.{name}",
                remedy=f"give {name} in the Batch, or use a data source that has them",
            )
        return value

    def replace(self, **changes: Any) -> Batch:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """A copy with every tensor on a device."""
        moved = {
            f.name: map_tensors(getattr(self, f.name), lambda t: t.to(device, non_blocking=non_blocking))
            for f in fields(self)
        }
        return Batch(**moved)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts, and in graphs that have ``apply``.

    A module is left as it is: what it holds is its own.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        mapped = {k: map_tensors(v, function) for k, v in value.items()}
        return mapped if type(value) is dict else type(value)(mapped)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, function) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(v, function) for v in value)
    if isinstance(value, torch.nn.Module):
        return value
    if hasattr(value, "apply") and hasattr(value, "to"):  # graphs of PyTorch Geometric
        return value.clone().apply(function) if hasattr(value, "clone") else value.apply(function)
    return value


def batch_size_of(inputs: Any) -> int:
    """The length of the first tensor found in the inputs."""
    if isinstance(inputs, Tensor) and inputs.ndim:
        return inputs.shape[0]
    for value in (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (list, tuple)) else ()
    ):
        if isinstance(value, (Tensor, Mapping, list, tuple)):
            return batch_size_of(value)
    if hasattr(inputs, "num_graphs"):
        return int(inputs.num_graphs)
    raise DataError(
        "the batch's size cannot be told",
        where="batch.inputs",
        found=type(inputs).__name__,
        wanted="a tensor, a dict or tuple of tensors, or labels or index beside it",
    )
