"""BD-KD: a large model and a small one learn together; each sample balances the small one's two divergences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.divergences import cross_entropy_rows, kl_rows, soften
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, Objective, Terms
from limbeck.core.reduction import Reduction, check_inside, check_logits, check_positive, reduce
from limbeck.core.teacher import Teacher
from limbeck.core.trace import Trace
from limbeck.engine.stage import Stage
from limbeck.objectives.response.reverse_kl import reverse_kl_loss
from limbeck.schemes.online.mutual import Cohort
from limbeck.schemes.scheme import Cast, Scheme, Training, register

Way = Literal["balanced", "forward", "reverse", "sum"]


def bd_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    delta: float = 2.0,
    nu: float = 1.0,
    way: Way = "balanced",
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Forward and reverse KL, weighed sample by sample by who of the two is the surer one.

    .. math::
        L = T^2 \left( w^f\, \mathrm{KL}(p^t \| p^s) + w^r\, \mathrm{KL}(p^s \| p^t) \right), \qquad
        (w^f, w^r) = \begin{cases} (\nu, \delta) & H(p^s) > H(p^t) \\ (\delta, \nu) & \text{else} \end{cases}

    A student that is less sure than its teacher gets more of the reverse divergence, which sharpens; one that is surer
    gets more of the forward one, which spreads. Entropies are those at temperature 1; weights carry no gradient.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        delta: The larger weight.
        nu: The smaller one.
        way: ``"balanced"``; or, for comparison, ``"forward"`` or ``"reverse"`` alone, or their ``"sum"``.
        temperature: :math:`T`.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"``.

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: A negative weight, no such way, or a temperature that is not above zero.

    Source: BD-KD: Balancing the Divergences for Online Knowledge Distillation, arXiv 2212.12965.

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]).log()
    >>> bd_kd_loss(student, teacher, temperature=1.0)  # 1 * 0.368 + 2 * 0.511
    tensor(1.3897)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature, "temperature")
    _check(delta, nu, way)
    teacher_logits = teacher_logits.detach()
    log_p, log_q = soften(teacher_logits, temperature), soften(student_logits, temperature)
    values = torch.zeros_like(log_q[..., 0])
    forward, reverse = _weights(student_logits, teacher_logits, delta, nu, way)
    if way != "reverse":
        values = values + forward * kl_rows(log_p, log_q)
    if way != "forward":
        values = values + reverse * kl_rows(log_q, log_p)
    return temperature**2 * reduce(values, mask, reduction)


@torch.no_grad()
def _weights(
    student: Tensor, teacher: Tensor, delta: float, nu: float, way: Way
) -> tuple[Tensor | float, Tensor | float]:
    """Weights of the forward and of the reverse divergence, ``[B, *]`` each; 1 where they are not balanced."""
    if way != "balanced":
        return 1.0, 1.0
    log_q, log_p = soften(student), soften(teacher)
    unsure = cross_entropy_rows(log_q.exp(), log_q) > cross_entropy_rows(log_p.exp(), log_p)
    small, large = torch.full_like(log_q[..., 0], nu), torch.full_like(log_q[..., 0], delta)
    return torch.where(unsure, small, large), torch.where(unsure, large, small)


def _check(delta: float, nu: float, way: str) -> None:
    for name, value in (("delta", delta), ("nu", nu)):
        check_inside(value, name, 0.0, float("inf"), closed=True)
    if way not in ("balanced", "forward", "reverse", "sum"):
        wanted = "'balanced', 'forward', 'reverse' or 'sum'"
        raise ConfigError("no such way", where="way", found=repr(way), wanted=wanted)


class Balanced(Objective):
    """What the student asks of its teacher; see :func:`bd_kd_loss`."""

    contract = Contract(normalizer="positions", mask=True, stop_gradient=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, delta: float, nu: float, way: Way, temperature: float) -> None:
        super().__init__()
        self.loss = partial(bd_kd_loss, delta=delta, nu=nu, way=way, temperature=temperature)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return self.loss(student.logits, teacher.logits, mask=batch.mask)


class Reversed(Objective):
    """What a large model asks of the student: the divergence from itself, beta times."""

    contract = Contract(normalizer="positions", mask=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, beta: float, temperature: float) -> None:
        super().__init__()
        self.beta, self.temperature = beta, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return self.beta * reverse_kl_loss(
            student.logits, teacher.logits, temperature=self.temperature, mask=batch.mask
        )


@register(
    Card(
        key="bd_kd",
        name="BD-KD",
        title="BD-KD: Balancing the Divergences for Online Knowledge Distillation",
        year=2022,
        arxiv="2212.12965",
        knowledge="scheme",
        equation=r"L_s = CE + T^2 (w^f KL(p^t \| p^s) + w^r KL(p^s \| p^t)), \quad "
        r"L_t = CE + \beta T^2 KL(p^t \| p^s)",
        use="Where the large model is not trained yet and the small one's confidence is to be trusted: both learn at "
        "once, and the small one ends better calibrated. The loss of the recipe is each model's own.",
        defaults={
            "peers": "one large model, a player called peer",
            "delta": "2, and nu 1: the text at hand gives no numbers",
            "beta": "1, as no number is given",
            "temperature": "4, as in KD: no number is given",
        },
        evidence="reading",
        evidence_note="weights, values and gradients against the definition; its special case equals mutual learning "
        "bit for bit",
        choices=(
            "The abstract and a summary were read, not the paper: the rule (who is less sure gets more of the reverse "
            "divergence) is theirs, its two numbers are not.",
            "Entropies are those at temperature 1; where both are equal the student counts as the surer one.",
            "The large model's divergence is the reverse one from where it stands, KL of itself to the student.",
            "Both take their step together, with one optimizer, on predictions of the same moment.",
            "Of several large models each learns from all others, and divergences are averaged.",
        ),
    )
)
class BDKD(Scheme):
    r"""One training of a small student and one or more large models, all from the start.

    .. math:: L_s = L_{\text{loss}} + T^2 \left( w^f KL(p^t \| p^s) + w^r KL(p^s \| p^t) \right), \qquad
        L_t = L_{\text{loss}} + \beta T^2 KL(p^t \| p^s)

    Every loss moves its own model only. The large models are dropped in the end.

    Args:
        peers: Names of players: the large models.
        delta, nu, way: As in :func:`bd_kd_loss`.
        beta: Weight of what the large models learn from the others; 0: nothing.
        temperature: :math:`T`.

    Source: BD-KD: Balancing the Divergences for Online Knowledge Distillation, arXiv 2212.12965.

    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import CrossEntropy
    >>> student, peer, batch = nn.Linear(4, 3), nn.Linear(4, 3), Batch(torch.ones(2, 4), torch.tensor([0, 2]))
    >>> cast = Cast(student, Terms.of(CrossEntropy()), None, TrainConfig(), players={"peer": peer})
    >>> (training,) = BDKD().trainings(cast)
    >>> sorted(training.stages[0].distiller.setup(batch)(batch).terms)
    ['cross_entropy', 'peer_1/cross_entropy', 'peer_1/with_0', 'with_1']
    """

    def __init__(
        self,
        peers: list[str] = ["peer"],  # noqa: B006  never changed
        delta: float = 2.0,
        nu: float = 1.0,
        beta: float = 1.0,
        temperature: float = 4.0,
        way: Way = "balanced",
    ) -> None:
        if not peers:
            raise ConfigError("there is nobody to learn with", where="scheme.peers", found=peers)
        _check(delta, nu, way)
        check_inside(beta, "scheme.beta", 0.0, float("inf"), closed=True)
        check_positive(temperature, "scheme.temperature")
        self.peers, self.beta = list(peers), beta
        self.options: dict[str, Any] = {"delta": delta, "nu": nu, "way": way, "temperature": temperature}

    def trainings(self, cast: Cast) -> Iterator[Training]:
        peers = [cast.player(name) for name in self.peers]
        pair = Unequal(cast.student, cast.loss, cast.teacher, peers, self.options, self.beta, cast.logits)
        yield Training([Stage("bd_kd", pair, cast.config)])


class Unequal(Cohort):
    """A cohort whose first member asks something else of the others than they of it; see :class:`BDKD`."""

    def __init__(
        self,
        student: nn.Module,
        loss: Objective | Terms,
        teacher: nn.Module | Teacher | None,
        peers: Sequence[nn.Module],
        options: dict[str, Any],
        beta: float,
        logits: str | None = None,
    ) -> None:
        super().__init__(student, loss, teacher, peers, Balanced(**options), 1.0, logits=logits)
        self.options, self.beta = options, beta
        for number in range(1, len(self.between)):
            self.between[number] = Reversed(beta, options["temperature"])

    def settled(self) -> dict[str, Any]:
        return {**super().settled(), "options": self.options, "beta": self.beta}
