"""Hybrid Distill: one teacher shows how tokens relate, another what they are; a student learns both without labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch  # noqa: F401  for the examples
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.hashing import uniform
from limbeck.core.layout import unfused
from limbeck.core.objective import Contract, DataInfo, Objective, Terms
from limbeck.core.reduction import check_inside, widen
from limbeck.core.schedules import Constant
from limbeck.core.trace import Trace
from limbeck.engine.stage import Stage
from limbeck.objectives.relation.minilm import minilm_loss
from limbeck.schemes.many_teachers.token_dropping import Dropping, taken
from limbeck.schemes.parts.looking import Unlabelled
from limbeck.schemes.parts.step_draws import step_bits
from limbeck.schemes.parts.two_stages import task_stage, two_configs
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.several import SeveralTeachers

_LEAVE = 69  # keeps these draws apart from others
_MOST = 12  # heads of relations, where nothing says how many


def relation_loss(student: list[Tensor], teacher: list[Tensor], heads: int | None = None) -> Tensor:
    r"""Divergence of two relations of tokens, :math:`R^{QK} = \mathrm{softmax}(QK^\top / \sqrt d)` and :math:`R^{VV}`.

    Args:
        student: Q, K and V, ``[B, N, D]`` each, of all heads side by side.
        teacher: The same at the same tokens; its width may differ. Detached.
        heads: Parts into which both are cut; ``None``: 12, or the most up to that which divide both widths.

    >>> q, k, v = torch.randn(3, 2, 5, 8)
    >>> bool(relation_loss([q, k, v], [q, k, v]).abs() < 1e-6)
    True
    """
    widths = student[0].shape[-1], teacher[0].shape[-1]
    if heads is None:
        heads = max(n for n in range(1, _MOST + 1) if not any(width % n for width in widths))
    queries, keys, values = ((s, t.detach()) for s, t in zip(student, teacher, strict=True))
    return minilm_loss(*queries, *keys, heads=heads) + minilm_loss(*values, heads=heads)


class HybridLoss(Objective):
    """Relations of the first teacher's tokens, features of the second's; see :class:`HybridDistill`."""

    contract = Contract(normalizer="samples", at_equal=None, mask=False)

    def __init__(self, scheme: HybridDistill) -> None:
        super().__init__()
        self.scheme = scheme
        triples = [[f"{role}:{layer}" for role in ("queries", "keys", "values")] for layer in scheme.layers]
        self.student_taps = (*(tap for triple in triples for tap in triple), "blocks:-1")
        self.teacher_taps, self.triples = self.student_taps, triples
        self.head: nn.Linear | None = None
        self.kept: list[Tensor | None] = []

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        widths = [trace["blocks:-1"].shape[-1] for trace in (student, teacher.members[1])]
        self.head = nn.Linear(*widths)
        for name, member in zip(self.scheme.teachers, teacher.members, strict=True):
            own, other = student["blocks:-1"].shape, member["blocks:-1"].shape
            if own[1] != other[1]:
                raise TensorError(
                    "student and teacher look at images through the same grid of patches",
                    where=f"teachers.{name}",
                    found=f"{other[1]} tokens",
                    wanted=f"{own[1]}",
                )

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        scheme, (relations, features) = self.scheme, teacher.members
        total = student["blocks:-1"].new_zeros(())
        for layer, taps in zip(scheme.layers, self.triples, strict=True):
            kept = self.kept[layer] if self.kept else None
            own = unfused(*(student[tap] for tap in taps))
            other = [taken(part, kept, scheme.prefix) for part in unfused(*(relations[tap] for tap in taps))]
            total = total + relation_loss(list(own), other, scheme.heads)
        goal = taken(features["blocks:-1"].detach(), self.kept[-1] if self.kept else None, scheme.prefix)
        goal, own_tokens = widen(goal)[:, scheme.prefix :], student["blocks:-1"][:, scheme.prefix :]
        said = self.ready("head")(own_tokens.to(self.ready("head").weight.dtype))
        near = F.smooth_l1_loss(widen(said), F.layer_norm(goal, goal.shape[-1:]))
        return {"relations": scheme.alpha * total, "features": scheme.beta * near}


@register(
    Card(
        key="hybrid_distill",
        name="Hybrid Distill",
        title="Hybrid Distillation: Connecting Masked Autoencoders with Contrastive Learners",
        year=2023,
        arxiv="2306.15876",
        code="lygsbw/hybriddistill",
        knowledge="scheme",
        equation=r"L = \alpha \sum_{l \in I} KL(R^{QK}_T \| R^{QK}_S) + KL(R^{VV}_T \| R^{VV}_S) + "
        r"\beta\, \mathrm{SmoothL1}(g(s), \mathrm{LN}(t))",
        use="Before a task, without labels: a vision transformer takes diversity from a masked autoencoder and what "
        "tells things apart from a supervised or contrastive teacher.",
        defaults={
            "alpha": "1, the paper's",
            "beta": "1, the paper's",
            "keep": "0.7; the paper's is not known to us",
            "layers": "the last two; the paper says intermediate layers",
            "share": "0.7 of the training, ours: in the paper the two are apart",
        },
        evidence="reading",
        evidence_note="relations, features and the choice of tokens against plain loops; there is no released code",
        choices=(
            "read in the abstract and reviews: which teacher gives what, and the weights; the layers, the smooth L1 "
            "and the normalised target are ours",
            "a token's redundancy is its mean cosine with the others; the same share leaves before the first block and "
            "after a third and two thirds of them, with a little chance",
            "relations are compared among the tokens that the student still has",
            "a second stage makes the student's classifier, or trains all of it, by the recipe's loss",
        ),
    )
)
class HybridDistill(Scheme):
    r"""Two stages: the student learns tokens from two teachers; then it learns by the recipe's loss.

    .. math::
        L = \alpha \sum_{l \in I} \left[ KL(R^{QK}_{T,l} \| R^{QK}_{S,l}) + KL(R^{VV}_{T,l} \| R^{VV}_{S,l}) \right] +
        \beta\, \mathrm{SmoothL1}(g(s), \mathrm{LN}(t))

    Relations are those of the first teacher's attention, t the last tokens of the second's. Tokens that say what others
    say leave the student on the way, so that it costs less; the teachers see all.

    Args:
        teachers: The names of the two: whose relations, and whose features.
        layers: I, blocks counted from the last.
        heads: Of relations; ``None``: see :func:`relation_loss`.
        alpha: :math:`\alpha`.
        beta: :math:`\beta`.
        keep: The part of the patches that reaches the end; 1: all.
        depths: Before which blocks they leave, in parts of all.
        chance: How much chance there is in which leave.
        prefix: Tokens before the patches: 1, the class token.
        share: Of the training, for the first stage.
        then: The second: ``probe``, the last layer alone learns; ``finetune``: all of it.

    Source: Hybrid Distillation, arXiv 2306.15876.

    >>> HybridDistill(layers=[-1]).layers
    [-1]
    """

    def __init__(
        self,
        teachers: list[str] = ["mim", "cl"],  # noqa: B006  never changed
        layers: list[int] = [-2, -1],  # noqa: B006  never changed
        heads: int | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        keep: float = 0.7,
        depths: list[float] = [0.0, 1 / 3, 2 / 3],  # noqa: B006  never changed
        chance: float = 0.1,
        prefix: int = 1,
        share: float = 0.7,
        then: Literal["probe", "finetune"] = "finetune",
    ) -> None:
        if len(teachers) != 2 or not layers or not depths or prefix < 0:
            raise ConfigError("two teachers, and one layer and one depth at least", where="scheme", found=teachers)
        for name, value in {"alpha": alpha, "beta": beta, "chance": chance}.items():
            check_inside(value, f"scheme.{name}", 0.0, float("inf"), closed=True)
        check_inside(share, "scheme.share")
        if not 0 < keep <= 1:
            raise ConfigError("some tokens must stay", where="scheme.keep", found=keep, wanted="above 0, at most 1")
        for depth in depths:
            check_inside(depth, "scheme.depths", closed=True)
        self.teachers, self.layers, self.heads, self.alpha, self.beta = list(teachers), list(layers), heads, alpha, beta
        self.keep, self.depths, self.chance, self.prefix = keep, list(depths), chance, prefix
        self.share, self.then = share, then

    def trainings(self, cast: Cast) -> Iterator[Training]:
        given = cast.need_teachers("relations and features come of")
        missing = [name for name in self.teachers if name not in given]
        if missing:
            raise ConfigError(
                "there is no such teacher",
                where="scheme.teachers",
                found=", ".join(missing),
                wanted=f"two of {', '.join(given)}",
            )
        first, second = two_configs(cast.config, self.share)
        both = SeveralTeachers(given[name] for name in self.teachers)
        loss = Terms([HybridLoss(self)], [Constant(1.0)], ["hybrid"])
        pair = Hybrid(cast.student, loss, both, logits=cast.logits)
        pair.seed = cast.seed
        yield Training([Stage("hybrid", pair, first), task_stage(cast, self.then, second)])


class Hybrid(Unlabelled):
    """The first stage; see :class:`HybridDistill`."""

    dropping: Dropping | None = None
    seed = 0

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Distiller:
        """Also let tokens leave the student, from then on where it trains."""
        super().setup(batch, data)
        scheme: Any = self._hybrid.scheme
        options = {name: getattr(scheme, name) for name in ("keep", "depths", "chance", "prefix")}
        self.dropping = Dropping(self.student, batch.inputs, **options)
        return self

    @property
    def _hybrid(self) -> HybridLoss:
        (loss,) = self.loss
        assert isinstance(loss, HybridLoss)
        return loss

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        dropping, loss = self.dropping, self._hybrid
        assert dropping is not None
        dropping.active = self.training
        dropping.dice = lambda block, places: uniform(step_bits(batch, places, 1, _LEAVE, self.seed, block))[..., 0]
        try:
            loss.kept = dropping.kept  # filled while the student runs
            return super().forward(batch, turn)
        finally:
            dropping.active, dropping.dice, loss.kept = False, None, []

    def close(self) -> None:
        super().close()
        if self.dropping is not None:
            self.dropping.close()
            self.dropping = None

    def settled(self) -> dict[str, Any]:
        return dict(vars(self._hybrid.scheme))
