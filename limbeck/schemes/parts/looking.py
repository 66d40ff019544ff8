"""What schemes that choose data ask for: samples again in another view, and what a model says of a whole set."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.core.ranks import as_on_first, world_size
from limbeck.core.teacher import FrozenTeacher, Teacher
from limbeck.data.loader import IndexedLoader, Loader
from limbeck.data.stream import StreamLoader


def indexed(loader: Loader | None, who: str) -> IndexedLoader:
    """A loader whose samples can be asked for by id.

    Raises:
        DataError: It is another kind.
    """
    if not isinstance(loader, IndexedLoader):
        raise DataError(
            f"{who} asks for samples by their ids",
            where="data",
            found="none" if loader is None else type(loader).__name__,
            remedy="give a map-style data set, or tensors",
        )
    return loader


def seen_again(loader: IndexedLoader, index: Tensor, view: int) -> Batch:
    """These samples in one view, whatever the order and the batches of an epoch are.

    Args:
        loader: Of the set.
        index: ``[B]`` ids.
        view: Which; any integer.

    >>> from limbeck.data.resident import ResidentLoader
    >>> loader = ResidentLoader(torch.arange(10.0).view(5, 2), batch_size=2)
    >>> seen_again(loader, torch.tensor([3, 0]), 7).inputs
    tensor([[6., 7.],
            [0., 1.]])
    """
    if isinstance(loader, StreamLoader) and loader.workers:
        loader = copy.copy(loader)
        loader.workers = 0  # starting workers for one batch takes longer than the batch
    return next(iter(loader.read([[(index, view)]])))


@torch.no_grad()
def said_of_all(
    teacher: Teacher, loader: IndexedLoader, taps: Iterable[str] = ("logits",), device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """What a model says of every sample of a set, without augmentation, by id on the CPU.

    Args:
        teacher: Who is asked; a model as ``FrozenTeacher``, whose hooks are taken off again.
        loader: Of the set; one of chosen samples is asked for these, in the order of their ids' places.
        taps: What is wanted, each a tensor with a row a sample.
        device: Where the model works.

    Returns:
        Each tap's values, and ``"index"``: the ids that its rows are of.
    """
    names, found, ids = tuple(taps), dict[str, list[Tensor]](), list[Tensor]()
    teacher.to(device)
    teacher.attach(names, loader.example(2).to(device))
    try:
        for batch in loader.plain():
            batch = batch.to(device)
            trace = teacher(batch)
            for name in names:
                found.setdefault(name, []).append(trace[name].detach().float().cpu())
            ids.append(batch.require("index").cpu())
    finally:
        if isinstance(teacher, FrozenTeacher) and teacher.listener is not None:
            teacher.listener.close()
            teacher.listener = None
    return {**{name: torch.cat(parts) for name, parts in found.items()}, "index": torch.cat(ids)}


def as_first_found(value: Tensor) -> Tensor:
    """What the first process found, of the same shape on all: ranks' models differ in the statistics of their batches.

    >>> as_first_found(torch.tensor([2.0]))
    tensor([2.])
    """
    if world_size() == 1:
        return value
    talks = None if "gloo" in torch.distributed.get_backend() else torch.accelerator.current_accelerator()
    found = value.to(talks or value.device, copy=True)
    as_on_first([found])
    return found.to(value.device)


def need_labels(loader: IndexedLoader, who: str) -> Tensor:
    """The classes ``[N]`` of all samples, on the CPU; negative where one has none.

    Raises:
        DataError: Not one class a sample.
    """
    labels = loader.labels
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        raise DataError(
            f"{who} needs to know a class for every sample",
            where="data.labels",
            found="none" if labels is None else f"{list(labels.shape)} {labels.dtype}",
            wanted="[N] integers, negative where a sample has none",
        )
    return labels.cpu()


class Unlabelled(Distiller):
    """A student that is told no label."""

    def made(self, batch: Batch) -> Batch:
        return batch.replace(labels=None)


def only_teacher(loss: Terms, who: str) -> Terms:
    """A loss that learns from the teacher alone.

    Raises:
        ConfigError: Some term learns from the labels.
    """
    others = [name for name, objective, _ in loss.items() if not objective.teacher_taps]
    if others:
        raise ConfigError(
            f"{who} learns from the teacher alone, and this term asks no teacher",
            where=f"loss.{others[0]}",
            found=", ".join(loss.names),
            remedy="leave it out, such as loss={kd: {temperature: 1}}",
        )
    return loss


def whole_batches(accumulate: int, who: str, why: str) -> None:
    """Refuse micro-batches.

    Raises:
        ConfigError: A step is cut into several.
    """
    if accumulate > 1:
        raise ConfigError(
            f"{who} {why}, so a step cannot be cut into parts",
            where="train.accumulate",
            found=accumulate,
            wanted="1",
        )
