"""ONE: a network grows further branches, and what they say together teaches each of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError
from limbeck.core.heads import BatchNorm
from limbeck.core.objective import DataInfo, Objective, Terms
from limbeck.core.reduction import check_inside, check_positive, check_same_shape, widen
from limbeck.core.relations import pooled
from limbeck.core.survey import dry
from limbeck.core.teacher import Teacher
from limbeck.core.trace import Trace, logits_of
from limbeck.engine.stage import Stage
from limbeck.objectives.response.kd import KD
from limbeck.schemes.online.branching import Tail, cuttable
from limbeck.schemes.scheme import Cast, Scheme, Training, register


def blend(branch_logits: Sequence[Tensor], gates: Tensor) -> Tensor:
    r"""What the branches say together, :math:`z_e = \sum_i g_i z_i`.

    Args:
        branch_logits: One ``[B, *, C]`` a branch.
        gates: ``[B, branches]``, how much each counts.

    Raises:
        TensorError: Branches of several shapes.

    >>> blend([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])], torch.tensor([[0.5, 0.5]]))
    tensor([[1., 2.]])
    """
    for other in branch_logits[1:]:
        check_same_shape(branch_logits[0], other, "branch_logits[0]", "branch_logits")
    stacked = torch.stack([widen(logits) for logits in branch_logits], dim=-1)  # [B, *, C, branches]
    return (stacked * gates.view(len(gates), *[1] * (stacked.ndim - 2), -1)).sum(dim=-1)


class Gate(nn.Module):
    r"""How much each branch counts, :math:`g = \mathrm{softmax}(\mathrm{ReLU}(\mathrm{BN}(W \bar f + b)))`.

    Args:
        feature: An example of what it reads, with samples first and, of maps, channels second; of tokens, last.
        branches: How many.

    >>> Gate(torch.zeros(2, 8, 4, 4), 3)(torch.randn(5, 8, 4, 4)).sum(dim=1).detach()
    tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000])
    """

    def __init__(self, feature: Tensor, branches: int) -> None:
        super().__init__()
        self.linear = nn.Linear(pooled(feature)[0].shape[1], branches)
        self.norm = BatchNorm(branches)

    def forward(self, feature: Tensor) -> Tensor:
        read = pooled(feature)[0].to(self.linear.weight.dtype)
        return self.norm(self.linear(read)).relu().softmax(dim=1)


@register(
    Card(
        key="one",
        name="ONE",
        title="Knowledge Distillation by On-the-Fly Native Ensemble",
        year=2018,
        arxiv="1806.04606",
        code="Lan1991Xu/ONE_NeurIPS2018",
        knowledge="scheme",
        equation=r"L = \sum_i CE(z_i, y) + CE(z_e, y) + w(t) T^2 \sum_i KL(p_e \| p_i), \qquad z_e = \sum_i g_i z_i",
        use="Without a teacher, for the price of a few more last layers: branches share all that comes before. Less "
        "to compute than mutual learning, and one training.",
        defaults={
            "branches": "2 beside the student's own end: three, as in the paper",
            "tap": "what comes before the last stage, as in the paper's ResNets",
            "temperature": "3, the paper's",
            "weight": "1, the paper's",
            "ramp": "80 of 300 epochs, as in the authors' scripts",
        },
        evidence="parity",
        evidence_note="loss and every gradient of Lan1991Xu/ONE_NeurIPS2018@54afde3, its network's forward included",
        choices=(
            "Branches are cut from fresh students at any place past which nothing from before is used; a copy proves "
            "that before training.",
            "The ramp is the authors' (from 0.007 to 1), by steps; theirs is by epochs.",
            "The branches and their ensemble have those terms of the recipe's loss that need no more than logits.",
            "The gate's normalisation has no running statistics: it is not asked after training; each rank takes its "
            "own, as with BatchNorm. In the target the code adds 1e-7 to each probability; here it is what it is.",
            "The student is the branch that it was from the beginning; the ensemble is not kept.",
        ),
    )
)
class ONE(Scheme):
    r"""One training of a student with further branches, each a student's end of its own.

    .. math::
        L = \sum_i L_{\text{loss}}(z_i) + L_{\text{loss}}(z_e) + w(t)\, T^2 \sum_i KL(p^T_e \| p^T_i), \qquad
        z_e = \sum_i g_i z_i

    A gate learns from the shared feature how much each branch counts. The ensemble's answer is taken as a constant
    where it teaches. :math:`w(t)` rises as :math:`w\, e^{-5 (1 - t / r)^2}` up to :math:`t = r`.

    Args:
        branches: How many beside the student's own.
        tap: Where they part; what comes before is shared.
        temperature: :math:`T`.
        weight: :math:`w`.
        ramp: :math:`r`, a share of the training; 0: no ramp.

    Source: Knowledge Distillation by On-the-Fly Native Ensemble, arXiv 1806.04606.

    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import CrossEntropy
    >>> student, fresh = (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)) for _ in range(2))
    >>> cast = Cast(student, Terms.of(CrossEntropy()), None, TrainConfig(), fresh=lambda number: fresh)
    >>> (training,) = ONE(branches=1, tap="0").trainings(cast)
    >>> batch = Batch(torch.randn(2, 4), torch.tensor([0, 2]))
    >>> sorted(training.stages[0].distiller.setup(batch)(batch).terms)
    ['branch_1/cross_entropy', 'branch_1/ensemble', 'cross_entropy', 'ensemble', 'ensemble/cross_entropy']
    """

    def __init__(
        self,
        branches: int = 2,
        tap: str = "stages:-2",
        temperature: float = 3.0,
        weight: float = 1.0,
        ramp: float = 80 / 300,
    ) -> None:
        if branches < 1:
            raise ConfigError("an ensemble has two branches at least", where="scheme.branches", found=branches)
        check_positive(temperature, "scheme.temperature")
        check_inside(weight, "scheme.weight", 0.0, float("inf"), closed=True)
        check_inside(ramp, "scheme.ramp", closed=True)
        self.branches, self.tap = branches, tap
        self.temperature, self.weight, self.ramp = temperature, weight, ramp

    def trainings(self, cast: Cast) -> Iterator[Training]:
        others = [cast.another(number) for number in range(1, self.branches + 1)]
        tree = Branched(cast.student, cast.loss, cast.teacher, others, self, cast.logits)
        yield Training([Stage("one", tree, cast.config)])


class Branched(Distiller):
    """A student, further branches of it, and the gate between them; see :class:`ONE`.

    Args:
        student: It stays whole.
        loss: Its own.
        teacher: Where the loss asks one.
        others: Students of the same kind, of which the end is taken.
        scheme: With its settings.
        logits: Where logits stand in the output.
    """

    def __init__(
        self,
        student: nn.Module,
        loss: Objective | Terms,
        teacher: nn.Module | Teacher | None,
        others: Sequence[nn.Module],
        scheme: ONE,
        logits: str | None = None,
    ) -> None:
        super().__init__(student, loss, teacher, logits=logits, also=(scheme.tap, "logits"))
        chosen = [entry for entry in self.loss.items() if entry[1].student_taps == ("logits",)]
        if not chosen:
            found = ", ".join(self.loss.names)
            raise ConfigError("no term of the loss is one of logits alone", where="loss", found=found)
        names, objectives, weights = (list(column) for column in zip(*chosen, strict=True))
        self.further = nn.ModuleList(  # of each branch, and of all together
            Terms([copy.deepcopy(o) for o in objectives], weights, names) for _ in range(len(others) + 1)
        )
        self.scheme = scheme
        self.agree = KD(temperature=scheme.temperature)
        self._uncut = tuple(others)

    def objectives(self) -> Iterator[Objective]:
        yield from self.loss
        for terms in self.further:
            yield from terms  # type: ignore[misc]
        yield self.agree

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Branched:
        """Also cut the branches, once."""
        self.close()
        prepared = self.prepare(batch)
        example = prepared.inputs
        if self._uncut:
            cut, places = cuttable(self.student, self.scheme.tap, example, self._logits)
            self.tails = nn.ModuleList(Tail(other, cut, places, prepared.size) for other in self._uncut)
            self._uncut = ()
            self.gate: Gate | None = None
        super().setup(batch, data)
        with dry(self.student):
            first, teacher = self.traces(prepared)
        feature = first[self.scheme.tap]
        if self.gate is None:
            self.gate = Gate(feature, len(self.tails) + 1)
        self.gate.to(feature.device, feature.dtype)
        self.tails.to(feature.device)
        for terms in self.further:
            for objective in terms:  # type: ignore[attr-defined]
                objective.setup(*self._common(objective, first, teacher), prepared, data or DataInfo())
                objective.to(feature.device)
        return self

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        first, teacher = self.traces(prepared)
        feature = first[self.scheme.tap]
        said = [first.logits, *(logits_of(tail(prepared.inputs, feature), self._logits) for tail in self.tails)]
        assert self.gate is not None
        together = Trace(None, {"logits": blend(said, self.gate(feature))})
        losses = self.compare(first, teacher, prepared, counted=batch)
        for number, (logits, terms) in enumerate(zip([*said[1:], together.logits], self.further, strict=True), 1):
            own = self.compare(Trace(None, {"logits": logits}), teacher, prepared, counted=batch, loss=terms)  # type: ignore[arg-type]
            _add(losses, own, f"branch_{number}" if number < len(said) else "ensemble")
        share, weight = batch.share(self.agree.contract.normalizer), self._weight(batch, said[0])
        for number, logits in enumerate(said):
            value = self.agree(Trace(None, {"logits": logits}), together, prepared) * share
            losses.total = losses.total + weight * value
            name = "ensemble" if number == 0 else f"branch_{number}/ensemble"
            losses.terms[name], losses.weights[name] = value.detach(), weight
        return losses

    def _weight(self, batch: Batch, like: Tensor) -> Tensor:
        progress = torch.as_tensor(batch.progress, dtype=torch.float32, device=like.device)
        if not self.scheme.ramp:
            return torch.full_like(progress, self.scheme.weight)
        missing = 1 - (progress / self.scheme.ramp).clamp(max=1.0)
        return self.scheme.weight * (-5 * missing.square()).exp()

    def settled(self) -> dict[str, Any]:
        return dict(vars(self.scheme))


def _add(losses: Losses, other: Losses, name: str) -> None:
    """Add a branch's losses to those of the student."""
    losses.total = losses.total + other.total
    losses.terms |= {f"{name}/{key}": value for key, value in other.terms.items()}
    losses.weights |= {f"{name}/{key}": value for key, value in other.weights.items()}
