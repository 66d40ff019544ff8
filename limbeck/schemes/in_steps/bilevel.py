"""Bilevel training: a loss's own weighting learns, on samples held out, what makes the student better."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from limbeck.core.batch import Batch, map_tensors
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import draw_bits, key, key_tensor
from limbeck.core.objective import DataInfo, Objective, Terms
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.teacher import Teacher
from limbeck.core.trace import logits_of
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.objectives.response.tgeo_kd import TGeoKD
from limbeck.schemes.parts.unrolled import stepped
from limbeck.schemes.scheme import StagedScheme, register

_HELD = 7  # keeps the draw of held-out samples apart from others


@register("bilevel")
class Bilevel(StagedScheme):
    r"""One stage with two players: ``controller``, the weighting of a loss, and ``student``.

    In each step the controller moves first: it is judged by the cross-entropy on held-out samples of the student that
    one plain gradient step with its weighting would give, and the gradient runs through that step. Then the student
    takes its real step, with the weighting as it is now.

    .. math:: w \leftarrow w - \nabla_w\, \mathrm{CE}\!\left( \theta - \eta \nabla_\theta L(\theta, w) \right), \qquad
        \theta \leftarrow \theta - \nabla_\theta L(\theta, w)

    The samples are held out of the training set by a hash of their ids, so they are the same in every run; the student
    does not learn from them. The step inside is taken on copies: it moves neither weights nor running statistics.
    Of several processes each has its rows of a batch, and all judge the step by the same held-out samples.

    Args:
        share: Of the training samples, held out; the authors' 0.1.
        samples: Held-out samples that judge one step; they take turns. The authors take all.
        most: Held-out samples kept in memory, at most.
        inner_lr: :math:`\eta`; default the learning rate of the settings.
        lr: The controller's learning rate with Adam, constant.
        weight_decay: The controller's. The authors' script has a rate of 0.1 and a decay of 0.05, but no gradient
            reaches its controller; where one does, as here, those take every sample's ratio to one and the same number.

    Source: Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation, arXiv 2312.15112.

    >>> stages = Bilevel().stages(nn.Linear(4, 2), TGeoKD(), nn.Linear(4, 2), TrainConfig())
    >>> stages[0].distiller.turns
    ('controller', 'student')
    """

    def __init__(
        self,
        share: float = 0.1,
        samples: int = 128,
        most: int = 2048,
        inner_lr: float | None = None,
        lr: float = 0.01,
        weight_decay: float = 1e-3,
    ) -> None:
        for name, value in (("samples", samples), ("most", most), ("lr", lr)):
            check_positive(value, f"scheme.{name}")
        check_inside(share, "scheme.share")
        self.share, self.samples, self.most, self.inner_lr = share, samples, most, inner_lr
        self.lr, self.weight_decay = lr, weight_decay

    def stages(
        self,
        student: nn.Module,
        loss: Objective | Terms | None,
        teacher: nn.Module | Teacher | None,
        config: TrainConfig,
        *,
        logits: str | None = None,
    ) -> list[Stage]:
        loss = Terms.of(TGeoKD() if loss is None else loss)
        if not any(isinstance(objective, TGeoKD) for objective in loss):
            raise ConfigError(
                "there is nothing for the upper level to learn",
                where="loss",
                found=", ".join(loss.names),
                wanted="tgeo_kd",
            )
        distiller = BilevelDistiller(student, loss, teacher, logits=logits)
        distiller.plan(self, config.lr if self.inner_lr is None else self.inner_lr)
        return [Stage("bilevel", distiller, config)]


class BilevelDistiller(Distiller):
    """Student and controller, each with its turn; see :class:`Bilevel`."""

    turns = ("controller", "student")
    judged: Tensor

    def plan(self, scheme: Bilevel, inner_lr: float) -> None:
        """Take the scheme's settings."""
        self.share, self.samples, self.most, self.inner_lr = scheme.share, scheme.samples, scheme.most, inner_lr
        plain = {"optimizer_options": {}, "schedule": "constant", "schedule_options": {}, "warmup": 0.0}
        own = {"optimizer": "adam", "lr": scheme.lr, "weight_decay": scheme.weight_decay, "decay": "all"}
        self._controller: dict[str, Any] = {**own, **plain}
        self.register_buffer("judged", torch.zeros((), dtype=torch.long))  # held-out samples asked so far
        self.register_buffer("held", None, persistent=False)  # which samples are held out, by id
        self._judges: Batch | None = None

    @property
    def _weightings(self) -> list[TGeoKD]:
        return [objective for objective in self.loss if isinstance(objective, TGeoKD)]

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        own = {id(p) for objective in self._weightings for p in objective.ready("controller").parameters()}
        return (p for p in self.parameters() if (id(p) in own) == (turn == "controller"))

    def settings_of(self, turn: str) -> dict[str, Any]:
        return self._controller if turn == "controller" else {}

    def settled(self) -> dict[str, Any]:
        return {"share": self.share, "samples": self.samples, "most": self.most, "inner_lr": self.inner_lr}

    def setup(self, batch: Batch, data: DataInfo | None = None) -> BilevelDistiller:
        """Also hold samples out, and let the controllers learn."""
        super().setup(batch, data)
        if data is None or data.batches is None or not data.samples:
            raise ConfigError(
                "this scheme holds samples out of the training set, and does not know it",
                where="scheme bilevel",
                remedy="train with limbeck's engine on data whose samples have ids",
            )
        for objective in self._weightings:
            objective.ready("controller").requires_grad_(True)
        bits = draw_bits(key_tensor([key(_HELD)]), torch.arange(data.samples)).squeeze(1)
        held = torch.zeros(data.samples, dtype=torch.bool)
        held[bits.argsort(stable=True)[: max(1, round(self.share * data.samples))]] = True
        device = next((p.device for p in self.student.parameters()), torch.device("cpu"))
        self.held, self._judges = held.to(device), _collected(data.batches(), held, self.most).to(device)
        return self

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        if self.training:  # else it is judged as it is, on data of other ids
            batch = self._without_held(batch)
        return super().forward(batch) if turn == "student" else self._upper(batch)

    def _without_held(self, batch: Batch) -> Batch:
        """Held-out samples lose their labels; totals are what is left on average, so that parts of a step add up."""
        assert self.held is not None
        labels = batch.require("labels")
        if labels.is_floating_point():
            raise DataError("this scheme knows classes", where="labels", found=str(labels.dtype), wanted="integers")
        units = {o.contract.normalizer for o in self.loss}
        totals = dict(batch.totals) or {unit: batch.count(unit) for unit in units}
        if "labels" in totals:
            totals["labels"] = totals["labels"] * (1 - self.share)
        held = self.held[batch.require("index")].reshape(-1, *[1] * (labels.ndim - 1))
        return batch.replace(labels=labels.masked_fill(held, -100), totals=totals)

    @torch.compiler.disable
    def _upper(self, batch: Batch) -> Losses:
        """Cross-entropy on held-out samples after one step of the student, as a function of the controllers."""
        weights = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        with own_buffers(self.student):
            with self._unrolled():
                lower = super().forward(batch).total
            moved = stepped(lower, weights, self.inner_lr)
            inputs, labels = self._next()
            output = functional_call(self.student, moved, *_arguments(inputs))
        scores = logits_of(output, self._logits).flatten(0, -2).float()
        upper = F.cross_entropy(scores, labels.flatten(), ignore_index=-100)
        return Losses(upper, {"upper": upper.detach()}, {"upper": torch.ones_like(upper)})

    def _next(self) -> tuple[Any, Tensor]:
        """The held-out samples whose turn it is to judge."""
        assert self._judges is not None
        size, labels = self._judges.size, self._judges.require("labels")
        rows = (self.judged + torch.arange(min(self.samples, size), device=labels.device)) % size
        self.judged += len(rows)
        return map_tensors(self._judges.inputs, lambda t: t[rows]), labels[rows]

    @contextlib.contextmanager
    def _unrolled(self) -> Iterator[None]:
        """Let the gradient of the loss run through its weighting."""
        for objective in self._weightings:
            objective.unrolled = True
        try:
            yield
        finally:
            for objective in self._weightings:
                objective.unrolled = False


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with a batch's inputs."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _collected(batches: Iterable[Batch], held: Tensor, most: int) -> Batch:
    """The held-out samples as one batch, at most so many, the first; of an excerpt that has none, the last batch."""
    inputs: list[Any] = []
    labels: list[Tensor] = []
    for batch in batches:
        known = batch.require("labels")
        rows = held[batch.require("index").cpu()].to(known.device).nonzero().flatten()
        if len(rows) and sum(map(len, labels)) < most:
            inputs.append(map_tensors(batch.inputs, lambda t: t[rows]))  # noqa: B023
            labels.append(known[rows])
    return Batch(_joined(inputs), torch.cat(labels)) if labels else Batch(batch.inputs, known)


def _joined(parts: list[Any]) -> Any:
    """Batches' inputs end to end."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts]) for name in first}
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(list(values)) for values in zip(*parts, strict=True))
    return first


@contextlib.contextmanager
def own_buffers(model: nn.Module) -> Iterator[None]:
    """Copies of a model's buffers in their place, for forwards that leave no trace in running statistics."""
    kept = [(module, name, b) for module in model.modules() for name, b in module._buffers.items() if b is not None]
    try:
        for module, name, buffer in kept:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer
