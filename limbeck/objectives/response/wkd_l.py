"""Wasserstein distillation of logits (WKD-L): wrong classes cost less the more they are like the right ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import log_among_others, soften
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce, widen
from limbeck.core.relations import cosines, gram
from limbeck.core.trace import Trace


@without_autocast
def wkd_l_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, cost: Tensor, *, gamma: float = 600.0,
    temperature: float = 8.0, epsilon: float = 0.05, iterations: int = 10, mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    r"""Cross-entropy of the target class, and what it costs to turn one view of the other classes into the other's.

    .. math::
        L = -p^T_y \log p^S_y + \gamma \sum_{ij} q_{ij} c_{ij}, \quad q_{ij} = u_i\, e^{-c_{ij} / \varepsilon} v_j,
        \quad \sum_j q_{ij} = \hat p^S_i, \ \sum_i q_{ij} = \hat p^T_j

    :math:`p` is the softmax, :math:`\hat p` that of the other classes alone at temperature T, :math:`q` the entropic
    transport plan, by Sinkhorn's iterations; gradients flow through them. Not 0 at equality.

    Args:
        student_logits, teacher_logits: ``[B, *, C]`` with two classes or more; the teacher's are detached.
        labels: Integers ``[B, *]``, negative where a place has no label; such a place does not count.
        cost: :math:`c`, ``[C, C]``, from 0 to about 1: ``class_costs``.
        gamma, temperature: Of the transport; 600 and 8 in the authors' run on CIFAR-100, 30 and 2 on ImageNet.
        epsilon, iterations: Weight of the plan's entropy, and how often it is scaled; 0.05 and 10 in the authors' code.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises: TensorError: No labels, soft labels, fewer than two classes, or shapes that differ.
    Source: Lv et al., "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation", 2024.

    >>> student, teacher = torch.tensor([[9.0, 0.0, 8.0]]), torch.tensor([[9.0, 8.0, 0.0]])
    >>> wkd_l_loss(student, teacher, torch.tensor([0]), 1 - torch.eye(3), gamma=1.0, temperature=1.0)
    tensor(1.2284)
    """
    check_logits(student_logits, teacher_logits, labels)
    for name, value in {"temperature": temperature, "epsilon": epsilon, "iterations": iterations}.items():
        check_positive(value, name)
    target, labelled = class_labels(labels, student_logits.shape[-1], "WKD-L", others=True)
    if cost.shape != student_logits.shape[-1:] * 2:
        raise TensorError("not a cost for each two classes", where="cost", found=list(cost.shape), wanted="[C, C]")
    student, teacher = widen(student_logits), widen(teacher_logits.detach())
    sure, own = (soften(z).gather(-1, target.unsqueeze(-1)).squeeze(-1) for z in (teacher, student))
    a, b = (log_among_others(z / temperature, target).exp() for z in (student, teacher))
    cost = cost.detach().to(a.dtype)
    kernel = (-cost / epsilon).clamp(min=-40.0).exp()  # so that squares of the scalings stay in float32
    u = torch.ones_like(a).scatter(-1, target.unsqueeze(-1), 0.0) / max(a.shape[-1] - 1, 1)
    v = u
    for _ in range(int(iterations)):
        v = b / (u @ kernel + 1e-30)
        u = a / (v @ kernel.mT + 1e-30)
    values = ((u @ (kernel * cost)) * v).sum(dim=-1) * gamma - sure.exp() * own
    return reduce(values, labelled if mask is None else labelled & fit_mask(mask, values), reduction)


def class_costs(rows: Tensor, sharpness: float = 1.0) -> Tensor:
    r"""What classes cost each other, ``[C, C]``: :math:`1 - e^{-\kappa (1 - r)}`, where r says how alike they are.

    From one vector a class, ``[C, D]``: their cosine; from as many images of each, ``[C, n, D]``: linear CKA.
    >>> class_costs(torch.eye(2))
    tensor([[0.0000, 0.6321],
            [0.6321, 0.0000]])
    """
    if rows.ndim == 3:
        rows = gram(rows - rows.mean(dim=1, keepdim=True)).flatten(1)  # the cosine of Gram matrices is CKA
    return (1 - (-sharpness * (1 - cosines(widen(rows.detach()))).clamp(min=0)).exp()).fill_diagonal_(0.0)


@register(
    Card(
        key="wkd_l", name="WKD-L",
        title="Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation", year=2024,
        arxiv="2412.08139", code="JiamingLv/WKD", knowledge="response",
        equation=r"-p^T_y \log p^S_y + \gamma \sum_{ij} q_{ij} c_{ij}, \quad q = \mathrm{Sinkhorn}(\hat p^S, "
        r"\hat p^T, e^{-c / \varepsilon}), \quad c_{ij} = 1 - e^{-\kappa (1 - r_{ij})}",
        use="Where classes are more or less alike, as in fine-grained tasks; no more than a few thousand of them.",
        defaults={
            "relations": "the classifier's weights, which need no pass; CKA of images' features is the paper's best",
            "gamma": "600 at temperature 8, the authors' run from ResNet-32x4 to ResNet-8x4; 30 at 2 on ImageNet",
            "epsilon": "0.05, as in the authors' code; so iterations, 10, and sharpness, 1",
        },
        evidence="parity",
        evidence_note="value and gradient (float32) of JiamingLv/WKD@214cf88, with its costs by classifier and by CKA",
        choices=("All samples share one kernel, in which the target has no mass: no [B, C, C] is made.",
                 "The authors let gamma fall by a cosine from epoch 150 of 240; here it is constant."),
        needs=("labels",), with_labels={"cross_entropy": 1.0},
    ),
    wkd_l_loss,
)  # fmt: skip
class WKDL(Objective):
    """Wasserstein distillation of logits; see ``limbeck.functional.wkd_l_loss`` for options that do not stand here.

    Args:
        relations: How alike classes are: by the teacher's ``"classifier"`` weights, or by ``"cka"`` between features
            of their images, for which ``setup`` runs the teacher over the training set once.
        temperature: Of the other classes. iterations: Of Sinkhorn's algorithm. sharpness: Of the costs.
        images: How many of each class CKA looks at; the authors take all.
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True)
    student_taps = ("logits",)

    def __init__(
        self, relations: Literal["classifier", "cka"] = "classifier", gamma: float = 600.0, temperature: float = 8.0,
        epsilon: float = 0.05, iterations: int = 10, sharpness: float = 1.0, images: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        check_positive(temperature, "temperature")
        if relations not in ("classifier", "cka"):
            raise ConfigError("no such relations", where="relations", found=relations, wanted="'classifier' or 'cka'")
        self.teacher_taps = "logits", "logits@weight" if relations == "classifier" else "penultimate"
        self.gamma, self.temperature, self.epsilon, self.iterations = gamma, temperature, epsilon, iterations
        self.sharpness, self.images = sharpness, images

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        weight = teacher["logits@weight"] if "logits@weight" in self.teacher_taps else None
        rows = self._images(data, teacher.logits.shape[-1]) if weight is None else weight
        self.register_buffer("cost", class_costs(rows, self.sharpness))

    def _images(self, data: DataInfo, classes: int) -> Tensor:
        told = [(t["penultimate"].flatten(0, -2), b.require("labels")) for t, b in data.all_answers("wkd_l.cost")]
        rows, labels = (torch.cat(part) for part in zip(*told, strict=True))
        order = labels.flatten().argsort(stable=True)[int((labels < 0).sum()) :]  # those without a label come first
        counts = labels[labels >= 0].bincount(minlength=classes)
        start, number = counts.cumsum(0) - counts, min(int(counts.min()), self.images)
        if number < 2:
            raise ConfigError("a class has too few images", where="relations", found=number, wanted="2 or more")
        return rows[order[start.unsqueeze(1) + torch.arange(number, device=start.device)]]

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        options = {n: getattr(self, n) for n in ("gamma", "temperature", "epsilon", "iterations")}
        given = student.logits, teacher.logits, batch.require("labels"), self.ready("cost")
        return wkd_l_loss(*given, mask=batch.mask, **options)
