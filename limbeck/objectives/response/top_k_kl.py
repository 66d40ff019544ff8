"""Divergence over the teacher's k most probable classes and the tail: all that a sparse teacher tells."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, reduce
from limbeck.core.top_k import TopK
from limbeck.core.trace import Trace
from limbeck.objectives.parts.divergences import Divergence, rows_of


def top_k_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK,
    labels: Tensor | None = None,
    *,
    k: int = 64,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence between predictions in which all classes but the teacher's first k stand for one.

    .. math:: L = T^2 D(\hat p, \hat q), \qquad \hat p = \big(p_{c_1}, \ldots, p_{c_k}, 1 - \sum_i p_{c_i}\big)

    with :math:`p = \mathrm{softmax}(z^T / T)`, :math:`q = \mathrm{softmax}(z^S / T)` and :math:`c_1, \ldots, c_k` the
    teacher's most probable classes. What the student puts elsewhere costs something. Never above :math:`D(p, q)`.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; or ``TopK.of(logits, k, T)``, **at the temperature**. Where that tells of fewer
            classes than C (a padded vocabulary), the student's others do not count. Detached.
        labels: Not used; taken so that all response losses are called alike.
        k: How many classes; all of them where there are fewer. Of logits only.
        divergence: D: ``"forward_kl"``, ``"reverse_kl"``, ``"jsd"``, ``"skew_kl"``, ``"skew_reverse_kl"`` or
            ``"total_variation"``.
        beta: The teacher's share of the mixture in ``"jsd"``.
        skew: The share of the first distribution in the skewed ones.
        temperature: T.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: A setting outside its bounds.

    Source: The form of huggingface/trl. Without a tail: Peng et al., 2024, arXiv 2410.16215.

    >>> import torch
    >>> top_k_kl_loss(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]]), k=1)
    tensor(0.1661)
    """
    rows = rows_of(divergence, beta, skew)
    check_positive(temperature, "temperature")
    if isinstance(teacher_logits, TopK):
        check_logits(student_logits)
        top = teacher_logits
        if top.ids.shape[:-1] != student_logits.shape[:-1] or top.classes > student_logits.shape[-1]:
            raise TensorError(
                "the teacher's classes are not these",
                where="teacher_logits",
                found=f"{list(top.ids.shape)} of {top.classes} classes",
                wanted=f"{[*student_logits.shape[:-1], 'k']} of at most {student_logits.shape[-1]} classes",
            )
    else:
        check_logits(student_logits, teacher_logits, labels)
        check_positive(k, "k")
        top = TopK.of(teacher_logits, min(k, teacher_logits.shape[-1]), temperature)
    student = TopK.at(student_logits[..., : top.classes], top.ids, temperature)
    values = rows(top.buckets().detach().to(student.log_probs.dtype), student.buckets())
    return temperature**2 * reduce(values, mask, reduction)


@register(
    Card(
        key="top_k_kl",
        name="Top-k KL with a tail",
        title="Pre-training Distillation for Large Language Models: A Design Space Exploration",
        year=2024,
        arxiv="2410.16215",
        code="huggingface/trl",
        knowledge="response",
        equation=r"T^2 D(\hat p, \hat q), \quad \hat p = (p_{c_1}, \ldots, p_{c_k}, 1 - \sum_i p_{c_i})",
        use="For language models whose teacher is a cache or server that tells its first k tokens only: source 'top_k' "
        "reads them without making logits of them. With a vocabulary too large for the student's logits: fused_kl.",
        defaults={
            "k": "64: in language models nearly all probability, and what other tools take",
            "beta": "0.5, the symmetric divergence",
            "skew": "0.1, DistiLLM's value",
            "temperature": "1, that of recorded predictions",
        },
        evidence="parity",
        evidence_note="value and gradient of huggingface/trl@f2cd577 (compute_divergence over add_tail_bucket, at the "
        "teacher's classes)",
        choices=(
            "The tail is one more class, as TRL has it; the paper makes what is left sum to one again.",
            "A record is softened as if its tail were spread evenly; at temperature 1 nothing is assumed.",
        ),
        tasks=("classification", "language"),
        with_labels={"cross_entropy": 1.0},
    ),
    top_k_kl_loss,
)
class TopKKL(Objective):
    """Divergence over k classes and the tail; see ``limbeck.functional.top_k_kl_loss`` for the other options.

    Args:
        source: ``"logits"``, of which the first k are taken, or ``"top_k"``: the classes that a cache holds.

    >>> loss = TopKKL(k=16, divergence="reverse_kl")
    """

    contract = Contract(normalizer="positions", mask=True, temperature="squared", spare_class=True)
    student_taps = ("logits",)

    def __init__(
        self,
        k: int = 64,
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        skew: float = 0.1,
        temperature: float = 1.0,
        source: str = "logits",
    ) -> None:
        super().__init__()
        rows_of(divergence, beta, skew)
        check_positive(k, "k")
        check_positive(temperature, "temperature")
        if source not in ("logits", "top_k"):
            raise ConfigError("no such source", where="source", found=repr(source), wanted="'logits' or 'top_k'")
        if divergence == "total_variation":  # which falls as 1 / T, so that T^2 does not keep its size
            self.contract = replace(self.contract, temperature=None)  # type: ignore[misc]
        self.teacher_taps = (source,)
        self.k, self.divergence, self.beta, self.skew, self.temperature = k, divergence, beta, skew, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        said = teacher[self.teacher_taps[0]]
        said = said.softened(self.temperature) if isinstance(said, TopK) else said
        options = {n: getattr(self, n) for n in ("k", "divergence", "beta", "skew", "temperature")}
        return top_k_kl_loss(student.logits, said, mask=batch.mask, **options)
