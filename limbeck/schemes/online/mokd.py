"""MOKD: two unlike models learn without labels, each from itself and from the other, in two modes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError
from limbeck.core.reduction import check_inside, check_positive
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.schemes.online.mokd_modes import Modes
from limbeck.schemes.parts.two_stages import task_stage, two_configs
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="mokd",
        name="MOKD",
        title="Multi-Mode Online Knowledge Distillation for Self-Supervised Visual Representation Learning",
        year=2023,
        arxiv="2304.06461",
        code="skyoux/mokd",
        knowledge="scheme",
        equation=r"L_1 = L_{sm} + L_{st} + \lambda_1 (L_{cm} + L_{ct}), \quad L_{sm} = D(m_1, \bar m_1),\ "
        r"L_{cm} = D(m_1, \bar m_2),\ L_{ct} = H(\mathrm{search}(q_1, \bar x_2), t_1)",
        use="Images without labels, and two models of unlike kinds, a convolutional network and a transformer above "
        "all: they learn features together; then the student learns the task.",
        cost="Every image is seen in ten views, by two models and by the averages of both.",
        tasks=("classification",),
        defaults={
            "peer": "a player called peer",
            "weights": "1 for the student and 0.1 for the peer, as for a ResNet-50 with a ViT-S",
            "prototypes": "65536; hidden 2048, bottleneck 256, width that of the tokens (else 384), 3 blocks, 6 heads",
            "local_crops": "8; areas 0.05 to 0.4, global ones 0.4 to 1",
            "momentum": "0.996, rising to 1",
            "temperatures": "0.04 to 0.07 over half of the training for the student, 0.3 of it for the peer",
            "frozen": "0.01: the last layers rest for the first of 100 epochs",
            "share": "0.8, and then a probe: the paper trains the features alone and judges them so",
        },
        evidence="parity",
        evidence_note="values, gradients and centers of skyoux/mokd@f7b1386 (DINOLoss, CTSearchLoss), and its T-head's "
        "answers with and without a query",
        choices=(
            "Crops have the images' own size, which every model takes; local_size says another (96 of 224 there).",
            "Crops are linear in their interpolation; colours change by contrast, brightness, grey and blur. Hue, "
            "saturation and solarisation, which need images that are not normalised, are left out.",
            "The averages answer in evaluation mode, with averaged statistics of normalisation layers.",
            "The two centers of one teacher's scores are the same number, kept once. Prototypes of MLP heads keep "
            "length 1 for both models, those of T-heads learn it; positions are interpolated to a size, not a factor.",
            "What the averages say is computed once a step, in full precision.",
            "A second stage makes the student's classifier, by the recipe's loss: a probe, or all of it.",
        ),
    )
)
class MOKD(Scheme):
    r"""Two stages: student and peer learn features without labels; then the student learns by the recipe's loss.

    Each model has an average of itself (of its weights over time), which sees two global crops; the model sees these
    and several local ones. Self-distillation is from its own average, cross-distillation from the other's: of what the
    MLP heads say, and by a search: the student's query for a local crop stands among the tokens of the other's average,
    and what that one's T-head then says is what the student's T-head shall say of the local crop.

    .. math:: L_1 = D(m_1, \bar m_1) + D(t_1, \bar t_1) + \lambda_1 \left( D(m_1, \bar m_2) + H(f_{12}, t_1) \right)

    :math:`D` is ``dino_loss`` of ``limbeck.schemes.online.mokd_modes``, :math:`H` its ``search_loss``; the peer alike.
    Models take turns with optimizers of their own, and no gradient goes from one to the other.

    Args:
        peer: Name of the player.
        tap, peer_tap: Where maps or tokens come from.
        weights: :math:`\lambda` of student and peer.
        prototypes, hidden, bottleneck, width, depth, heads: Of the heads (see ``limbeck.schemes.parts.view_heads``).
        local_crops: How many.
        local_size: Their height and width.
        flip: Crops may be mirrored.
        momentum: Of the averages at the beginning; at the end it is 1.
        center: Momentum of the centers.
        temperatures: Of the averages at the beginning, and after the warm-up.
        warmup: Shares of the training until then, the student's and the peer's; searches go by the peer's.
        frozen: Share of the training in which prototypes rest.
        share: Of the whole length, without labels.
        then: ``"probe"``: the classifier alone learns afterwards; ``"finetune"``: the whole student.
        peer_train: Settings of training that are the peer's own, such as ``{optimizer: adamw, lr: 0.0003}``.

    Source: Multi-Mode Online Knowledge Distillation for Self-Supervised Visual Representation Learning,
    arXiv 2304.06461.

    >>> MOKD().weights
    [1.0, 0.1]
    """

    def __init__(
        self,
        peer: str = "peer",
        tap: str = "stages:-1",
        peer_tap: str = "stages:-1",
        weights: list[float] = [1.0, 0.1],  # noqa: B006  never changed
        prototypes: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        width: int | None = None,
        depth: int = 3,
        heads: int = 6,
        local_crops: int = 8,
        local_size: int | None = None,
        flip: bool = True,
        momentum: float = 0.996,
        center: float = 0.9,
        temperatures: list[float] = [0.04, 0.07],  # noqa: B006  never changed
        warmup: list[float] = [0.5, 0.3],  # noqa: B006  never changed
        frozen: float = 0.01,
        share: float = 0.8,
        then: Literal["probe", "finetune"] = "probe",
        peer_train: dict[str, Any] = {},  # noqa: B006  never changed
    ) -> None:
        for name, value in (("weights", weights), ("temperatures", temperatures), ("warmup", warmup)):
            if len(value) != 2 or min(value) < 0:
                raise ConfigError("two numbers are wanted", where=f"scheme.{name}", found=value)
        sizes = {"prototypes": prototypes, "hidden": hidden, "bottleneck": bottleneck, "depth": depth, "heads": heads}
        for name, number in {**sizes, "local_crops": local_crops, "temperatures": min(temperatures)}.items():
            check_positive(number, f"scheme.{name}")
        for name, part in {"momentum": momentum, "center": center, "frozen": frozen}.items():
            check_inside(part, f"scheme.{name}", closed=True)
        check_inside(share, "scheme.share")
        unknown = sorted(set(peer_train) - set(TrainConfig.model_fields))
        if unknown:
            raise ConfigError("no such setting of training", where="scheme.peer_train", found=", ".join(unknown))
        TrainConfig(**peer_train)  # tells what cannot be
        self.peer, self.taps, self.weights, self.width = peer, (tap, peer_tap), list(weights), width
        self.prototypes, self.mlp = prototypes, {"hidden": hidden, "bottleneck": bottleneck}
        self.blocks = {"depth": depth, "heads": heads}
        self.local_crops, self.local_size, self.flip = local_crops, local_size, flip
        self.momentum, self.center, self.frozen = momentum, center, frozen
        self.temperatures, self.warmup, self.share, self.then = list(temperatures), list(warmup), share, then
        self.peer_train = dict(peer_train)

    def trainings(self, cast: Cast) -> Iterator[Training]:
        first, second = two_configs(cast.config, self.share)
        pair = Modes(cast.student, cast.player(self.peer), self, cast.logits)
        pair.seed = cast.seed
        yield Training([Stage("mokd", pair, first), task_stage(cast, self.then, second)])
