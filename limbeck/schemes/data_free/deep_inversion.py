"""DeepInversion: images are dreamt out of what the teacher's batch normalisations remember of its data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from limbeck.core.catalogue import Card
from limbeck.core.ranks import as_on_first
from limbeck.core.reduction import check_inside, check_positive
from limbeck.engine.stage import Stage
from limbeck.schemes.data_free.losses import competition_loss, one_hot_loss, total_variation
from limbeck.schemes.data_free.made import teacher_at_hand, without_data
from limbeck.schemes.data_free.pool import Remembering, bounds, capacity_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="deep_inversion",
        name="DeepInversion",
        title="Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion",
        year=2020,
        arxiv="1912.08795",
        code="NVlabs/DeepInversion",
        knowledge="scheme",
        equation=r"\min_x\; CE(z^T(x), y) + \alpha_f \sum_l \| \mu_l(x) - \hat\mu_l \|_2 + "
        r"\| \sigma^2_l(x) - \hat\sigma^2_l \|_2 + \alpha_{tv} TV(x) + \alpha_{l2} \|x\|_2 + "
        r"\alpha_c \big( 1 - JS(p^T, p^S) \big)",
        use="When there are no data and the teacher has batch normalisation. It makes the best single images of all "
        "these methods, and takes most to make them. With any loss that asks the teacher; kd at a high temperature.",
        defaults={
            "statistics": "10, of zju-vipa/CMI's script, which distils with it on CIFAR-10",
            "competition": "1, of the same; 0 is plain DeepInversion, 10 the paper's adaptive one on CIFAR-10",
            "variation": "2.5e-5, of the authors' script for CIFAR-10",
            "norm": "0, of the same",
            "iterations": "1000, of zju-vipa/CMI's script; the authors take 2000",
            "lr": "0.1 with Adam, of both scripts",
            "jitter": "2 pixels, of the authors' script for CIFAR-10",
            "every": "400 steps between rounds of 256 images, of zju-vipa/CMI's script",
        },
        evidence="parity",
        evidence_note="statistics, total variation and their gradient to the image against "
        "NVlabs/DeepInversion@2413af1, in float64",
        choices=(
            "The authors released how images are made, not how a student learns from them; rounds and pool are those "
            "of zju-vipa/CMI's reproduction.",
            "Competition is the paper's Jensen-Shannon divergence; the code clamps probabilities and takes both "
            "divergences the other way round.",
            "Images stay between black and white, as in the authors' script for ImageNet.",
            "Of a round's iterations the images of the least loss are kept.",
        ),
        cost="A round takes a thousand steps of teacher and student over its images, with gradients; several processes "
        "make the same images, each for itself.",
    )
)
class DeepInversion(Scheme):
    r"""One training; before every so many steps a batch of images is dreamt, and kept with those before.

    .. math:: \min_x\; CE(z^T(x), y) + \alpha_f R_{BN}(x) + \alpha_{tv} TV(x) + \alpha_{l2} \|x\|_2
        + \alpha_c \big( 1 - JS(p^T(x), p^S(x)) \big)

    Images begin as noise; each iteration sees them shifted by chance. Vectors have neither shift nor variation.

    Args:
        statistics: :math:`\alpha_f`.
        competition: :math:`\alpha_c`: images that teacher and student judge differently.
        variation: :math:`\alpha_{tv}`.
        norm: :math:`\alpha_{l2}`.
        first: Weight of the first normalisation among all.
        iterations: Of a round.
        lr: Of the images' Adam.
        jitter: Pixels by which images are shifted, at most.
        every: Steps of the student from one round to the next.
        size: Images of a round.
        pool: Images kept at most; default all.
        padding: Of the crops that the student sees; default an eighth of the side.
        flip: Images are mirrored by chance, while they are dreamt and when the student sees them.

    Source: Dreaming to Distill, arXiv 1912.08795.

    >>> DeepInversion(iterations=10).iterations
    10
    """

    def __init__(
        self,
        statistics: float = 10.0,
        competition: float = 1.0,
        variation: float = 2.5e-5,
        norm: float = 0.0,
        first: float = 1.0,
        iterations: int = 1000,
        lr: float = 0.1,
        jitter: int = 2,
        every: int = 400,
        size: int = 256,
        pool: int | None = None,
        padding: int | None = None,
        flip: bool = True,
    ) -> None:
        weights = {"statistics": statistics, "competition": competition, "variation": variation, "norm": norm}
        for name, value in {**weights, "jitter": jitter, "padding": padding or 0}.items():
            check_inside(value, f"scheme.{name}", 0.0, float("inf"), closed=True)
        sizes = {"first": first, "iterations": iterations, "lr": lr, "every": every, "size": size}
        for name, value in {**sizes, "pool": 1 if pool is None else pool}.items():
            check_positive(value, f"scheme.{name}")
        self.statistics, self.competition, self.variation, self.norm = statistics, competition, variation, norm
        self.first, self.iterations, self.lr, self.jitter = first, iterations, lr, jitter
        self.every, self.size, self.pool, self.padding, self.flip = every, size, pool, padding, flip

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher, loader = teacher_at_hand(cast, "deep_inversion"), without_data(cast, "deep_inversion")
        distiller = Dreaming(cast.student, cast.loss, teacher, logits=cast.logits)
        capacity = capacity_of(cast, loader, self.every, self.size, self.pool)
        distiller.plan(self, loader, seed=cast.seed, capacity=capacity)
        yield Training([Stage("deep_inversion", distiller, cast.config)], train=loader)


class Dreaming(Remembering):
    """Images are what is trained in a round; see :class:`DeepInversion`."""

    who = "deep_inversion"

    def synthesise(self, like: Tensor) -> Tensor:
        scheme = self.scheme
        targets = self.targets(like.device)
        images = torch.randn(scheme.size, *like.shape[1:], device=like.device, requires_grad=True)
        optimizer = torch.optim.Adam([images], lr=scheme.lr, betas=(0.5, 0.9))
        limits = bounds(self.normalise, like) if self.normalise is not None and like.ndim == 4 else None
        best, least = images.detach().clone(), torch.full((), torch.inf, device=like.device)
        for _ in range(scheme.iterations):
            optimizer.zero_grad()
            loss = self.dream_loss(self._shaken(images), targets)
            better = loss.detach() < least
            best = torch.where(better, images.detach(), best)
            least = torch.where(better, loss.detach(), least)
            loss.backward()
            optimizer.step()
            if limits is not None:
                with torch.no_grad():
                    torch.clamp(images, *limits, out=images)
        as_on_first([best])
        return best

    def dream_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """What a round lessens."""
        scheme, trace = self.scheme, self.inverted(images)
        loss = one_hot_loss(trace.logits, targets)
        loss = loss + scheme.statistics * self.inverted.statistics_loss(trace, scheme.first)
        if scheme.competition:
            loss = loss + scheme.competition * competition_loss(self.said(images), trace.logits)
        if scheme.variation and images.ndim == 4:
            loss = loss + scheme.variation * total_variation(images)
        return loss + scheme.norm * images.norm() if scheme.norm else loss

    def _shaken(self, images: Tensor) -> Tensor:
        """All images rolled by the same random number of pixels, and mirrored by chance."""
        if images.ndim != 4:
            return images
        reach = self.scheme.jitter
        down, right = (int(torch.randint(-reach, reach + 1, ())) for _ in range(2))
        images = images.roll((down, right), dims=(2, 3))
        return images.flip(3) if self.scheme.flip and bool(torch.rand(()) < 0.5) else images
