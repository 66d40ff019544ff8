"""Turns what data sets give into batches, and cuts batches into parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from limbeck.core.batch import Batch, map_tensors
from limbeck.core.errors import DataError

_LABELS, _INDEX, _INPUTS = ("labels", "label", "target", "targets"), ("index",), ("inputs", "image", "images")


def to_batch(item: Any) -> Batch:
    """Read a collated item.

    ========================  =======================================================================================
    item                      becomes
    ========================  =======================================================================================
    :class:`Batch`            itself
    tensor                    ``inputs``
    ``(x, labels)``           ``inputs`` and ``labels``; labels that are numbers are made a tensor
    ``(x, labels, index)``    the same with sample ids, where the third is ``[B]`` integers
    dict                      ``label``, ``labels``, ``target`` or ``targets``; ``index``; ``mask``; what is left is the
                              inputs: keywords for the model, or the value itself if it is called ``inputs`` or
                              ``image``
    anything else             ``inputs`` (a graph, say), with ``labels`` from its attribute ``y`` if it has one
    ========================  =======================================================================================
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        return Batch(item)
    if isinstance(item, (list, tuple)):
        if len(item) == 2:
            return Batch(item[0], _labels(item[1]))
        if len(item) == 3 and isinstance(item[2], Tensor) and item[2].ndim == 1 and not item[2].is_floating_point():
            return Batch(item[0], _labels(item[1]), index=item[2].long())
        raise DataError(
            "the data set's items cannot be read",
            where="data",
            found=f"a tuple of {len(item)}",
            wanted="(inputs, labels) or (inputs, labels, index)",
            remedy="return a dict, or give a collate_fn that returns limbeck.Batch",
        )
    if isinstance(item, Mapping):
        rest = dict(item)
        labels, index = _take(rest, _LABELS), _take(rest, _INDEX)
        mask = rest.pop("mask", None)
        inputs = next(iter(rest.values())) if len(rest) == 1 and next(iter(rest)) in _INPUTS else rest
        return Batch(inputs, _labels(labels), index=None if index is None else index.long(), mask=mask)
    return Batch(item, _labels(getattr(item, "y", None)))


def _take(values: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((values.pop(name) for name in names if name in values), None)


def _labels(labels: Any) -> Tensor | None:
    if labels is None or isinstance(labels, Tensor):
        return labels
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            "labels cannot be made a tensor", where="labels", found=type(labels).__name__, wanted="integers or a tensor"
        ) from error


def part_of(batch: Batch, part: slice | Tensor) -> Batch:
    """Some samples of a batch: every tensor in it with one row a sample is cut, whatever holds it."""
    size = batch.size
    if isinstance(part, slice) and (part.start, part.stop) == (0, size):
        return batch
    if not isinstance(batch.inputs, (Tensor, Mapping, list, tuple)):
        raise DataError(
            "these inputs cannot be cut into parts",
            where="batch.inputs",
            found=type(batch.inputs).__name__,
            wanted="tensors, or dicts or tuples of them",
            remedy="use one process and no gradient accumulation, or pass the data set instead of a DataLoader",
        )

    def rows(tensor: Tensor) -> Tensor:
        return tensor[part] if tensor.ndim and tensor.shape[0] == size else tensor

    kept = ("progress", "totals")  # of the step, not of a sample
    return batch.replace(
        **{f.name: map_tensors(getattr(batch, f.name), rows) for f in fields(batch) if f.name not in kept}
    )


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in inner for tensor in tensors_in(part)]


def labels_of(dataset: Any) -> Tensor | None:
    """All labels of a data set by index, where it can tell without reading the samples: ``targets`` or ``labels``."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(d) for d in dataset.datasets]
        known = [p for p in parts if p is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) == 2 else None
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if isinstance(values, (list, tuple, Tensor)) or hasattr(values, "__array__"):
            try:
                labels = torch.as_tensor(values)
            except (TypeError, ValueError, RuntimeError):
                continue  # not numbers: such as boxes of a detection set
            if labels.ndim and len(labels) == len(dataset):
                return labels
    return None


def class_names_of(dataset: Any) -> tuple[str, ...] | None:
    """The data set's ``classes``, where it has them as torchvision's sets do."""
    dataset = getattr(dataset, "dataset", dataset)
    names = getattr(dataset, "classes", None)
    return tuple(str(n) for n in names) if isinstance(names, (list, tuple)) and names else None
