"""Specialists, each for some of the classes: a sample's label tells who is asked about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, map_tensors
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.reduction import check_positive, widen
from limbeck.core.teacher import Teacher, as_teacher
from limbeck.core.trace import Trace

NEVER = -1e4  # the logit of what is never so: its probability is 0 in every precision


class VerticalTeachers:
    """Answers as one model over all classes: a class's logit is that of the specialist whom the label asks.

    Classes beside a specialist's ``most`` likeliest, and all classes of others, have probability 0 (of a yes). A sample
    of several labels asks every specialist that has one of them; one without labels nobody.

    Args:
        members: Modules or teachers, whose logits are of their own classes ``[B, V]``, or of all ``[B, N]``.
        verticals: The classes of each.
        most: How many classes of an answer count.

    Raises:
        ConfigError: There are not as many specialists as verticals.

    >>> teacher = VerticalTeachers([nn.Linear(2, 2), nn.Linear(2, 1)], [[0, 2], [1]])
    >>> batch = Batch(torch.ones(2, 2), torch.tensor([1, 2]))
    >>> teacher.attach(("logits",), batch)
    >>> teacher(batch).logits > NEVER
    tensor([[False,  True, False],
            [ True, False,  True]])
    """

    def __init__(
        self, members: Iterable[nn.Module | Teacher], verticals: Sequence[Sequence[int]], most: int = 100
    ) -> None:
        check_positive(most, "most")
        self.members = tuple(as_teacher(member) for member in members)
        if len(self.members) != len(verticals):
            raise ConfigError(
                "every vertical has its specialist", where="teachers", found=len(self.members), wanted=len(verticals)
            )
        self.places = [torch.tensor(list(one)) for one in verticals]
        self.count, self.most = sum(len(one) for one in verticals), most
        self.owner = torch.empty(self.count, dtype=torch.long)
        for number, places in enumerate(self.places):
            self.owner[places] = number

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        for member in self.members:
            member.attach(("logits",), batch)

    @torch.compiler.disable
    def __call__(self, batch: Batch) -> Trace:
        asked = self.asked(batch.require("labels"))
        found: Tensor | None = None
        for number, member in enumerate(self.members):
            rows = asked[:, number].nonzero().flatten()
            if not len(rows):
                continue
            said = widen(self._own(member(_only(batch, rows, len(asked))).logits, number))
            kept = said.topk(min(self.most, said.shape[1]), dim=1)
            said = torch.full_like(said, NEVER).scatter(1, kept.indices, kept.values)
            found = said.new_full((len(asked), self.count), NEVER) if found is None else found
            found[rows.unsqueeze(1), self.places[number].to(rows.device)] = said
        if found is None:
            found = torch.full((len(asked), self.count), NEVER, device=asked.device)
        return Trace(None, {"logits": found})

    def asked(self, labels: Tensor) -> Tensor:
        """Who is asked about each sample, ``[B, M]`` booleans."""
        owner = self.owner.to(labels.device)
        if labels.is_floating_point():
            if labels.ndim != 2 or labels.shape[1] != self.count:
                wanted = f"[B] integers, or [B, {self.count}] floating"
                raise TensorError(
                    "labels are of other classes", where="labels", found=list(labels.shape), wanted=wanted
                )
            hits = torch.zeros(len(labels), len(self.members), device=labels.device)
            return hits.index_add(1, owner, (labels > 0.5).to(hits.dtype)) > 0
        if labels.ndim != 1 or (labels.device.type == "cpu" and len(labels) and int(labels.max()) >= self.count):
            wanted = f"[B] integers below {self.count}"
            raise TensorError("labels are of other classes", where="labels", found=list(labels.shape), wanted=wanted)
        own = torch.where(labels >= 0, owner[labels.clamp(min=0)], -1)
        return own.unsqueeze(1) == torch.arange(len(self.members), device=labels.device)

    def _own(self, said: Tensor, number: int) -> Tensor:
        """A specialist's logits of its own classes."""
        places = self.places[number]
        if said.ndim == 2 and said.shape[1] == len(places):
            return said
        if said.ndim != 2 or said.shape[1] != self.count:
            wanted = f"[B, {len(places)}] of its own classes, or [B, {self.count}] of all"
            raise TensorError("a specialist answers", where="teacher_logits", found=list(said.shape), wanted=wanted)
        return said[:, places.to(said.device)]

    def to(self, device: torch.device | str) -> VerticalTeachers:
        for member in self.members:
            member.to(device)
        return self

    def shares_with(self, modules: Iterable[nn.Module]) -> bool:
        """Whether any of these modules is part of a specialist."""
        known = list(modules)
        return any(shares(known) for m in self.members if (shares := getattr(m, "shares_with", None)) is not None)


def _only(batch: Batch, rows: Tensor, count: int) -> Batch:
    """Some samples of a batch."""

    def some(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)] if tensor.ndim and len(tensor) == count else tensor

    names = ("inputs", "labels", "index", "mask", "teacher_inputs", "view")
    return batch.replace(**{name: map_tensors(getattr(batch, name), some) for name in names}, extras={}, totals={})
