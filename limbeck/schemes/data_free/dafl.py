"""DAFL: a generator learns to please the teacher, and a student learns from what it makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch  # noqa: F401  for the example
from torch import Tensor, nn  # noqa: F401  for the example

from limbeck.core.catalogue import Card
from limbeck.core.reduction import check_inside, check_positive
from limbeck.engine.stage import Stage
from limbeck.schemes.data_free.losses import activation_loss, information_entropy_loss, one_hot_loss
from limbeck.schemes.data_free.made import Generating, teacher_at_hand, without_data
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="dafl",
        name="DAFL",
        title="Data-Free Learning of Student Networks",
        year=2019,
        arxiv="1904.01186",
        code="huawei-noah/Efficient-Computing",
        knowledge="scheme",
        equation=r"L_G = w_{oh}\, CE\big(z^T, \arg\max z^T\big) + w_{ie} \sum_c \bar p_c \log_{10} \bar p_c "
        r"- w_a \tfrac 1 n \| f^T \|_1, \qquad x = G(\epsilon)",
        use="When there are no data at all and the teacher has no batch normalisation that remembers some: the "
        "generator is judged by the teacher's answers alone. With any loss that asks the teacher.",
        defaults={
            "one_hot": "1, of the authors' script for MNIST; 0.05 for CIFAR-10",
            "entropy": "5, of both scripts",
            "activation": "0.1, of the script for MNIST; 0.01 for CIFAR-10",
            "lr": "0.2 with Adam, of the script for MNIST; 0.02 for CIFAR-10",
            "latent": "100, of the script for MNIST; 1000 for CIFAR-10",
        },
        evidence="parity",
        evidence_note="the generator's three losses and their gradient to the image against "
        "huawei-noah/Efficient-Computing@225ddd2, in float64",
        choices=(
            "The paper's entropy has a natural logarithm, the code one of base 10; here it is the code's, for which "
            "the weights are meant.",
            "The student learns by the recipe's loss; the paper's is kd at temperature 1. Nobody knows labels of what "
            "is made, so terms of labels are 0.",
            "Both move at once, on the same images, as in the code.",
            "The feature is what enters the teacher's last linear layer.",
        ),
        cost="In each step the generator runs twice and the teacher once more, with gradients; of several processes "
        "each does so for the whole batch.",
    )
)
class DAFL(Scheme):
    r"""One training with two players, ``student`` and ``generator``; no sample of the data is read.

    .. math::
        L_G = w_{oh}\, CE(z^T, \arg\max z^T) + w_{ie} \sum_c \bar p_c \log_{10} \bar p_c - w_a \tfrac 1 n \| f^T \|_1

    The teacher shall be sure of each image, expect all classes alike over a batch, and be excited.

    Args:
        one_hot: :math:`w_{oh}`.
        entropy: :math:`w_{ie}`.
        activation: :math:`w_a`.
        lr: Of the generator's Adam.
        latent: Width of the noise.
        width: Of the generator.

    Source: Data-Free Learning of Student Networks, arXiv 1904.01186.

    >>> from limbeck.data.resident import ResidentLoader
    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.core.objective import Terms
    >>> from limbeck.core.teacher import as_teacher
    >>> from limbeck.objectives import KD
    >>> data = ResidentLoader(torch.zeros(8, 4), torch.zeros(8).long(), batch_size=4)
    >>> cast = Cast(nn.Linear(4, 3), Terms.of(KD()), as_teacher(nn.Linear(4, 3)), TrainConfig(), data)
    >>> (training,) = DAFL().trainings(cast)
    >>> training.stages[0].distiller.turns
    ('student', 'generator')
    """

    def __init__(
        self,
        one_hot: float = 1.0,
        entropy: float = 5.0,
        activation: float = 0.1,
        lr: float = 0.2,
        latent: int = 100,
        width: int = 64,
    ) -> None:
        for name, value in (("one_hot", one_hot), ("entropy", entropy), ("activation", activation)):
            check_inside(value, f"scheme.{name}", 0.0, float("inf"), closed=True)
        for name, value in (("lr", lr), ("latent", latent), ("width", width)):
            check_positive(value, f"scheme.{name}")
        self.one_hot, self.entropy, self.activation = one_hot, entropy, activation
        self.lr, self.latent, self.width = lr, latent, width

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher, loader = teacher_at_hand(cast, "dafl"), without_data(cast, "dafl")
        distiller = Pleasing(cast.student, cast.loss, teacher, logits=cast.logits)
        sizes: dict[str, Any] = {"latent": self.latent, "width": self.width, "lr": self.lr}
        distiller.plan(self, loader, seed=cast.seed, **sizes, same=True, taps=("penultimate",))
        yield Training([Stage("dafl", distiller, cast.config)], train=loader)


class Pleasing(Generating):
    """The generator is judged by the teacher alone; see :class:`DAFL`."""

    who = "dafl"

    def judge(self, inputs: Tensor, drawn: dict[str, Tensor]) -> dict[str, tuple[float, Tensor]]:
        trace = self.inverted(inputs)
        return {
            "one_hot": (self.scheme.one_hot, one_hot_loss(trace.logits)),
            "entropy": (self.scheme.entropy, information_entropy_loss(trace.logits)),
            "activation": (self.scheme.activation, activation_loss(trace["penultimate"])),
        }
