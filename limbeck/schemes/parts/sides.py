"""The two sides of a loss: what learns from the labels, and what learns from a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.schedules import Constant, Schedule


def weigh_sides(loss: Terms, labels: float | Schedule, teacher: float | Schedule, why: str) -> Terms:
    """A loss whose terms on labels and on the teacher have a further weight each; what weighs nothing is left out.

    A mixed target :math:`a y + (1 - a) p` is learned so by every loss that is linear in its target: cross-entropy with
    the divergence, and the squared error up to what does not depend on the student.

    Args:
        loss: The sum; its objectives are taken as they are.
        labels: Of all terms that ask no teacher.
        teacher: Of the others.
        why: Who wants both sides, for the error.

    Raises:
        ConfigError: A side that weighs something has no term.

    >>> from limbeck.objectives import KD, CrossEntropy
    >>> mixed = weigh_sides(CrossEntropy() + 0.5 * KD(), 0.25, 0.75, "this")
    >>> [float(weight(0.0)) for weight in mixed.weights]
    [0.25, 0.375]
    """
    kept = []
    for asks, share, name in ((False, labels, "labels"), (True, teacher, "a teacher")):
        own = [term for term in loss.items() if bool(term[1].teacher_taps) == asks]
        if share in (0, Constant(0.0)):
            continue
        if not own:
            raise ConfigError(
                f"{why} learns from labels and from a model, and no term of the loss learns from {name}",
                where="loss",
                found=", ".join(loss.names),
                remedy="give both, such as {cross_entropy: 1, kd: {weight: 1, temperature: 1}}",
            )
        kept += [(n, objective, _times(weight, share)) for n, objective, weight in own]
    return Terms([o for _, o, _ in kept], [w for *_, w in kept], [n for n, *_ in kept])


def _times(weight: Schedule, share: float | Schedule) -> Schedule:
    if isinstance(weight, Constant) and not isinstance(share, Schedule):
        return Constant(weight.value * share)
    return share if weight == Constant(1.0) and isinstance(share, Schedule) else weight * share


@dataclass(frozen=True)
class TeacherShare(Schedule):
    r"""How much of a target is a model's, :math:`\alpha r(t)`; or what is left to the labels, 1 minus that.

    Args:
        alpha: The most it comes to.
        until: It rises evenly over this part of training.
        epochs: It rises epoch by epoch over so many instead, :math:`\alpha (e + 1) / E` in epoch e, and is 0 in the
            first.
        left: What is left.

    >>> [round(float(TeacherShare(0.8, epochs=4)(progress)), 2) for progress in (0.0, 0.25, 0.75)]
    [0.0, 0.4, 0.8]
    """

    alpha: float
    until: float = 0.0
    epochs: float = 0.0
    left: bool = False

    def at(self, progress: Tensor) -> Tensor:
        if self.epochs:
            epoch = epoch_at(progress, self.epochs)
            risen = torch.where(epoch > 0, ((epoch + 1) / self.epochs).clamp(max=1.0), torch.zeros_like(epoch))
        else:
            risen = (progress / self.until).clamp(max=1.0) if self.until else torch.ones_like(progress)
        return 1 - self.alpha * risen if self.left else self.alpha * risen


def epoch_at(progress: Tensor, epochs: float) -> Tensor:
    """Which epoch a progress lies in, as a number with a point; rounding of the progress does not move it back.

    >>> float(epoch_at(torch.tensor(2 / 3), 3))
    2.0
    """
    return (progress * epochs + 5e-5).floor()
