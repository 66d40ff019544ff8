"""Token-level relationship graphs (TRG): patches of all the batch's images, by who is near to whom."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.layout import aligned, to_tokens
from limbeck.core.matching import only
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_floating, check_positive, check_same_shape, fit_mask, reduce, widen
from limbeck.core.relations import channel_dim, cosines, gram, pooled, squared_distances
from limbeck.core.schedules import Cosine
from limbeck.core.trace import Trace


@without_autocast
def trg_loss(
    student_tokens: Tensor,
    teacher_tokens: Tensor,
    embeddings: tuple[Tensor, Tensor] | None = None,
    *,
    neighbours: int = 16,
    sigma: float | None = None,
    own_neighbours: bool = False,
    from_teacher: bool = False,
    tau: float | Tensor = 0.07,
    weights: tuple[float, float, float] = (1.0, 1.0, 0.5),
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How tokens of one image relate, who neighbours whom among tokens of all images, and which token is which.

    .. math::
        L &= \alpha \, \mathrm{MSE}(C^T, C^S) + \frac 1 n \sum_i \left[ \beta \, \mathrm{KL}\left(
            \mathrm{softmax}_j A^S_{ij} \,\|\, \mathrm{softmax}_j A^T_{ij} \right) - \gamma \log
            \frac{e^{\cos(z^S_i, z^T_i) / \tau}}{\sum_j e^{\cos(z^S_i, z^T_j) / \tau}} \right] \\
        C &= \mathrm{softmax}\left( F F^\top / \sqrt D \right), \qquad
        A_{ij} = e^{-\|x_i - x_j\|^2 / 2 \sigma} \text{ where i is of the k nearest to j, else } 0

    C is of one image, A and the contrast of the n tokens at ``positions`` of all; they tie the batch together.

    Args:
        student_tokens: ``[B, N, D]``.
        teacher_tokens: The same places, of any width; detached.
        embeddings: z of both, ``[B, N, E]``, by learned projections; without them there is no contrast.
        neighbours: k; at most the other tokens there are.
        sigma: Default each side's mean squared distance, as a constant.
        own_neighbours: The student's graph has its own neighbours instead of the teacher's.
        from_teacher: The divergence of the student from the teacher, instead of the other way round.
        tau: Of the contrast.
        weights: :math:`\alpha, \beta, \gamma`.
        positions: ``[m]``, the places in the graph; default all.
        mask: Booleans ``[B]`` or ``[B, N]``, True where a sample or token counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Source: Zhang, Liu and He, "Knowledge Distillation via Token-level Relationship Graph", 2023, arXiv 2306.12442.

    >>> import torch
    >>> trg_loss(torch.eye(2).unsqueeze(0), torch.zeros(1, 2, 3), weights=(1.0, 0.0, 0.0))
    tensor(0.0288)
    """
    check_floating(student_tokens, "student_tokens", least=3)
    check_floating(teacher_tokens, "teacher_tokens", least=3)
    check_same_shape(student_tokens[..., 0], teacher_tokens[..., 0], "student_tokens", "teacher_tokens")
    check_positive(neighbours, "neighbours")
    s, t = widen(student_tokens), widen(teacher_tokens.detach())
    counts = torch.ones_like(s[..., 0], dtype=torch.bool) if mask is None else fit_mask(mask, s[..., 0])
    maps = [only(gram(x) / x.shape[2] ** 0.5, counts.unsqueeze(1)).softmax(dim=2) for x in (s, t)]
    inner = (maps[0] - maps[1]).square().sum(dim=2) / counts.sum(dim=1, keepdim=True).clamp(min=1)
    chosen = torch.arange(s.shape[1], device=s.device) if positions is None else positions
    there = counts[:, chosen]
    pairs = there.flatten() & ~torch.eye(there.numel(), dtype=torch.bool, device=s.device) & there.flatten()[:, None]
    lengths = [squared_distances(x[:, chosen].flatten(0, 1)) for x in (s, t)]
    log_a = []
    for d, by in zip(lengths, lengths if own_neighbours else lengths[1:] * 2, strict=True):
        spread, by_spread = ((x.detach() * pairs).sum() / pairs.sum().clamp(min=1) for x in (d, by))
        farthest = -only(-by, pairs).topk(min(neighbours, max(len(d) - 1, 1)), dim=1).values[:, -1:]
        close = (by <= farthest + 1e-5 * by_spread) & pairs  # of equally near tokens all count
        width = spread.masked_fill(spread == 0, 1.0) if sigma is None else sigma
        log_a.append(only((-d / (2 * width)).exp() * close.T, there.flatten()).log_softmax(dim=1))
    graph = weights[1] * kl_rows(*(reversed(log_a) if from_teacher else log_a))
    if embeddings is not None:
        scores = only(cosines(*(widen(z)[:, chosen].flatten(0, 1) for z in embeddings)) / tau, there.flatten())
        graph = graph + weights[2] * (scores.logsumexp(dim=1) - scores.diagonal())
    each = weights[0] * pooled(inner.unsqueeze(2), counts)[0] + pooled(graph.view(*there.shape, 1), there)[0]
    return reduce(each.squeeze(1), counts.any(dim=1), reduction)


@register(
    Card(
        key="trg",
        name="TRG",
        title="Knowledge Distillation via Token-level Relationship Graph",
        year=2023,
        arxiv="2306.12442",
        knowledge="relation",
        equation=r"\alpha L_\mathrm{inner} + \beta L_\mathrm{local} + \gamma L_\mathrm{global}",
        use="For images, also of unbalanced classes, which share patterns of patches. Wants large batches.",
        defaults={"samples": "16; open in the summary, as are neighbours, weights and tau"},
        evidence="reading",
        choices=(
            "Equations after a summary of the paper; both graphs have the teacher's neighbours; cells are places.",
        ),
        with_labels={"cross_entropy": 1.0, "kd": 1.0},
    ),
    trg_loss,
)
class TRG(LayerObjective):
    """Token-level relationship graphs; see ``limbeck.functional.trg_loss``.

    Args:
        tap: Maps or tokens; of maps of two sizes the larger is pooled. teacher_tap: The teacher's, where others.
        samples: How many places are in the graph, drawn at each step, the same of all images.
        last_tau: :math:`\\tau` at the end of training; ``tau`` is that at its start, for coarse structure first.
    """

    contract = Contract(normalizer="samples", at_equal=None, mask=True, decomposes=False, stop_gradient=True)

    def __init__(
        self, tap: Tap = "stages:-1", teacher_tap: Tap | None = None, samples: int = 16, neighbours: int = 16,
        own_neighbours: bool = False, from_teacher: bool = False, tau: float = 0.5, last_tau: float = 0.07,
        weights: tuple[float, float, float] = (1.0, 1.0, 0.5),
    ) -> None:  # fmt: skip
        super().__init__(tap, teacher_tap)
        check_positive(min(tau, last_tau), "tau")
        self.samples, self.tau, self.last_tau = samples, tau, last_tau
        flags = {"own_neighbours": own_neighbours, "from_teacher": from_teacher}
        self.options: dict[str, Any] = {"neighbours": neighbours, "weights": weights, **flags}
        self.embed: nn.ModuleList | None = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        pair = self.pair(student, teacher)
        self.embed = nn.ModuleList(LinearProjector(f.shape[channel_dim(f)], 128).to(f.device) for f in pair)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = (to_tokens(f) for f in aligned(*self.pair(student, teacher)))
        g_s, g_t = self.ready("embed")
        places = torch.randperm(s.shape[1], device=s.device)[: self.samples]
        tau = Cosine(self.tau, self.last_tau)(batch.progress).to(s.device)
        return trg_loss(s, t, (g_s(s), g_t(t)), positions=places, tau=tau, mask=batch.mask, **self.options)
