"""Learning to retain while acquiring: a step on what a generator makes now is judged on what it made before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Losses
from limbeck.core.objective import DataInfo
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.trace import logits_of
from limbeck.engine.stage import Stage
from limbeck.schemes.data_free.losses import discrepancy, information_entropy_loss, one_hot_loss
from limbeck.schemes.data_free.made import Generating, teacher_at_hand, without_data
from limbeck.schemes.data_free.memory import Replay, Reservoir
from limbeck.schemes.parts.unrolled import stepped
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_REPLAY = 3  # keeps its draws apart from those of the other turns


@register(
    Card(
        key="lra",
        name="Learning to retain while acquiring",
        title="Learning to Retain while Acquiring: Combating Distribution-Shift in Adversarial Data-Free Knowledge "
        "Distillation",
        year=2023,
        arxiv="2302.14290",
        knowledge="scheme",
        equation=r"\min_\theta\; L_{acq}(\theta) + L_{ret}\big( \theta - \alpha \nabla L_{acq}(\theta) \big)",
        use="When there are no data at all and a student of a generator forgets what it learned from earlier images: "
        "its accuracy then wavers. A student that can be differentiated twice, or `second_order: false`.",
        defaults={
            "memory": "bank, the simpler of the paper's two",
            "inner_lr": "the learning rate of the settings",
            "one_hot, entropy, statistics": "1, ours",
            "every, lr, latent": "5, 0.001 and 256, those of DFAD",
            "store, keep": "a batch at every fifth move of the generator, 4096 images; ours",
        },
        evidence="reading",
        evidence_note="from the abstract; the gradient through the inner step against closed form and expansion",
        choices=(
            "The distance of both models' logits is DFAD's, for student and generator; with `by: loss` the student "
            "learns by the recipe's loss where it acquires, and retains by the distance.",
            "The inner step is a plain gradient step on the learned weights, whatever the optimizer is.",
            "Images are kept by reservoir sampling. With `memory: replay`, a variational autoencoder learns from the "
            "fresh images and from its own whenever the generator moves.",
            "The step on earlier images moves the running statistics of the student's normalisations too.",
        ),
        cost="In each step the student is asked about two batches and differentiated twice; generator and memory learn "
        "from the whole batch in each of several processes.",
    )
)
class LRA(Scheme):
    r"""One training with the players ``student`` and ``generator``, and ``replay`` where earlier images are made anew.

    .. math::
        L_S = D(x) + D_{\theta'}(x_m), \quad \theta' = \theta - \alpha \nabla_\theta D(x), \qquad
        L_G = -\gamma D(x) + w_{oh} CE(z^T, \arg\max z^T) + w_{ie} \sum_c \bar p_c \log_{10} \bar p_c + w_{bn} R_{BN}(x)

    D is the mean absolute difference of both models' logits, :math:`x_m` are earlier images. To first order of
    :math:`\alpha` it is :math:`D(x) + D(x_m) - \alpha \nabla D(x) \cdot \nabla D(x_m)`: gradients are to agree.

    Args:
        memory: ``"bank"`` keeps images, ``"replay"`` makes them.
        inner_lr: :math:`\alpha`; ``None``: the learning rate of the settings.
        second_order: Differentiate through the inner step; else its gradient is a constant.
        by: What the student acquires by: ``"discrepancy"``, D, or the recipe's ``"loss"``.
        adversarial: :math:`\gamma`.
        one_hot: :math:`w_{oh}`.
        entropy: :math:`w_{ie}`.
        statistics: :math:`w_{bn}`; 0 for a teacher without batch normalisation.
        every: Steps of the student for one of the generator.
        store: Moves of the generator from one batch that is kept to the next.
        keep: Images kept at most.
        lr: Of the generator's Adam, and the autoencoder's.
        latent: Width of the noise.
        width: Of generator and autoencoder.

    Source: Learning to Retain while Acquiring, arXiv 2302.14290.

    >>> LRA(memory="replay").every
    5
    """

    def __init__(
        self,
        memory: Literal["bank", "replay"] = "bank",
        inner_lr: float | None = None,
        second_order: bool = True,
        by: Literal["discrepancy", "loss"] = "discrepancy",
        adversarial: float = 1.0,
        one_hot: float = 1.0,
        entropy: float = 1.0,
        statistics: float = 1.0,
        every: int = 5,
        store: int = 5,
        keep: int = 4096,
        lr: float = 1e-3,
        latent: int = 256,
        width: int = 64,
    ) -> None:
        weights = {"adversarial": adversarial, "one_hot": one_hot, "entropy": entropy, "statistics": statistics}
        for name, value in {**weights, "inner_lr": inner_lr or 0.0}.items():
            check_inside(value, f"scheme.{name}", 0.0, float("inf"), closed=True)
        sizes = {"every": every, "store": store, "keep": keep, "lr": lr, "latent": latent, "width": width}
        for name, value in sizes.items():
            check_positive(value, f"scheme.{name}")
        self.memory, self.inner_lr, self.second_order, self.by = memory, inner_lr, second_order, by
        self.adversarial, self.one_hot, self.entropy, self.statistics = adversarial, one_hot, entropy, statistics
        self.every, self.store, self.keep, self.lr, self.latent, self.width = every, store, keep, lr, latent, width

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher, loader = teacher_at_hand(cast, "lra"), without_data(cast, "lra")
        distiller = Retaining(cast.student, cast.loss, teacher, logits=cast.logits)
        sizes: dict[str, Any] = {"latent": self.latent, "width": self.width, "lr": self.lr, "every": self.every}
        distiller.plan(self, loader, **sizes, statistics=self.statistics > 0, seed=cast.seed)
        distiller.inner_lr = cast.config.lr if self.inner_lr is None else self.inner_lr
        if self.memory == "replay":
            distiller.turns = ("student", "generator", "replay")  # type: ignore[assignment]
        yield Training([Stage("lra", distiller, cast.config)], train=loader)


class Retaining(Generating):
    """Steps on fresh images are judged on earlier ones; see :class:`LRA`."""

    who = "lra"
    inner_lr = 0.1

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Retaining:
        super().setup(batch, data)
        if not hasattr(self, "earlier"):
            scheme, shape = self.scheme, tuple(batch.inputs.shape[1:])
            bank = scheme.memory == "bank"
            earlier = (
                Reservoir(scheme.keep, shape, self.normalise) if bank else Replay(scheme.latent, shape, scheme.width)
            )
            self.earlier = earlier.to(batch.inputs.device)
        return self

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        kept = {id(p) for p in self.earlier.parameters()}
        if turn == "replay":
            return self.earlier.parameters()
        return (p for p in super().parameters_of(turn) if id(p) not in kept)

    def settings_of(self, turn: str) -> dict[str, Any]:
        return self._own if turn != "student" else {}

    def make(self, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, extras = super().make(like)
        moved, earlier = int(self.moves), self.earlier
        if isinstance(earlier, Reservoir):
            if earlier.size:
                extras = {**extras, "earlier": earlier.draw(len(like))}
            if moved % (self.every * self.scheme.store) == 0:
                earlier.add(inputs)
        elif moved:
            extras = {**extras, "earlier": earlier.draw(len(like))}
        return inputs, {**extras, "fresh": inputs}

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        return self._remember(batch) if turn == "replay" else super().forward(batch, turn)

    def learn(self, batch: Batch) -> Losses:
        return self._unrolled(batch) if self.training else super().learn(batch)  # else it is judged by the loss

    @torch.compiler.disable
    def _unrolled(self, batch: Batch) -> Losses:
        losses = super().learn(batch) if self.scheme.by == "loss" else self._acquire(batch)
        rows, earlier = self.rows_of(batch), batch.extras.get("earlier")
        if earlier is None:
            return losses
        earlier = earlier[rows.own]
        weights = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        moved = stepped(losses.total, weights, self.inner_lr, second_order=self.scheme.second_order)
        with torch.no_grad():
            wanted = self.inverted(earlier).logits
        said = logits_of(functional_call(self.student, moved, (earlier,)), self._logits)
        retained = discrepancy(said, wanted) * rows.share
        losses.total = losses.total + retained
        losses.terms["retained"], losses.weights["retained"] = retained.detach(), torch.ones_like(retained)
        losses.apart = {}
        return losses

    def _acquire(self, batch: Batch) -> Losses:
        logits = self.said(batch.inputs)
        with torch.no_grad():
            wanted = self.inverted(batch.inputs).logits
        value = discrepancy(logits, wanted) * self.rows_of(batch).share
        return Losses(value, {"acquired": value.detach()}, {"acquired": torch.ones_like(value)}, logits.detach())

    def judge(self, inputs: Tensor, drawn: dict[str, Tensor]) -> dict[str, tuple[float, Tensor]]:
        scheme, trace = self.scheme, self.inverted(inputs)
        found = {
            "apart": (-scheme.adversarial, discrepancy(self.said(inputs), trace.logits)),
            "one_hot": (scheme.one_hot, one_hot_loss(trace.logits)),
            "entropy": (scheme.entropy, information_entropy_loss(trace.logits)),
        }
        if scheme.statistics:
            found["statistics"] = (scheme.statistics, self.inverted.statistics_loss(trace))
        return found

    @torch.compiler.disable
    def _remember(self, batch: Batch) -> Losses:
        earlier = self.earlier
        assert isinstance(earlier, Replay)
        if "fresh" not in batch.extras or int(self.moves) % self.every:
            return self.idle()
        known = [batch.extras[name] for name in ("fresh", "earlier") if name in batch.extras]
        with self.drawing(_REPLAY, batch.inputs.device):
            value = earlier.loss(torch.cat(known))
        return Losses(value, {"replay": value.detach()}, {"replay": torch.ones_like(value)})
