"""MiniLM: how the tokens of one layer relate, by queries, keys and values, the same for student and teacher."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows
from limbeck.core.errors import ConfigError
from limbeck.core.layout import unfused
from limbeck.core.objective import Contract, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_floating, check_same_shape, fit_mask, reduce, widen
from limbeck.core.relations import head_scores, pooled
from limbeck.core.trace import Trace

Relation = Literal["attention", "qk", "qq", "kk", "vv"]
Layer = int | list[str]


@without_autocast
def minilm_loss(
    student: Tensor,
    teacher: Tensor,
    student_others: Tensor | None = None,
    teacher_others: Tensor | None = None,
    *,
    heads: int | None = 1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence between self-attention relations: of values with values, of queries with keys, and so on.

    .. math::
        L = \frac 1 {A \, T} \sum_{a=1}^A \sum_{t=1}^T \mathrm{KL}\left( R^T_{a,t} \,\|\, R^S_{a,t} \right), \qquad
        R_a = \mathrm{softmax}\left( X_a Y_a^\top / \sqrt d \right)

    The mean runs over a sample's tokens that count, then over samples, as in the paper.

    Args:
        student: X, ``[B, T, D]``: vectors of all heads side by side. Or maps ``[B, A, T, T]`` (``heads=None``).
        teacher: The same of the teacher; its width may differ, the number of maps may not. Detached.
        student_others, teacher_others: Y, where it is not X.
        heads: A, parts of width d into which X and Y are cut; they need not be those of the attention.
        mask: Booleans ``[B]`` or ``[B, T]``, True where a sample or token counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Other samples or tokens, or a width that the heads do not divide.

    Source: Wang et al., "MiniLM", 2020, arXiv 2002.10957, and "MiniLMv2", 2021, arXiv 2012.15828, equations 5 to 8.

    >>> import torch
    >>> minilm_loss(torch.eye(2).unsqueeze(0), torch.ones(1, 2, 3))
    tensor(0.0612)
    """
    s, t = _scores(student, student_others, heads), _scores(teacher, teacher_others, heads).detach()
    check_same_shape(t, s, "teacher", "student")
    if mask is not None:
        keys = fit_mask(mask, s[:, 0, 0])[:, None, None, :]
        s, t = (scores.masked_fill(~keys, torch.finfo(s.dtype).min / 4) for scores in (s, t))
    values, counts = pooled(kl_rows(t.log_softmax(-1), s.log_softmax(-1)).mean(dim=1).unsqueeze(2), mask)
    return reduce(values.squeeze(1), counts, reduction)


def _scores(x: Tensor, y: Tensor | None, heads: int | None) -> Tensor:
    """``[B, A, T, T]`` before the softmax."""
    check_floating(x, "student or teacher", least=3)
    if heads is None:
        return widen(x).clamp(min=torch.finfo(torch.float32).tiny).log()
    return head_scores(x, x if y is None else y, heads)


@register(
    Card(
        key="minilm",
        name="MiniLM",
        title="MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
        year=2020,
        arxiv="2002.10957",
        code="microsoft/unilm",
        knowledge="relation",
        equation=r"\sum_{R \in \{ QK, VV \}} \frac 1 {A T} \sum_{a,t} \mathrm{KL}(R^T_{a,t} \| R^S_{a,t})",
        use="To compress a transformer of any depth and width, before a task or beside it. MiniLMv2 frees heads too "
        "and needs no maps: (1 / 3) * MiniLM(['qq', 'kk', 'vv']), of a large teacher a few layers below its last.",
        defaults={"relations": "'attention' and 'vv', as in MiniLM", "layer": "the last, as in MiniLM"},
        evidence="parity",
        evidence_note="value and gradient of bloomberg/minilmv2.bb@0d78e20, with padding; no released training code",
        tasks=("language", "text classification"),
        with_labels={"cross_entropy": 1.0},
    ),
    minilm_loss,
)
class MiniLM(Objective):
    """Self-attention relations of one layer, a part of the loss each; see ``limbeck.functional.minilm_loss``.

    Args:
        relations: ``"attention"`` (the maps as the model made them), ``"qk"``, ``"qq"``, ``"kk"``, ``"vv"``.
        layer: The student's layer by number; or the places that make its queries, keys and values, and then its maps.
        teacher_layer: The teacher's, where it is another.
        heads: Of relations. Default: as many as maps; without maps 48 (MiniLMv2's) or the most that divide both widths.
    """

    contract = Contract(normalizer="samples", mask=True)

    def __init__(
        self,
        relations: list[Relation] | None = None,
        layer: Layer = -1,
        teacher_layer: Layer | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        self.relations, self.heads = relations or ["attention", "vv"], heads
        self.student_taps = self._taps(layer)
        self.teacher_taps = self.student_taps if teacher_layer is None else self._taps(teacher_layer)

    def _taps(self, layer: Layer) -> tuple[str, ...]:
        roles = ["queries", "keys", "values", *["attention"] * ("attention" in self.relations)]
        if not isinstance(layer, int) and len(layer) != len(roles):
            raise ConfigError("not one place each", where="layer", found=layer, wanted=", ".join(roles))
        return tuple(f"{role}:{layer}" for role in roles) if isinstance(layer, int) else tuple(layer)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        s, t = _vectors(student, self.student_taps), _vectors(teacher, self.teacher_taps)
        parts: dict[str, Tensor] = {}
        for relation in self.relations:
            a, b = ("maps", "maps") if relation == "attention" else relation
            most = max(h for h in range(1, 49) if math.gcd(s[a].shape[-1], t[a].shape[-1]) % h == 0)
            heads = None if a == "maps" else self.heads or (s["maps"].shape[1] if "maps" in s else most)
            parts[relation] = minilm_loss(s[a], t[a], s[b], t[b], heads=heads, mask=batch.mask)
        return parts


def _vectors(trace: Trace, taps: tuple[str, ...]) -> dict[str, Tensor]:
    """Queries, keys, values and maps; of a fused layer, which stands for the first three, its thirds."""
    found = [trace[tap] for tap in taps]
    return dict(zip(("q", "k", "v", "maps"), (*unfused(*found[:3]), *found[3:]), strict=False))
