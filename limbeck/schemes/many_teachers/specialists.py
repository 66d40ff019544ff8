"""Specialists: a masked copy of a teacher for each masked layer, a router that picks among them, what they teach."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError
from limbeck.core.ranks import mean_of_rows
from limbeck.core.survey import call_model
from limbeck.core.teacher import FrozenTeacher, teacher_inputs
from limbeck.core.trace import logits_of
from limbeck.schemes.many_teachers.masking import MaskNet, inserted, maskable

Way = Literal["top", "gated", "mixed"]
Balance = Literal["kl", "cv"]


def routed_rows(student: Tensor, experts: Tensor, gates: Tensor, k: int, temperature: float, way: Way) -> Tensor:
    r"""Divergence of each sample from the experts that its router picks.

    Args:
        student: Logits ``[B, C]``.
        experts: ``[W, B, C]``; detached.
        gates: ``[B, W]``, rows sum to one.
        k: Experts a sample.
        temperature: T.
        way: ``"top"``: mean over the k best; ``"gated"``: the same weighted by their gates; ``"mixed"``: from the mean
            of all experts' logits by their gates, detached.

    >>> routed_rows(torch.zeros(1, 2), torch.zeros(3, 1, 2), torch.tensor([[0.2, 0.5, 0.3]]), 1, 4.0, "top")
    tensor([0.])
    """
    log_q, experts = soften(student, temperature), experts.detach()
    if way == "mixed":
        mean = (gates.detach().T.unsqueeze(-1) * experts).sum(dim=0)
        return temperature**2 * kl_rows(soften(mean, temperature), log_q)
    values = temperature**2 * kl_rows(soften(experts, temperature), log_q.expand_as(experts))
    best = gates.topk(k, dim=1)
    chosen = values.T.gather(1, best.indices)
    return (best.values * chosen).sum(dim=1) if way == "gated" else chosen.mean(dim=1)


def imbalance(gates: Tensor, balance: Balance = "kl") -> Tensor:
    r"""How unevenly the batch of all ranks asks its experts: 0 where the mean gate is uniform.

    .. math:: \frac 1 W \mathrm{KL}(u \| \bar g) \quad \text{or} \quad \mathrm{std}(\bar g) / \mathrm{mean}(\bar g)

    >>> imbalance(torch.tensor([[0.9, 0.1]]))
    tensor(0.2554)
    """
    mean = mean_of_rows(gates)
    if balance == "cv":
        return mean.std() / mean.mean()
    return kl_rows(torch.full_like(mean, 1 / len(mean)).log(), mean.log()) / len(mean)


class Crew(nn.Module):
    """Copies of the teachers, the masks that make specialists of them, and the router.

    Args:
        teachers: By name.
        layers: How many masks a teacher has, behind its last layers; or names of layers, of all teachers.
        sees: What each reads of ``teacher_inputs``, by name: a key or position, a list of these, or all.
        heads, shrink: Of masks.
    """

    def __init__(
        self,
        teachers: Mapping[str, FrozenTeacher],
        layers: int | list[str],
        sees: Mapping[str, str | int | list[str | int]],
        *,
        heads: int = 3,
        shrink: int = 2,
    ) -> None:
        super().__init__()
        self.layers, self.sees, self.heads, self.shrink = layers, sees, heads, shrink
        self.names = list(teachers)
        self.where = [teacher.where for teacher in teachers.values()]
        self.models = nn.ModuleList(copy.deepcopy(teacher.model) for teacher in teachers.values())
        for model in self.models:
            for module in model.modules():  # nobody's hooks, which belong to who listens to the teacher itself
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
        self.masks, self.router = nn.ModuleList(), nn.Sequential()
        self.at: list[tuple[int, str]] = []  # which teacher, and behind which layer

    def build(self, batch: Batch, classes: int) -> None:
        """Size masks and router from an example, once."""
        if self.at:
            return
        masks, at = nn.ModuleList(), []  # all or none: one that cannot be masked leaves nothing half built
        for number, model in enumerate(self.models):
            for place in maskable(model, self.view(batch, number), self.layers, self.names[number]):
                shape = place.shape or ()
                maps = len(shape) == 4
                width = shape[1] if maps else shape[-1]
                masks.append(MaskNet(width, maps=maps, heads=self.heads, shrink=self.shrink))
                at.append((number, place.name))
        self.masks, self.at = masks, at
        self.router = nn.Sequential(nn.Linear(classes, 2 * classes), nn.Linear(2 * classes, len(self.at)))

    def view(self, batch: Batch, number: int) -> Any:
        """What one teacher reads of a batch."""
        inputs, wanted = teacher_inputs(batch), self.sees.get(self.names[number])
        if wanted is None:
            return inputs
        try:
            if not isinstance(wanted, list):
                return inputs[wanted]  # type: ignore[index]
            parts = [inputs[one] for one in wanted]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            where = f"scheme.sees.{self.names[number]}"
            raise ConfigError("the teacher's inputs have no such part", where=where, found=wanted) from None
        return dict(zip(wanted, parts, strict=True)) if isinstance(inputs, dict) else tuple(parts)

    def ask(self, batch: Batch, number: int) -> Tensor:
        """A teacher's logits."""
        return logits_of(call_model(self.models[number], self.view(batch, number)), self.where[number])

    def specialists(self, batch: Batch) -> Tensor:
        """Logits of every masked teacher ``[W, B, C]``."""
        said = []
        for mask, (number, layer) in zip(self.masks, self.at, strict=True):
            with inserted(self.models[number], layer, mask):
                said.append(self.ask(batch, number))
        return torch.stack(said)
