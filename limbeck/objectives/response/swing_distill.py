"""Swing distillation: a temperature for each token, and noise where it may be private."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import TensorError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_logits, reduce, widen
from limbeck.core.trace import Trace
from limbeck.objectives.parts.privacy import Mode, blurred, check_swing, compiled_pattern, scores_of, token_scores


def swing_distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    privacy: Tensor,
    index: Tensor | None = None,
    temperature: float = 1.0,
    hottest: float = 10.0,
    epsilon: float | None = 10.0,
    mode: Mode = "up",
    seed: int = 0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KL divergence from predictions that are flattened and blurred the more, the more private a place is.

    .. math:: L = T_0^2\, \mathrm{KL}\left( \hat p \,\|\, \mathrm{softmax}(z^S / T) \right), \qquad
        \hat p \propto \max(0, \mathrm{softmax}(z^T / T) + \eta), \quad
        T = T_0 + (T_{max} - T_0) \rho, \quad \eta \sim \mathrm{Laplace}(0, \rho / \epsilon)

    Where nothing is private this is KD. A place's noise is the same in every epoch: training long does not average it
    away. There is no formal guarantee: nothing bounds how much one text changes the teacher.

    Args:
        student_logits, teacher_logits: ``[B, *, C]``; the teacher's are detached.
        labels: Not used; taken so that all response losses are called alike.
        privacy: :math:`\rho`, ``[B, *]`` from 0 to 1: whether the token that a place predicts is private.
        index: ``[B]``, numbers of the samples, which their noise goes by; ``None``: their order.
        temperature: :math:`T_0`, of what is not private.
        hottest: :math:`T_{max}`, of what is.
        epsilon: The budget; ``None``: no noise.
        mode: ``"up"``; with ``"down"`` private places are sharpened instead, by as much.
        seed: Of the noise.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: An option that cannot be.

    Source: "Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework", 2022, arXiv 2212.08349.

    >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> swing_distill_loss(student, teacher, privacy=torch.zeros(1))
    tensor(1.5232)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_swing(temperature, hottest, epsilon, mode)
    if privacy.shape != student_logits.shape[:-1] or not privacy.is_floating_point():
        found, wanted = f"{list(privacy.shape)} {privacy.dtype}", f"{list(student_logits.shape[:-1])} floating"
        raise TensorError("scores do not belong to these logits", where="privacy", found=found, wanted=wanted)
    z, rho = widen(student_logits), privacy.detach().clamp(0, 1).unsqueeze(-1)
    rho = rho.to(z.dtype)
    heat = temperature + (hottest - temperature) * rho
    heat = heat if mode == "up" else temperature**2 / heat
    log_p = soften(teacher_logits.detach(), heat)
    if epsilon is not None:
        log_p = torch.where(rho > 0, blurred(log_p.exp(), rho / epsilon, index, seed).log(), log_p)
    values = kl_rows(log_p, soften(z, heat))
    return temperature**2 * reduce(values, mask, reduction)


@register(
    Card(
        key="swing_distill",
        name="Swing Distillation",
        title="Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework",
        year=2022,
        arxiv="2212.08349",
        knowledge="response",
        equation=r"T_0^2\,\mathrm{KL}(\hat p \| q), \quad \hat p \propto \max(0, p_T + \eta), \quad "
        r"T = T_0 + (T_{max} - T_0) \rho",
        use="For teachers that were trained on private texts: what they memorised does not reach the student. Measure "
        "with `limbeck.analysis.canary_exposure`. Labels beside it teach private tokens of the texts at hand.",
        defaults={"hottest": "10: left open", "epsilon": "10: left open", "mode": "up, which flattens"},
        evidence="reading",
        choices=(
            "Only the abstract was read: a temperature by token, noisy targets, a budget; formulas are ours.",
            "The factor is that of places that are not private, so that private ones have no larger gradients.",
            "Noise is drawn once for each sample and place.",
        ),
        tasks=("language", "privacy"),
        with_labels={"cross_entropy": 0.5},
        weight=0.5,
    ),
    swing_distill_loss,
)
class SwingDistill(Objective):
    """Swing distillation; see ``limbeck.functional.swing_distill_loss`` for the other options.

    What is private is told by ``batch.extras["privacy"]``; or, with a second teacher that has not seen the private
    texts (``SeveralTeachers([teacher, reference])``), by how much more the first expects a token; or by a pattern.

    Args:
        pattern: Tokens that this regular expression matches are private.

    >>> loss = SwingDistill(pattern=r"[0-9]")
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(
        self, pattern: str | None = None, temperature: float = 1.0, hottest: float = 10.0,
        epsilon: float | None = 10.0, mode: Mode = "up", seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_swing(temperature, hottest, epsilon, mode)
        compiled_pattern(pattern or "")
        self.temperature, self.hottest, self.epsilon, self.mode, self.seed = temperature, hottest, epsilon, mode, seed
        self.pattern = pattern
        self.register_buffer("table", None, persistent=False)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        if self.pattern is not None:
            self.table = token_scores(data.tokenizers, self.pattern).to(student.logits.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        options = {name: getattr(self, name) for name in ("temperature", "hottest", "epsilon", "mode", "seed")}
        options |= {"privacy": scores_of(teacher, batch, self.table if self.pattern is None else self.ready("table"))}
        return swing_distill_loss(student.logits, teacher.logits, index=batch.index, mask=batch.mask, **options)
