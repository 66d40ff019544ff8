"""Mixture-of-experts teachers: all experts have their say, also those that the model itself would not ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Losses
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo
from limbeck.core.reduction import check_inside, check_positive, fit_mask, reduce
from limbeck.core.survey import dry
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.language.loader import LanguageLoader
from limbeck.engine.stage import Stage
from limbeck.models.generating import Decoding, check_writes
from limbeck.schemes.language.gkd import OnPolicy
from limbeck.schemes.language.writing import same_tokens, texts_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.experts import EveryExpert, ExpertsTeacher, Router

Way = Literal["augment", "student_aware", "all"]


@register(
    Card(
        key="moe_kd",
        name="KA and SAR",
        title="Every Expert Matters: Towards Effective Knowledge Distillation for Mixture-of-Experts Language Models",
        year=2025,
        arxiv="2502.12947",
        knowledge="scheme",
        equation=r"\frac 1 M \sum_m \mathrm{KL}(p_S \| p_{T_m}), \quad y_{T_m} = \sum_{i \in S_m} g_i E_i / "
        r"\sum_{i \in S_m} g_i",
        use="For a teacher that is a mixture of experts, of which each token asks a few: the others know things, too. "
        "`augment` asks nearly all of them several times, `student_aware` lets the router learn whom the student "
        "understands. With reverse_kl, the paper's loss, or any other.",
        defaults={
            "passes": "2, the paper's; more make it worse there",
            "chance": "0.05, the paper's",
            "balance": "0.01, the paper's",
            "lmbda": "1, the paper's: all texts are the student's own",
        },
        evidence="reading",
        choices=(
            "the router learns with the student's settings, which the paper leaves open, but for its learning rate: "
            "with the student's the teacher soon says what the student says, and has nothing left to teach",
            "the router's loss is the reverse KL whatever the student's is; it is balanced over the places that count, "
            "the k most probable experts of each being those it is routed to",
            "weights of chosen experts sum to one where they do in the teacher itself",
            "texts are written as in GKD; with lmbda 0 they are those of the data",
        ),
        tasks=("language",),
        cost="The teacher answers twice in each step, with all of its experts.",
    )
)
class MoEKD(Scheme):
    r"""One stage with a mixture of experts for a teacher, in one of three ways.

    ``"augment"`` (KA): the student learns from several answers, each of nearly all experts; see
    :class:`~limbeck.teachers.experts.ExpertsTeacher`. ``"student_aware"`` (SAR): all experts answer, and in each step
    the router moves first, by

    .. math:: \mathrm{KL}(p_S \| p_T) + \beta \sum_l N \sum_i f_i P_i

    where :math:`f_i` is the fraction of tokens routed to expert i and :math:`P_i` its mean probability, then the
    student by the recipe's loss. The teacher itself stays as it is: what moves are copies of its routers. ``"all"``:
    the same without a router's turn.

    Args:
        way: ``"augment"``, ``"student_aware"`` or ``"all"``.
        passes: M, of ``augment``.
        chance: That a token's experts are drawn from the router's distribution, of ``augment``.
        experts: How many a token asks, of ``augment``; ``None``: all but one.
        balance: :math:`\beta`, of ``student_aware``.
        lr_router: Of ``student_aware``; ``None``: a hundredth of the student's.
        lmbda: The share of steps whose texts the student writes.
        max_new_tokens: Of what it writes at most.
        temperature: Of its drawing.
        prompt: Tokens of a prompt at least; of whole texts, where everything is learned, the first so many.

    Source: Every Expert Matters, arXiv 2502.12947.

    >>> MoEKD("student_aware", lmbda=0.0).balance
    0.01
    """

    def __init__(
        self,
        way: Way = "augment",
        passes: int = 2,
        chance: float = 0.05,
        experts: int | None = None,
        balance: float = 0.01,
        lr_router: float | None = None,
        lmbda: float = 1.0,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        prompt: int = 1,
    ) -> None:
        if way not in get_args(Way):
            raise ConfigError("no such way", where="scheme.way", found=repr(way), wanted=", ".join(get_args(Way)))
        check_inside(lmbda, "scheme.lmbda", closed=True)
        check_inside(chance, "scheme.chance", closed=True)
        for name, value in (("passes", passes), ("prompt", prompt), ("experts", experts), ("lr_router", lr_router)):
            if value is not None:
                check_positive(value, f"scheme.{name}")
        if balance < 0:
            raise ConfigError("must not be negative", where="scheme.balance", found=balance)
        self.way, self.passes, self.chance, self.experts = way, passes, chance, experts
        self.balance, self.lr_router, self.lmbda, self.prompt = balance, lr_router, lmbda, prompt
        self.decoding = Decoding(max_new_tokens, temperature)

    def trainings(self, cast: Cast) -> Iterator[Training]:
        judge = cast.need_teacher("whose experts are asked is")
        if not isinstance(judge, FrozenTeacher):
            raise ConfigError(
                "the experts of a teacher can be asked only where it is a model at hand",
                where="teacher",
                found=type(judge).__name__,
                remedy="give the model itself, not a cache of what it said",
            )
        made: FrozenTeacher = EveryExpert(judge.model, logits=judge.where)
        if self.way == "augment":
            options: dict[str, Any] = {"passes": self.passes, "chance": self.chance, "experts": self.experts}
            made = ExpertsTeacher(judge.model, logits=judge.where, **options)
        distiller = MixtureDistiller(cast.student, cast.loss, made, logits=cast.logits)
        distiller.way(self, cast)
        if self.way == "student_aware" and isinstance(cast.train, LanguageLoader):
            same_tokens(cast.train, "moe_kd")
        if self.lmbda:
            loader = texts_of(cast.train, "moe_kd")
            same_tokens(loader, "moe_kd")
            check_writes(cast.student, "student")
            distiller.plan(self, loader, cast.seed)
        yield Training([Stage("moe_kd", distiller, cast.config)])


class MixtureDistiller(OnPolicy):
    """A student of a mixture of experts, whose routers may have a turn; see :class:`MoEKD`."""

    def way(self, scheme: MoEKD, cast: Cast) -> None:
        """Take the scheme's settings."""
        self.turns = ("router", "student") if scheme.way == "student_aware" else ("student",)
        self.balance, self.seed = scheme.balance, cast.seed
        self._lr = 0.01 * cast.config.lr if scheme.lr_router is None else scheme.lr_router
        self._facts = {n: getattr(scheme, n) for n in ("way", "passes", "chance", "experts", "balance", "lr_router")}
        self._writes = scheme.lmbda > 0
        self.routers = nn.ModuleList()
        self.share(scheme.lmbda, 0.0)

    def setup(self, batch: Batch, data: DataInfo | None = None) -> MixtureDistiller:
        """Also copy the teacher's routers, where they learn."""
        super().setup(batch, data)
        teacher = self.teacher
        if "router" in self.turns and isinstance(teacher, EveryExpert):
            if not self.loss.teacher_taps:
                teacher.attach(("logits",), self.prepare(batch))
            if not len(self.routers):
                self.routers.extend(_Copied(router) for router in teacher.routers)
            held: list[Any] = list(self.routers)
            teacher.weights = [dict(zip(one.names, one.values, strict=True)) for one in held]
        return self

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        own = {id(p) for p in self.routers.parameters()}
        return (p for p in self.parameters() if (id(p) in own) == (turn == "router"))

    def settings_of(self, turn: str) -> dict[str, Any]:
        return {"lr": self._lr} if turn == "router" else {}

    def settled(self) -> dict[str, Any]:
        return {**self._facts, **(super().settled() if self._writes else {})}

    def made(self, batch: Batch) -> Batch:
        return super().made(batch) if self._writes else batch

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        if turn == "router":
            return self._route(batch)
        prepared = self.prepare(batch)
        student, teacher = self.traces(prepared)
        if not teacher.members:
            return self.compare(student, teacher, prepared, counted=batch)
        each = [self.compare(student, member, prepared, counted=batch) for member in teacher.members]
        first, number = each[0], len(each)
        mean = {name: sum((e.terms[name] for e in each[1:]), value) / number for name, value in first.terms.items()}
        total = sum((e.total for e in each[1:]), first.total) / number
        apart = {k: sum((e.apart[k] for e in each[1:]), v) / number for k, v in first.apart.items()}
        return Losses(total, mean, first.weights, first.logits, apart)

    @torch.compiler.disable
    def _route(self, batch: Batch) -> Losses:
        """The router's loss: how far the student is from the teacher, and how unevenly experts are asked."""
        prepared = self.prepare(batch)
        teacher = self.teacher
        assert isinstance(teacher, EveryExpert)
        with dry(self.student):  # it does not learn here, and nothing of it moves
            student = self.heard(prepared)
        said, gates = teacher.learning(prepared)
        width = min(student.logits.shape[-1], said.logits.shape[-1])  # one may have rows for tokens that are none
        log_q, log_p = soften(student.logits[..., :width]), soften(said.logits[..., :width])
        values = kl_rows(log_q, log_p)
        counts = torch.ones_like(values, dtype=torch.bool)
        counts = counts if prepared.mask is None else fit_mask(prepared.mask, values)
        uneven = [imbalance(g, counts, r) for g, r in zip(gates, teacher.routers, strict=True)]
        share = batch.share("positions")
        parts = {"router_kl": reduce(values, counts) * share, "balance": sum(uneven, values.new_zeros(())) * share}
        weights = {"router_kl": values.new_ones(()), "balance": values.new_tensor(self.balance)}
        total = parts["router_kl"] + self.balance * parts["balance"]
        return Losses(total, {name: value.detach() for name, value in parts.items()}, weights)


def imbalance(logits: Tensor, counts: Tensor, router: Router) -> Tensor:
    r"""How unevenly a layer's experts are asked, :math:`N \sum_i f_i P_i`; 1 where evenly.

    Args:
        logits: ``[tokens, N]`` of its router.
        counts: ``[B, L]`` booleans, the tokens that count.
        router: Which.

    Source: Fedus et al., "Switch Transformers", 2021, arXiv 2101.03961.
    """
    inside = counts.reshape(-1, 1)
    number = inside.sum().clamp(min=1)
    chances = logits.float().softmax(dim=-1)
    asked = torch.zeros_like(chances).scatter(1, chances.topk(router.chosen, dim=-1).indices, 1.0)
    fraction, mean = ((t * inside).sum(dim=0) / number for t in (asked / router.chosen, chances))
    return router.experts * (fraction * mean).sum()


class _Copied(nn.Module):
    """A router's parameters, apart from their module."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        found = dict(router.module.named_parameters(recurse=False))
        self.names = list(found)
        self.values = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in found.values())
