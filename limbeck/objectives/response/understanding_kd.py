"""Partial-knowledge teachers: KD from how sure a teacher is, from how it sees classes, or from its first guesses."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_inside, check_logits, check_positive, fit_mask, reduce
from limbeck.core.trace import Trace
from limbeck.objectives.parts.partial_knowledge import classes_alike, confidence_alone, top_alone

Part = Literal["topk", "pt", "sim"]


def understanding_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    part: Part = "topk",
    temperature: float = 4.0,
    top: float = 0.1,
    class_weights: Tensor | None = None,
    sharpness: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence from a target that holds one part of a teacher's knowledge.

    .. math:: L = T^2\, \mathrm{KL}(\rho \| \mathrm{softmax}(z_s / T))

    =========  =========================================================================================================
    part       :math:`\rho`, with :math:`p = \mathrm{softmax}(z_t / T)`
    =========  =========================================================================================================
    ``pt``     :math:`p_y` for the label, the rest even: how sure the teacher is of this sample
    ``sim``    softmax of :math:`\hat W \hat w_y / \alpha T`: how alike classes are by the teacher's weights for them
    ``topk``   the k highest of p, the rest even: both of these, without the noise of the tail
    =========  =========================================================================================================

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; carries no gradient.
        labels: Integers ``[B, *]``, negative where a place has none and does not count; or soft ones.
        part, temperature: See above; T is 4 as for KD here, so that nothing but the target differs.
        top: k, a part of all classes, and one at least.
        class_weights: ``[C, D]`` of the teacher's last layer, for ``sim``.
        sharpness: :math:`\alpha` of ``sim``.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count, ``"sum"`` or ``"none"``.

    Raises:
        TensorError, ConfigError: Shapes, labels or weights do not fit, or an option is out of range.

    Source: Understanding and Improving Knowledge Distillation, arXiv 2002.03532.

    >>> import torch
    >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
    >>> understanding_kd_loss(student, teacher, torch.tensor([0]), part="pt", temperature=1.0)
    tensor(0.2291)
    """
    check_logits(student_logits, teacher_logits)
    check_positive(temperature, "temperature")
    check_inside(top, "top", closed=True)
    classes = student_logits.shape[-1]
    target, known = class_labels(labels, classes, "partial knowledge", others=True, soft=True)
    p = soften(teacher_logits.detach(), temperature).exp()
    if part == "pt":
        goal = confidence_alone(p, target)
    elif part == "topk":
        goal = top_alone(p, max(1, round(top * classes)))
    elif part == "sim":
        found = "none" if class_weights is None else list(class_weights.shape)
        if class_weights is None or class_weights.shape[0] != classes:
            raise TensorError("a row of weights for each class", where="class_weights", found=found, wanted=classes)
        goal = classes_alike(class_weights.detach(), sharpness * temperature)[target].to(p.dtype)
    else:
        raise ConfigError("no such part", where="part", found=repr(part), wanted="'topk', 'pt' or 'sim'")
    values = kl_rows(goal.log(), soften(student_logits, temperature))
    counts = known if mask is None else known & fit_mask(mask, known)
    return temperature**2 * reduce(values, counts, reduction)


@register(
    Card(
        key="understanding_kd",
        name="Partial KD",
        title="Understanding and Improving Knowledge Distillation",
        year=2020,
        arxiv="2002.03532",
        knowledge="response",
        equation=r"T^2\, \mathrm{KL}(\rho \| \mathrm{softmax}(z_s / T)), \qquad \rho \in "
        r"\{\rho_{\mathrm{pt}}, \rho_{\mathrm{sim}}, \rho_{\mathrm{topk}}\}",
        use="To learn what of a teacher's knowledge helps: the controls kd_pt, kd_sim and kd_topk of a comparison.",
        defaults={
            "part": "topk, which the paper finds may beat plain KD",
            "temperature": "4, as for KD here",
            "top": "a tenth of the classes; the paper tunes it",
            "sharpness": "0.1, ours: the paper tunes it",
        },
        evidence="reading",
        evidence_note="targets and gradients against the equations, computed sample by sample; there is no code",
        choices=(
            "The divergence where the paper writes the cross-entropy, and T squared before it, as for KD here.",
            "Sim and pt together are two terms, half of each; the uniform teacher is label_smoothing. A power of "
            "rho_sim is another sharpness; it has the loss's temperature too.",
        ),
        needs=("labels",),
        with_labels={"cross_entropy": 0.1},
        weight=0.9,
    ),
    understanding_kd_loss,
)
class UnderstandingKD(Objective):
    """KD from a part of a teacher's knowledge; see ``limbeck.functional.understanding_kd_loss``.

    Args:
        part: Which: ``topk``, ``pt`` or ``sim``.
        temperature, top, sharpness: As there.

    >>> loss = 0.1 * UnderstandingKD() + 0.9 * UnderstandingKD(part="pt")
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True, temperature="squared")
    student_taps = ("logits",)

    def __init__(self, part: Part = "topk", temperature: float = 4.0, top: float = 0.1, sharpness: float = 0.1) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        check_positive(sharpness, "sharpness")
        check_inside(top, "top", closed=True)
        self.part, self.temperature, self.top, self.sharpness = part, temperature, top, sharpness
        self.teacher_taps = ("logits", "logits@weight") if part == "sim" else ("logits",)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", None)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        if self.part == "sim":
            self.class_weights = teacher["logits@weight"].detach().clone()

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        options = {n: getattr(self, n) for n in ("part", "temperature", "top", "sharpness", "class_weights")}
        more = {"labels": batch.require("labels"), "mask": batch.mask}
        return understanding_kd_loss(student.logits, teacher.logits, **options, **more)  # type: ignore[arg-type]
