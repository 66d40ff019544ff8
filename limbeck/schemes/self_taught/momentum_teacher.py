"""A momentum teacher: the student learns from the moving average of its own weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.reduction import check_inside
from limbeck.core.schedules import Cosine
from limbeck.core.teacher import FrozenTeacher
from limbeck.engine.stage import Stage
from limbeck.schemes.parts.sides import TeacherShare, weigh_sides
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="momentum_teacher",
        name="Momentum teacher",
        title="Align before Fuse: Vision and Language Representation Learning with Momentum Distillation",
        year=2021,
        arxiv="2107.07651",
        code="salesforce/ALBEF",
        knowledge="scheme",
        equation=r"L = (1 - \alpha) L(f_\theta, y) + \alpha L(f_\theta, f_{\bar\theta}), \qquad "
        r"\bar\theta \leftarrow d \bar\theta + (1 - d) \theta",
        use="Without a teacher, where labels are noisy or few: the average of the last weights says what else could be "
        "true. With mix: null and loss {cross_entropy: 1, prob_mse: ...} it is a mean teacher.",
        defaults={
            "decay": "0.995, as in the authors' configurations; mean teachers take 0.99 to 0.999",
            "mix": "0.4, as in the authors' configurations",
            "ramp": "the first epoch, as in the authors' code",
        },
        evidence="formula",
        evidence_note="weights, loss and gradients of several steps against plain loops",
        choices=(
            "any loss may stand between the student and its average; ALBEF's soft targets are cross_entropy beside kd "
            "at temperature 1",
            "the average answers in evaluation mode, with averaged statistics; ALBEF's has no such statistics",
            "the average moves between two steps; in the authors' code as a forward begins, which is the same",
        ),
    )
)
class MomentumTeacher(Scheme):
    r"""One training; the teacher is the moving average of the student.

    .. math:: L = (1 - \alpha_t) L_{\text{labels}} + \alpha_t L_{\text{teacher}}, \qquad \alpha_t = \alpha \min(1, t/r)

    The sides of the recipe's loss are its terms that ask no teacher and those that ask one.

    Args:
        decay: d of the average.
        end: d moves there along half a cosine, as self-supervised methods do (0.996 to 1); ``None``: it stays.
        mix: :math:`\alpha`; ``None``: the loss is taken with the weights that it has.
        ramp: r, a share of training; ``None``: the first epoch.

    Source: ALBEF, arXiv 2107.07651, section 3.3; Mean teachers, arXiv 1703.01780.

    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import KD, CrossEntropy
    >>> batch = Batch(torch.ones(2, 4), torch.tensor([0, 2]))
    >>> cast = Cast(nn.Linear(4, 3), CrossEntropy() + KD(1.0), None, TrainConfig())
    >>> (training,) = MomentumTeacher(ramp=0.1).trainings(cast)
    >>> losses = training.stages[0].distiller.setup(batch)(batch.replace(progress=0.5))
    >>> {name: round(float(weight), 2) for name, weight in losses.weights.items()}
    {'cross_entropy': 0.6, 'kd': 0.4}
    """

    own_teacher = "only"

    def __init__(
        self, decay: float = 0.995, end: float | None = None, mix: float | None = 0.4, ramp: float | None = None
    ) -> None:
        for name, value in {"decay": decay, "end": end, "mix": mix, "ramp": ramp}.items():
            if value is not None:
                check_inside(value, f"scheme.{name}", closed=True)
        self.decay, self.end, self.mix, self.ramp = decay, end, mix, ramp

    def trainings(self, cast: Cast) -> Iterator[Training]:
        if cast.teacher is not None:
            raise ConfigError(
                "the student's own average is the teacher", where="teacher", remedy="write teacher: null in the recipe"
            )
        loss = cast.loss
        if self.mix is not None:
            ramp = self.ramp
            if ramp is None:
                epoch = None if cast.train is None else cast.train.steps_per_epoch
                ramp = 0.0 if epoch is None else min(1.0, epoch / cast.config.total_steps(epoch))
            labels, teacher = (TeacherShare(self.mix, until=ramp, left=left) for left in (True, False))
            loss = weigh_sides(loss, labels, teacher, "a momentum teacher's student")
        elif not loss.teacher_taps:
            raise ConfigError("no term of the loss asks the teacher", where="loss", found=", ".join(loss.names))
        yield Training([Stage("momentum", MomentumDistiller(cast.student, loss, self, cast.logits), cast.config)])


class MomentumDistiller(Distiller):
    """A student and its moving average; see :class:`MomentumTeacher`.

    The average follows once a step, told by the batch's progress; a loop of one's own sets that.

    Args:
        student: Who learns, with the weights from which the average starts.
        loss: Its own and the average's.
        scheme: With its settings.
        logits: Where logits stand in the output.
    """

    last: Tensor

    def __init__(self, student: nn.Module, loss: Terms, scheme: MomentumTeacher, logits: str | None = None) -> None:
        average = copy.deepcopy(student)
        super().__init__(student, loss, FrozenTeacher(average, logits=logits), logits=logits)
        self.average, self.scheme = average.requires_grad_(False), scheme
        end = scheme.decay if scheme.end is None else scheme.end
        self._decay = Cosine(scheme.decay, end)
        self.register_buffer("last", torch.zeros(()))  # progress when the average followed last

    def made(self, batch: Batch) -> Batch:
        self.follow(torch.as_tensor(batch.progress, dtype=torch.float32, device=self.last.device))
        return batch

    @torch.no_grad()
    def follow(self, progress: Tensor) -> None:
        """Move the average towards the student, where a step was taken since it did so last."""
        share = torch.where(progress > self.last, 1 - self._decay(self.last), torch.zeros_like(self.last))
        pairs = [
            (own, live)
            for kind in ("named_parameters", "named_buffers")
            for (_, own), (_, live) in zip(getattr(self.average, kind)(), getattr(self.student, kind)(), strict=True)
        ]
        kinds = {own.dtype for own, _ in pairs if own.is_floating_point()}
        for dtype in kinds:
            owns, lives = map(list, zip(*[pair for pair in pairs if pair[0].dtype == dtype], strict=True))
            gaps = torch._foreach_sub(lives, owns)
            torch._foreach_mul_(gaps, share.to(dtype))
            torch._foreach_add_(owns, gaps)
        for own, live in pairs:
            if not own.is_floating_point():  # counters
                own.copy_(live)
        self.last.copy_(progress)

    def settled(self) -> dict[str, Any]:
        return {"decay": self.scheme.decay, "end": self.scheme.end}
