"""MST-Distill: teachers of several modalities are made into specialists, and a router picks one for each sample."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import DataInfo, Objective
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.survey import dry
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.objectives.response.kd import KD
from limbeck.schemes.many_teachers.specialists import Balance, Crew, Way, imbalance, routed_rows
from limbeck.schemes.parts.looking import whole_batches
from limbeck.schemes.scheme import Cast, Scheme, Training, register

STAGES = ("together", "masks", "mixture")


@register(
    Card(
        key="mst_distill",
        name="MST-Distill",
        title="MST-Distill: Mixture of Specialized Teachers for Cross-Modal Knowledge Distillation",
        year=2025,
        arxiv="2507.07015",
        code="Gray-OREO/MST-Distill",
        knowledge="scheme",
        equation=r"L = L_{task} + \frac 1 k \sum_{w \in \mathrm{top}_k(g)} T^2 \mathrm{KL}(p_w^T \| p_S^T) + "
        r"\frac 1 W \mathrm{KL}(u \| \bar g)",
        use="For a student of one modality with teachers of another, or of several. The recipe's loss is the task, "
        "such as `cross_entropy`; what teachers see beside the student stands in `teacher_inputs`.",
        defaults={
            "layers": "the last 2 before the logits; the code names two of each model",
            "temperature": "4, the authors'",
            "heads": "3, the authors'",
            "shrink": "2, the authors'",
            "k": "1, the authors'",
            "weight, balance_weight": "1, the authors'",
            "shares": "0.01 each, one epoch of about a hundred, as in the authors' runs",
        },
        evidence="parity",
        evidence_note="masks, router, losses of the first and the last stage and their gradients of "
        "Gray-OREO/MST-Distill@093b2fe",
        choices=(
            "Teachers are copied before they learn together with the student; those of the recipe stay as they are.",
            "In the first stage gradients flow into both sides of a divergence, as in the code; `detach: true` holds "
            "the targets fixed.",
            "Every teacher is masked, in `layers` places each; the paper has two teachers.",
            "All masks train in one optimizer, which for Adam is the same as one each: their losses share nothing.",
            "The last masks are kept, where the code keeps those of the lowest validation loss.",
            "As in the code, a router learns by balance alone with `way: top`; `gated` lets it learn whom to ask.",
            "One label a sample: dense outputs are left out.",
        ),
        needs=("labels",),
        tasks=("classification", "several teachers"),
        cost="Every specialist is a forward of its teacher, in each step.",
    )
)
class MSTDistill(Scheme):
    r"""Three stages: teachers and student learn together; masks make specialists; a router mixes these.

    1. Each network n: :math:`L_n = L_{task} + \sum_{o \ne n} T^2 \mathrm{KL}(p_o \| p_n)`.
    2. A mask behind one layer of a frozen teacher, :math:`h' = M(h) h`, brings its answer nearer to the student's.
    3. The student learns from the specialists that the router, which reads its logits, picks for each sample.

    Args:
        layers: How many masks a teacher has, behind its last layers; or names of layers, of all teachers.
        sees: What each teacher reads of ``teacher_inputs`` (or of inputs): a key or position, or a list of these; all,
            where it is not named.
        temperature: T.
        k: Specialists a sample.
        way: ``"top"``, ``"gated"`` or ``"mixed"``; see :func:`routed_rows`.
        weight: Of the divergence from specialists.
        balance: ``"kl"`` or ``"cv"``; see :func:`imbalance`.
        balance_weight: Of it.
        heads, shrink: Of masks; see :class:`~limbeck.schemes.many_teachers.masking.MaskNet`.
        detach: Hold targets of the first stage fixed.
        shares: Of the training, for the first and the second stage. Masks that learn long from a student that knows
            little yet make poor teachers.

    Source: MST-Distill, arXiv 2507.07015.

    >>> MSTDistill(k=2).shares
    (0.01, 0.01)
    """

    def __init__(
        self,
        layers: int | list[str] = 2,
        sees: dict[str, str | int | list[str | int]] = {},  # noqa: B006  never changed
        temperature: float = 4.0,
        k: int = 1,
        way: Way = "top",
        weight: float = 1.0,
        balance: Balance = "kl",
        balance_weight: float = 1.0,
        heads: int = 3,
        shrink: int = 2,
        detach: bool = False,
        shares: tuple[float, float] = (0.01, 0.01),
    ) -> None:
        for switch, given, known in (("way", way, get_args(Way)), ("balance", balance, get_args(Balance))):
            if given not in known:
                raise ConfigError("no such way", where=f"scheme.{switch}", found=given, wanted=", ".join(known))
        for name, value in {"temperature": temperature, "k": k, "heads": heads, "shrink": shrink}.items():
            check_positive(value, f"scheme.{name}")
        for share in shares:
            check_inside(share, "scheme.shares")
        if not layers or (isinstance(layers, int) and layers < 1):
            raise ConfigError("specialists are made by masks", where="scheme.layers", found=layers)
        self.layers, self.sees, self.temperature, self.k, self.way = layers, sees, temperature, k, way
        self.weight, self.balance, self.balance_weight = weight, balance, balance_weight
        self.heads, self.shrink, self.detach, self.shares = heads, shrink, detach, shares

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teachers = cast.need_teachers("specialists are made of", least=1)
        known = {name: t for name, t in teachers.items() if isinstance(t, FrozenTeacher)}
        for name in {*teachers, *self.sees} - set(known):
            raise ConfigError(
                "specialists are made of models at hand" if name in teachers else "there is no such teacher",
                where=f"teachers.{name}",
                found=type(teachers.get(name)).__name__,
            )
        if any(o.student_taps != ("logits",) or o.teacher_taps for o in cast.loss):
            found = ", ".join(cast.loss.names)
            raise ConfigError("the task is learned from logits and labels", where="loss", found=found)
        if self.balance_weight:
            whole_batches(cast.config.accumulate, "mst_distill", "tells how evenly a batch asks its experts")
        crew = Crew(known, self.layers, self.sees, heads=self.heads, shrink=self.shrink)
        settings = _three(cast.config, self.shares)
        yield Training(
            [
                Stage(name, MSTDistiller(cast, crew, self, name), own, learn=() if name == "masks" else ("*",))
                for name, own in zip(STAGES, settings, strict=True)
            ]
        )


class MSTDistiller(Distiller):
    """One of three stages; see :class:`MSTDistill`."""

    def __init__(self, cast: Cast, crew: Crew, scheme: MSTDistill, stage: str) -> None:
        super().__init__(cast.student, copy.deepcopy(cast.loss), None, logits=cast.logits, also=("logits",))
        self.loss.crew = crew  # beside the terms: what stands there goes on from stage to stage, in a resumed run too
        self.stage, self.scheme = stage, scheme
        self.agree = KD(temperature=scheme.temperature)

    @property
    def crew(self) -> Crew:
        """Who teaches."""
        return self.loss.crew  # type: ignore[return-value]

    def objectives(self) -> Iterator[Objective]:
        yield from self.loss
        yield self.agree

    def setup(self, batch: Batch, data: DataInfo | None = None) -> MSTDistiller:
        """Also size the crew, and let those of it learn whose stage it is."""
        super().setup(batch, data)
        prepared, device = self.prepare(batch), next((p.device for p in self.student.parameters()), "cpu")
        self.crew.to(device)
        with dry(self.student):
            logits = self.heard(prepared).logits
        if logits.ndim != 2:
            raise TensorError("a router picks for samples of one label each", where="logits", found=list(logits.shape))
        self.crew.build(prepared, logits.shape[1])
        k, count = self.scheme.k, len(self.crew.at)
        if k > count:
            raise ConfigError("there are fewer specialists", where="scheme.k", found=k, wanted=f"{count} or less")
        self.crew.to(device)
        for name, part in (("together", self.crew.models), ("masks", self.crew.masks), ("mixture", self.crew.router)):
            part.requires_grad_(name == self.stage)
        return self

    def settled(self) -> dict[str, Any]:
        return {**vars(self.scheme), "stage": self.stage}

    @torch.compiler.disable
    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        said = self.heard(prepared)
        if not self.training:  # judged by the task, in every stage
            return self.compare(said, Trace(None), prepared, counted=batch)
        if self.stage == "masks":
            return self._specialise(said.logits.detach(), prepared, batch)
        losses = self.compare(said, Trace(None), prepared, counted=batch)
        return (self._together if self.stage == "together" else self._mix)(losses, said.logits, prepared, batch)

    def _together(self, losses: Losses, own: Tensor, prepared: Batch, batch: Batch) -> Losses:
        """The task of every teacher, and every network's divergence from every other."""
        said = {"student": own, **{name: self.crew.ask(prepared, n) for n, name in enumerate(self.crew.names)}}
        share = batch.share(self.agree.contract.normalizer)
        for name, logits in said.items():
            if name != "student":
                task = self.compare(Trace(None, {"logits": logits}), Trace(None), prepared, counted=batch)
                losses.total = losses.total + task.total
                losses.terms |= {f"{name}/{key}": value for key, value in task.terms.items()}
                losses.weights |= {f"{name}/{key}": value for key, value in task.weights.items()}
            others = [other.detach() if self.scheme.detach else other for key, other in said.items() if key != name]
            rows = sum(self._divergence(logits, other) for other in others)
            value = torch.as_tensor(rows).mean() * share
            losses.total = losses.total + value
            losses.terms[f"{name}/others"], losses.weights[f"{name}/others"] = value.detach(), torch.ones_like(value)
        return losses

    def _divergence(self, own: Tensor, other: Tensor) -> Tensor:
        temperature = self.scheme.temperature
        return temperature**2 * kl_rows(soften(other, temperature), soften(own, temperature))

    def _specialise(self, own: Tensor, prepared: Batch, batch: Batch) -> Losses:
        """How far each masked teacher is from the student."""
        each = self._divergence(self.crew.specialists(prepared), own.expand(len(self.crew.at), -1, -1)).mean(dim=1)
        each = each * batch.share(self.agree.contract.normalizer)
        names = [f"{self.crew.names[number]}/{layer}" for number, layer in self.crew.at]
        terms = dict(zip(names, each.detach(), strict=True))
        return Losses(each.sum(), terms, {name: torch.ones_like(value) for name, value in terms.items()})

    def _mix(self, losses: Losses, own: Tensor, prepared: Batch, batch: Batch) -> Losses:
        """What specialists teach each sample, and how evenly they are asked."""
        scheme = self.scheme
        with torch.no_grad():
            experts = self.crew.specialists(prepared)
        gates = self.crew.router(own).softmax(dim=-1)
        rows = routed_rows(own, experts, gates, scheme.k, scheme.temperature, scheme.way)
        share = batch.share(self.agree.contract.normalizer)
        parts = {"specialists": (rows.mean() * share, scheme.weight)}
        if scheme.balance_weight:
            parts["balance"] = (imbalance(gates, scheme.balance), scheme.balance_weight)
        for name, (value, weight) in parts.items():
            losses.total = losses.total + weight * value
            losses.terms[name], losses.weights[name] = value.detach(), value.new_tensor(weight)
        return losses


def _three(config: TrainConfig, shares: tuple[float, float]) -> list[TrainConfig]:
    """The settings of three stages, whose lengths, of one at least, add up to the whole."""
    name = "steps" if config.steps is not None else "epochs"
    whole = getattr(config, name)
    first, second = (max(1, round(whole * share)) for share in shares)
    if whole - first - second < 1:
        raise ConfigError(
            f"three stages need more {name}", where=f"train.{name}", found=whole, wanted=first + second + 1
        )
    lengths = (first, second, whole - first - second)
    # While masks learn the student stays as it is, which is no reason to stop.
    own = [{}, {"patience": None}, {}]
    return [config.model_copy(update={name: n, **more}) for n, more in zip(lengths, own, strict=True)]
