"""KD3: a student learns from images of another distribution, those of them that look like what the teacher knows."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo
from limbeck.core.ranks import drawn_alike, rows_of_ranks
from limbeck.core.reduction import check_inside, check_positive, widen
from limbeck.core.survey import call_model
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace, logits_of
from limbeck.data.blank import BlankLoader
from limbeck.engine.stage import Stage
from limbeck.objectives.feature.simkd import SimKD, simkd_loss
from limbeck.schemes.data_free.contrast import paired_contrast
from limbeck.schemes.data_free.made import teacher_at_hand, unlabelled
from limbeck.schemes.data_free.other_images import other_images
from limbeck.schemes.data_free.pool import at_rest
from limbeck.schemes.data_free.selection import Reselecting, confident
from limbeck.schemes.parts.looking import indexed, said_of_all, whole_batches
from limbeck.schemes.scheme import Cast, Scheme, Training, register


def teachers_share(progress: float, ends: float = 0.5, falls: float = 2 / 3) -> float:
    r"""How far the choice of samples follows the teacher: :math:`\alpha = 1 - e^{-5 (u / f - 1)^2}` at progress u, and
    0 from ``ends`` on.

    >>> round(teachers_share(0.0), 3), round(teachers_share(0.4), 3), teachers_share(0.5)
    (0.993, 0.551, 0.0)
    """
    return 1 - math.exp(-5 * (progress / falls - 1) ** 2) if progress < ends else 0.0


def colours(images: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Mean and deviation of each channel of each image, ``[B, 2, C, 1, 1]``; constants.

    >>> colours(torch.ones(1, 1, 2, 2)).flatten().round(decimals=4)
    tensor([1.0000, 0.0010])
    """
    variance, mean = torch.var_mean(images.detach(), dim=(2, 3), keepdim=True)
    return torch.stack([mean, (variance + epsilon).sqrt()], dim=1)


def mix_distribution(
    images: Tensor, others: Tensor, share: Tensor, epsilon: float = 1e-6, *, among: Tensor | None = None
) -> Tensor:
    r"""Images with the colours of a mixture of their own and others': mean and deviation of each channel are mixed.

    .. math:: \tilde x = \frac{x - \mu}{\sigma} \sigma' + \mu', \qquad
        \mu' = \lambda \mu + (1 - \lambda) \mu_o, \quad \sigma' = \lambda \sigma + (1 - \lambda) \sigma_o

    Args:
        images: ``[B, C, H, W]``.
        others: ``[B]``: the row whose statistics are mixed in.
        share: :math:`\lambda`, ``[B]``.
        epsilon: Added to variances.
        among: The :func:`colours` of all others, of which ``others`` are rows; ``None``: the images' own.

    >>> x = torch.rand(3, 1, 4, 4)
    >>> torch.allclose(mix_distribution(x, torch.tensor([1, 2, 0]), torch.ones(3)), x, atol=1e-5)
    True
    """
    own = colours(images, epsilon)
    part, theirs = share.view(-1, 1, 1, 1, 1).to(images.dtype), (own if among is None else among)[others]
    (mean, deviation), (mean_of, deviation_of) = own.unbind(1), (part * own + (1 - part) * theirs).unbind(1)
    return (images - mean) / deviation * deviation_of + mean_of


def aligned_by_classifier(rows: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""The mean of a feature's errors, each sample's weighted by how far the classifier's two answers are apart,
    :math:`w_i = \sigma(\| z^S_i - z^T_i \|_2)`.

    Args:
        rows: Squared errors, ``[B, *]``.
        student_logits, teacher_logits: ``[B, C]``; constants here.

    >>> aligned_by_classifier(torch.tensor([2.0]), torch.zeros(1, 3), torch.zeros(1, 3))
    tensor(1.)
    """
    weight = (widen(student_logits) - widen(teacher_logits)).detach().norm(dim=1).sigmoid()
    return (weight.view(-1, *[1] * (rows.ndim - 1)) * rows).mean()


@register(
    Card(
        key="kd3",
        name="KD3",
        title="Distribution Shift Matters for Knowledge Distillation with Webly Collected Images",
        year=2023,
        arxiv="2307.11469",
        code="tangjialiang97/KD3",
        knowledge="scheme",
        equation=r"L = \tfrac 1 n \sum_i \sigma\big(\| z^S_i - z^T_i \|_2\big) \| P(f^S_i) - f^T_i \|_2^2 "
        r"+ \gamma \big( L_{con}(u^S, \tilde u^S) + L_{con}(u^T, \tilde u^T) \big)",
        use="When the data are gone but there are many other images, of which some resemble them: a pool of another "
        "source, or the recipe's own samples without labels. Loss {simkd: 1}: the student ends in a projector and the "
        "teacher's classifier.",
        defaults={
            "cutoff": "0.95, of the authors' code",
            "ends": "half of the training, 120 of 240 epochs there",
            "falls": "two thirds, 160 of 240 there",
            "mix": "0.001 at temperature 0.3, Beta(0.1, 0.1) and embeddings of 128; of the same",
        },
        evidence="parity",
        evidence_note="MixDistribution, weighted alignment, contrast and their gradients, and the choice, against "
        "tangjialiang97/KD3@91e2d4c, in float64; projector and classifier as in SimKD",
        choices=(
            "The choice looks at images as they are; the code at one random crop of each.",
            "An epoch has as many steps as its choice fills; a training as many as epochs of the whole pool would.",
            "Where fewer are chosen than stand in a batch, those nearest to their thresholds fill it.",
            "Images are mixed with the batch's statistics, as in the code.",
        ),
        cost="In each step student and teacher see a second view; each epoch the student is asked about all of the "
        "pool.",
        head="reused",
    )
)
class KD3(Scheme):
    r"""One training on the samples of a pool that teacher and student are sure about.

    .. math:: q = \mathrm{softmax}\big( \alpha z^T + (1 - \alpha) z^S \big), \qquad
        \text{kept where } \max_c q_c > \tau_{\hat c}

    Args:
        source: Of the pool, as ``data.source``; ``None``: the recipe's own training samples, without their labels.
        options: Of the source.
        samples: Of it, at most.
        select: Choose in every epoch anew; else all are seen.
        cutoff: :math:`\tau`, see :func:`limbeck.schemes.data_free.selection.class_thresholds`.
        ends, falls: See :func:`teachers_share`.
        mix: :math:`\gamma`, of the contrast with :func:`mix_distribution`.
        temperature: Of the contrast.
        beta: :math:`\lambda` is drawn from Beta(beta, beta).
        embed: Width of the embeddings that are contrasted.

    Source: Distribution Shift Matters for Knowledge Distillation with Webly Collected Images, arXiv 2307.11469.

    >>> KD3(select=False).cutoff
    0.95
    """

    def __init__(
        self,
        source: str | None = None,
        options: dict[str, Any] = {},  # noqa: B006  never changed
        samples: int = 50_000,
        select: bool = True,
        cutoff: float = 0.95,
        ends: float = 0.5,
        falls: float = 2 / 3,
        mix: float = 1e-3,
        temperature: float = 0.3,
        beta: float = 0.1,
        embed: int = 128,
    ) -> None:
        check_inside(cutoff, "scheme.cutoff", closed=True)
        check_inside(ends, "scheme.ends", closed=True)
        check_inside(mix, "scheme.mix", 0.0, float("inf"), closed=True)
        sizes = {"samples": samples, "falls": falls, "temperature": temperature, "beta": beta, "embed": embed}
        for name, value in sizes.items():
            check_positive(value, f"scheme.{name}")
        self.source, self.options, self.samples, self.select = source, options, samples, select
        self.cutoff, self.ends, self.falls = cutoff, ends, falls
        self.mix, self.temperature, self.beta, self.embed = mix, temperature, beta, embed

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher = teacher_at_hand(cast, "kd3")
        objectives = list(cast.loss)
        if len(objectives) != 1 or not isinstance(objectives[0], SimKD):
            raise ConfigError(
                "KD3 compares features before a classifier that is shared",
                where="loss",
                found=", ".join(cast.loss.names),
                remedy="use loss={simkd: 1}",
            )
        whole_batches(cast.config.accumulate, "KD3", "contrasts a batch's samples with one another")
        pool = indexed(cast.train, "KD3")
        if self.source is not None:
            pool = other_images(self.source, self.options, BlankLoader(pool), self.samples, pool)
        if len(pool.example(1).inputs.shape) != 4:
            found = list(pool.example(1).inputs.shape[1:])
            raise ConfigError("statistics of colours are mixed, of images", where="scheme kd3", found=found)
        also = ("logits", "head.projector@in")
        distiller = Shifted(cast.student, cast.loss, teacher, logits=cast.logits, also=also)
        distiller.plan(self, objectives[0], cast.seed)
        distiller.pool = pool
        loader = Reselecting(pool, distiller.choose, distiller.rows) if self.select else pool
        yield Training([Stage("kd3", distiller, cast.config)], train=loader)


class Shifted(Distiller):
    """A student of a pool of which it sees a part; see :class:`KD3`."""

    chosen: Tensor
    reached: Tensor
    pool: Any

    def plan(self, scheme: KD3, simkd: SimKD, seed: int = 0) -> None:
        """Take the settings."""
        self.scheme, self._hint, self.seed = scheme, simkd.teacher_tap, seed
        self.embeds: nn.ModuleList | None = None
        self._known: Tensor | None = None  # what the teacher says of the pool
        self.register_buffer("reached", torch.zeros(()))  # progress

    def settled(self) -> dict[str, Any]:
        return {**super().settled(), **vars(self.scheme)}

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Shifted:
        super().setup(batch, data)
        teacher = self.teacher
        assert teacher is not None
        teacher.attach(tuple(dict.fromkeys([*self.loss.teacher_taps, "logits", "penultimate"])), batch)
        if self.embeds is None:
            with at_rest(self.student), torch.no_grad():
                widths = [self._pooled(self.heard(batch)).shape[1], teacher(batch)["penultimate"].shape[1]]
            self.embeds = nn.ModuleList(nn.Linear(width, self.scheme.embed) for width in widths)
            self.embeds.to(batch.inputs.device)
            self.register_buffer("chosen", torch.ones(self.pool.samples, dtype=torch.bool))
        return self

    def rows(self) -> Tensor:
        """Ids of the samples of this epoch."""
        return self.chosen.nonzero().flatten().cpu()

    @torch.no_grad()
    def choose(self) -> Tensor:
        """Ids of the samples of an epoch that begins now."""
        scheme, device = self.scheme, self.reached.device
        share = teachers_share(float(self.reached), scheme.ends, scheme.falls)
        said = torch.zeros(())
        if share > 0:
            if self._known is None:
                teacher = self.teacher
                assert isinstance(teacher, FrozenTeacher)
                asked = FrozenTeacher(teacher.model, logits=teacher.where)  # its own hooks, which are taken off again
                self._known = said_of_all(asked, self.pool, device=device)["logits"]
            said = share * self._known
        with at_rest(self.student), torch.no_grad():
            parts = [
                logits_of(call_model(self.student, batch.inputs.to(device)), self._logits)
                for batch in self.pool.plain()
            ]
        said = said + (1 - share) * torch.cat(parts).float().cpu()
        self.chosen.fill_(False)
        self.chosen[confident(said, scheme.cutoff, self.pool.batch_size).to(device)] = True
        return self.rows()

    def made(self, batch: Batch) -> Batch:
        self.reached.fill_(batch.progress)
        images = batch.inputs
        rows = rows_of_ranks(len(images), images.device)
        with drawn_alike(images.device, self.seed, *struct.pack("<d", float(batch.progress))):
            others = torch.randperm(rows.whole, device=images.device)[rows.own]
            share = torch.distributions.Beta(self.scheme.beta, self.scheme.beta).sample((rows.whole,))[rows.own]
        mixed = mix_distribution(images, others, share.to(images.device), among=rows.gather(colours(images)))
        found = unlabelled(batch, images, mixed=mixed, rows=rows)
        return found.replace(index=batch.index, view=batch.view)

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        if "mixed" not in batch.extras:  # other data, by which it is judged
            return super().forward(batch)
        assert self.embeds is not None
        student, teacher = self.traces(batch)
        mixed = batch.replace(inputs=batch.extras["mixed"])
        rows = simkd_loss(student["head.projector"], teacher[self._hint], reduction="none")
        whole = batch.extras["rows"]
        terms = {"aligned": aligned_by_classifier(rows, student.logits, teacher.logits) * whole.share}
        ((_, _, schedule),) = self.loss.items()
        weights = {"aligned": schedule(batch.progress).to(rows.device)}
        if self.scheme.mix:
            other_student, other_teacher = self.traces(mixed)
            pairs = (
                (self._pooled(student), self._pooled(other_student)),
                (teacher["penultimate"].detach(), other_teacher["penultimate"].detach()),
            )
            values = []
            for embed, pair in zip(self.embeds, pairs, strict=True):
                first, second = (whole.gather(embed(feature.float())) for feature in pair)
                values.append(whole.of_whole(paired_contrast(first, second, self.scheme.temperature)))
            terms["contrast"], weights["contrast"] = torch.stack(values).sum(), rows.new_tensor(self.scheme.mix)
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return Losses(total, {name: value.detach() for name, value in terms.items()}, weights, student.logits.detach())

    def _pooled(self, trace: Trace) -> Tensor:
        """What the student felt before its projector, averaged over places."""
        value = trace["head.projector@in"]
        return value.flatten(2).mean(dim=2) if value.ndim > 2 else value
