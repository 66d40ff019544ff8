"""Be your own teacher (BYOT): a network's deepest classifier teaches classifiers on its shallower layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.labels import class_labels
from limbeck.core.layers import tap_values
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_features, check_logits, check_positive, reduce, widen
from limbeck.core.relations import project
from limbeck.core.trace import Trace
from limbeck.objectives.parts.branches import BottleneckBranch, branch_points


def byot_loss(
    branch_logits: Sequence[Tensor],
    branch_features: Sequence[Tensor],
    logits: Tensor,
    feature: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 0.1,
    beta: float = 1.28e-4,
    temperature: float = 3.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Shallow classifiers learn from the labels, from the deepest classifier's answers, and from its feature.

    .. math::
        L = \sum_k (1 - \alpha)\, \mathrm{CE}(q_k, y) + \alpha\, T^2\, \mathrm{KL}(q^T \,\|\, q^T_k)
            + \beta \left\| F_k - F \right\|_2^2

    with :math:`q^T` the prediction at temperature :math:`T`; what the deepest says is taken as a constant. The deepest
    classifier itself learns from the labels alone, with weight :math:`1 - \alpha`: a cross-entropy beside this loss.

    Args:
        branch_logits: One ``[B, C]`` a branch.
        branch_features: One ``[B, D]`` a branch: what its classifier reads.
        logits: ``[B, C]`` of the deepest classifier; detached.
        feature: ``[B, D]`` that it reads; detached.
        labels: ``[B]`` integers, negative where a sample has no label: it then learns from the deepest alone.
        alpha: Share of distillation; 0.1 in the released code.
        beta: Weight of the hints, squared distances summed over D; that of the released code is 1e-6 on batches of 128.
        temperature: :math:`T`; 3 in the released code.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Branches that do not fit, no labels, or soft ones.
        ConfigError: The temperature is not above zero.

    Source:
        Zhang et al., "Be Your Own Teacher", 2019, arXiv 1905.08094.

    Example:
        >>> import torch
        >>> shallow, deep = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> byot_loss([shallow], [shallow], deep, deep, torch.tensor([0]), beta=0.0)
        tensor(0.6712)
    """
    check_positive(temperature, "temperature")
    if len(branch_logits) != len(branch_features) or not branch_logits:
        found = f"{len(branch_logits)} logits, {len(branch_features)} features"
        raise TensorError("one of each a branch is wanted", where="branch_features", found=found)
    target, labelled = class_labels(labels, logits.shape[-1], "BYOT")
    wanted = soften(logits.detach(), temperature)
    total = wanted.new_zeros(wanted.shape[:-1])
    for own, hint in zip(branch_logits, branch_features, strict=True):
        check_logits(own, logits, target)
        check_features(hint, feature)
        right = -soften(own).gather(-1, target.unsqueeze(-1)).squeeze(-1).masked_fill(~labelled, 0.0)
        divergence = temperature**2 * kl_rows(wanted, soften(own, temperature))
        distance = (widen(hint) - widen(feature.detach())).square().sum(dim=-1)
        total = total + (1 - alpha) * right + alpha * divergence + beta * distance
    return reduce(total, mask, reduction)


@register(
    Card(
        key="byot",
        name="BYOT",
        title="Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation",
        year=2019,
        arxiv="1905.08094",
        knowledge="response",
        equation=r"\sum_k (1 - \alpha)\, \mathrm{CE}(q_k, y) + \alpha\, T^2\, \mathrm{KL}(q^T \,\|\, q^T_k) "
        r"+ \beta \left\| F_k - F \right\|_2^2",
        use="Without a teacher: a network is trained once, with classifiers on its inner layers, dropped afterwards.",
        defaults={
            "alpha": "0.1, as in the released code",
            "beta": "1.28e-4: the released code's 1e-6, on the sum over its batches of 128",
            "temperature": "3, as in the released code",
            "tap": "the student's blocks: last at each resolution or evenly spaced; 3 at most beside the deepest",
        },
        evidence="parity",
        evidence_note="value (less the entropy of the targets) and gradient of the losses of "
        "luanyunteng/pytorch-be-your-own-teacher@8045079, an independent implementation: the authors released none",
        choices=(
            "The divergence where the released code has the cross-entropy, as the paper writes: the same gradient.",
            "Hints are compared everywhere; the released code leaves out where both are negative. No ReLU is there.",
        ),
        needs=("labels",),
        with_labels={"cross_entropy": 0.9},
    ),
    byot_loss,
)
class BYOT(Objective):
    """Self-distillation from the deepest classifier; see ``limbeck.functional.byot_loss``."""

    contract = Contract(normalizer="positions", at_equal=None, decomposes=False, least_samples=2, stop_gradient=True)
    heads: nn.ModuleList | None

    def __init__(
        self, alpha: float = 0.1, beta: float = 1.28e-4, temperature: float = 3.0, tap: str | list[str] = "blocks"
    ) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.alpha, self.beta, self.temperature, self.heads = alpha, beta, temperature, None
        self.taps = [tap] if isinstance(tap, str) else tap
        self.student_taps = (*self.taps, "penultimate", "logits")

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        features, width = tap_values(student, self.taps), student["penultimate"].shape[-1]
        self.points = branch_points(features)
        if len(self.points) < 2:
            raise ConfigError("nothing is shallower than the deepest", where="tap", found=self.taps)
        relu, classes = bool((student["penultimate"] >= 0).all()), student.logits.shape[-1]
        *shallow, deepest = (features[p] for p in self.points)
        self.heads = nn.ModuleList(BottleneckBranch(f, deepest, width, classes, relu).to(f.device) for f in shallow)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        features, heads = tap_values(student, self.taps), self.ready("heads")
        chosen = (features[p] for p in self.points[:-1])
        said = [project(head, f, "student_feature") for head, f in zip(heads, chosen, strict=True)]
        answers, read = zip(*said, strict=True)
        options: dict[str, Any] = {n: getattr(self, n) for n in ("alpha", "beta", "temperature")}
        deepest = student.logits, student["penultimate"], batch.require("labels")
        return byot_loss(answers, read, *deepest, mask=batch.mask, **options)
