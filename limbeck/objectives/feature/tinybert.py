"""TinyBERT: attention scores, hidden states and embeddings of a transformer, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.layout import unfused
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.pairing import Mapping, pair_layers
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_features, check_positive, fit_mask, reduce, widen
from limbeck.core.relations import head_scores, pooled, project
from limbeck.core.trace import Trace

_SCORES = ("queries", "keys")


@without_autocast
def tinybert_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    student_scores: Sequence[Tensor] = (),
    teacher_scores: Sequence[Tensor] = (),
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distances between states and between attention scores, summed over layers.

    .. math:: L = \sum_{m=0}^M \mathrm{MSE}\left( H^S_m W, H^T_{g(m)} \right)
        + \sum_{m=1}^M \mathrm{MSE}\left( A^S_m, A^T_{g(m)} \right), \qquad A = Q K^\top / \sqrt d

    Scores stand before the softmax. An MSE is the mean over width or heads, a sample's places (or pairs), samples.

    Args:
        student_states, teacher_states: :math:`H^S W` and as many of the teacher's, ``[B, T, D]`` each; embeddings, too.
        student_scores, teacher_scores: ``[B, A, T, T]`` each. What is the teacher's is detached.
        mask: ``[B]`` or ``[B, T]`` booleans, True: it counts.
        reduction: ``"mean"`` over samples that count, ``"sum"`` or ``"none"`` (``[B]``).

    Raises:
        TensorError: Other numbers or shapes, or nothing to compare.

    Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2019, arXiv 1909.10351.

    >>> import torch
    >>> tinybert_loss([torch.ones(1, 2, 3)], [torch.zeros(1, 2, 3)])
    tensor(1.)
    """
    numbers = len(student_states), len(student_scores)
    if numbers != (len(teacher_states), len(teacher_scores)) or not any(numbers):
        raise TensorError("layers are compared in pairs", where="student_states", found=numbers, wanted="pairs")
    values = [_distance(s, t, mask) for s, t in zip(student_states, teacher_states, strict=True)]
    values += [_distance(s, t, mask, scores=True) for s, t in zip(student_scores, teacher_scores, strict=True)]
    return reduce(sum(values[1:], values[0]), None if mask is None else mask.reshape(len(mask), -1).any(1), reduction)


def _distance(student: Tensor, teacher: Tensor, mask: Tensor | None, *, scores: bool = False) -> Tensor:
    """The mean square over a sample's places, or over pairs of them, ``[B]``."""
    check_features(student, teacher, least=3 + scores)
    gaps = (widen(student) - widen(teacher.detach())).square().mean(dim=1 if scores else -1)
    counts = None if mask is None else fit_mask(mask, gaps[..., 0] if scores else gaps)
    if counts is not None and scores:
        counts = (counts.unsqueeze(-1) & counts.unsqueeze(-2)).flatten(1)
    return pooled(gaps.flatten(1).unsqueeze(2), counts)[0].squeeze(1)


@register(
    Card(
        key="tinybert",
        name="TinyBERT",
        title="TinyBERT: Distilling BERT for Natural Language Understanding",
        year=2019,
        arxiv="1909.10351",
        code="huawei-noah/Pretrained-Language-Model",
        knowledge="feature",
        equation=r"\sum_{m=0}^M \mathrm{MSE}(H^S_m W, H^T_{g(m)}) + \sum_{m=1}^M \mathrm{MSE}(A^S_m, A^T_{g(m)})",
        use="To compress a BERT into fewer and narrower layers with as many heads; KD comes after it (hint_then_kd).",
        defaults={
            "mapping": "'skip', the paper's uniform mapping",
            "heads": "as many as attention maps, which transformers models give with attn_implementation='eager'",
        },
        evidence="parity",
        evidence_note="intermediate losses of task_distill.py, huawei-noah/Pretrained-Language-Model@0598f02",
        choices=(
            "One linear map for all layers and the embeddings, as in the authors' code; none where widths agree.",
            "Scores from queries and keys; models that turn those by position (rotary) are compared before that.",
            "Padding does not count; the authors' code counts its queries.",
        ),
        tasks=("text classification", "language"),
        with_labels={"kd": 1.0},
        scheme="hint_then_kd",
    ),
    tinybert_loss,
)
class TinyBERT(Objective):
    """States and scores, a part of the loss each; see ``limbeck.functional.tinybert_loss``.

    Args:
        mapping: Which of the teacher's layers: ``"skip"`` (every so many) or ``"last"``.
        heads: Of both models' attention.
        embeddings: Compare what enters the first block, too.

    >>> loss = TinyBERT(heads=12)
    """

    contract = Contract(normalizer="samples", mask=True)
    projector: nn.Module | None

    def __init__(self, mapping: Mapping = "skip", heads: int | None = None, embeddings: bool = True) -> None:
        super().__init__()
        if heads is not None:
            check_positive(heads, "heads")
        pair_layers(1, 1, mapping)
        self.mapping, self.heads, self.embeddings, self.projector = mapping, heads, embeddings, None
        self.student_taps = (*["blocks:0@in"] * embeddings, "blocks", *_SCORES, *["attention"] * (heads is None))
        self.teacher_taps = self.student_taps

    def opening(self) -> Objective:
        """All of it comes first; the prediction is learned after it."""
        return self

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        for name, blocks in (("student", student["blocks"]), ("teacher", teacher["blocks"])):
            if blocks[0].ndim != 3 or len({state.shape for state in blocks}) > 1:
                raise TensorError("its blocks do not all give one [B, T, D]", where=name)
        wide, goal = (trace["blocks"][0].shape[-1] for trace in (student, teacher))
        self.projector = nn.Identity() if wide == goal else nn.Linear(wide, goal, device=student["blocks"][0].device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        layer, scores = self.ready("projector"), (self._scores(student), self._scores(teacher))
        pairs = pair_layers(len(scores[0]), len(scores[1]), self.mapping)
        states = [(student["blocks"][i], teacher["blocks"][j]) for i, j in pairs]
        if self.embeddings:
            states.append((student["blocks:0@in"], teacher["blocks:0@in"]))
        own, other = [project(layer, s, "student_states") for s, _ in states], [t for _, t in states]
        maps = [scores[0][i] for i, _ in pairs], [scores[1][j] for _, j in pairs]
        parts = {"states": (own, other), "scores": ([], [], *maps)}
        return {name: tinybert_loss(*layers, mask=batch.mask) for name, layers in parts.items()}

    def _scores(self, trace: Trace) -> list[Tensor]:
        """Of each layer, ``[B, A, T, T]``."""
        layers = [unfused(q, k, k)[:2] for q, k in zip(trace["queries"], trace["keys"], strict=True)]
        heads = self.heads or trace["attention"][0].shape[1]
        return [head_scores(q, k, heads) for q, k in layers]
