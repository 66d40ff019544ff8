"""CMI: images are made by a generator each round anew, so that they differ from all that were made before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError
from limbeck.core.heads import two_layers
from limbeck.core.objective import DataInfo
from limbeck.core.ranks import as_on_first
from limbeck.core.reduction import check_inside, check_positive
from limbeck.engine.stage import Stage
from limbeck.models.generator import Generator
from limbeck.schemes.data_free.losses import one_hot_loss
from limbeck.schemes.data_free.made import teacher_at_hand, without_data
from limbeck.schemes.data_free.pool import Remembering, bounds, capacity_of, shifted
from limbeck.schemes.data_free.views import Bank, resized_crops
from limbeck.schemes.scheme import Cast, Scheme, Training, register


def inversion_contrast(local: Tensor, whole: Tensor, current: int, temperature: float = 0.1) -> Tensor:
    r"""Each image is to be told from all others, of this round and before, by two views of it.

    .. math:: \ell_i = -\log \frac{e^{l_i \cdot g_i / \tau}}{\sum_j e^{l_i \cdot g_j / \tau}}, \qquad
        L = \frac 1 B \sum_{i \le B} \ell_i + \frac 1 M \sum_{i > B} \ell_i

    Args:
        local: ``[B + M, D]`` of length 1: crops; first those of the current images, then those of earlier ones.
        whole: ``[B + M, D]`` of length 1: the whole images; taken as a constant.
        current: :math:`B`.
        temperature: :math:`\tau`.

    >>> inversion_contrast(torch.eye(2), torch.eye(2), 2, temperature=1.0)
    tensor(0.3133)
    """
    scores = local @ whole.detach().T / temperature
    rows = F.cross_entropy(scores, torch.arange(len(scores), device=scores.device), reduction="none")
    return rows[:current].mean() + rows[current:].mean() if len(rows) > current else rows.mean()


def disagreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""How far predictions are apart where both name the same class, :math:`\frac 1 B \sum_i [\hat y^S_i = \hat y^T_i]
    KL(p^T_i \| p^S_i)`: images near a decision that is still right.

    >>> disagreement(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [9.0, 0.0]]))
    tensor(0.)
    """
    agree = (student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).to(student_logits.dtype)
    return (kl_rows(soften(teacher_logits), soften(student_logits)) * agree).mean()


@register(
    Card(
        key="cmi",
        name="CMI",
        title="Contrastive Model Inversion for Data-Free Knowledge Distillation",
        year=2021,
        arxiv="2105.08584",
        code="zju-vipa/CMI",
        knowledge="scheme",
        equation=r"\min_{G, \epsilon, h}\; \alpha R_{BN}(x) + \beta\, CE(z^T(x), y) - \gamma\, "
        r"[\hat y^S = \hat y^T]\, KL(p^T \| p^S) + \delta\, L_{cr}(x; \mathcal{B}), \qquad x = G(\epsilon)",
        use="When there are no data and the teacher has batch normalisation: images of a pool that are told apart "
        "from one another, so they do not all look alike. With any loss that asks the teacher; the paper's is kd at "
        "temperature 20.",
        defaults={
            "statistics": "1, of the authors' script for CIFAR-10 from scratch",
            "one_hot": "1, of the same",
            "adversarial": "0.5, of the same",
            "contrast": "0.8, of the same, at temperature 0.1",
            "iterations": "200, of the same",
            "lr": "0.001 with Adam, of the same",
            "every": "400 steps between rounds of 256 images, of the same",
            "bank": "40960 features of earlier images, of which 4096 are compared; of the authors' code",
            "head": "256, of the same",
            "latent": "256, of the same",
        },
        evidence="parity",
        evidence_note="the contrast with and without a bank, with gradients to features and head, against "
        "zju-vipa/CMI@9e79fa9, in float64",
        choices=(
            "Features are what enters every batch normalisation of the teacher, averaged over places, as in the code.",
            "The views are those of the code for images of 32 pixels (crops by 4 pixels, crops of a quarter to the "
            "whole of the area), for other sizes in proportion; `flip: false` for images that have a left and a right.",
            "A round's images are those of its least loss; they are kept as bytes, as the code's image files do.",
            "The bank begins to count once it holds something, as in the code.",
        ),
        cost="A round takes two hundred steps of generator, teacher and student over its images; several processes "
        "make the same images, each for itself.",
    )
)
class CMI(Scheme):
    r"""One training; before every so many steps a fresh generator makes a batch of images that the pool lacks.

    .. math:: \min_{G, \epsilon, h}\; \alpha R_{BN}(x) + \beta\, CE(z^T(x), y) - \gamma\, D(x) + \delta\, L_{cr}

    The noise :math:`\epsilon` learns along with the generator, and so does the head :math:`h` that projects features
    for the contrast; the head stays from round to round.

    Args:
        statistics: :math:`\alpha`.
        one_hot: :math:`\beta`.
        adversarial: :math:`\gamma`, see :func:`disagreement`.
        contrast: :math:`\delta`, see :func:`inversion_contrast`.
        temperature: Of the contrast.
        iterations: Of a round.
        lr: Of generator, noise and head.
        every: Steps of the student from one round to the next.
        size: Images of a round.
        pool: Images kept at most; default all.
        bank: Features kept at most.
        negatives: Features compared with in an iteration, at most.
        head: Width of the projection.
        latent: Width of the noise.
        width: Of the generator.
        padding: Of crops of the whole image; default an eighth of the side.
        flip: Views are mirrored by chance.

    Source: Contrastive Model Inversion for Data-Free Knowledge Distillation, arXiv 2105.08584.

    >>> CMI(iterations=10).iterations
    10
    """

    def __init__(
        self,
        statistics: float = 1.0,
        one_hot: float = 1.0,
        adversarial: float = 0.5,
        contrast: float = 0.8,
        temperature: float = 0.1,
        iterations: int = 200,
        lr: float = 1e-3,
        every: int = 400,
        size: int = 256,
        pool: int | None = None,
        bank: int = 40960,
        negatives: int = 4096,
        head: int = 256,
        latent: int = 256,
        width: int = 64,
        padding: int | None = None,
        flip: bool = True,
    ) -> None:
        weights = {"statistics": statistics, "one_hot": one_hot, "adversarial": adversarial, "contrast": contrast}
        for name, value in {**weights, "padding": padding or 0}.items():
            check_inside(value, f"scheme.{name}", 0.0, float("inf"), closed=True)
        sizes = {"iterations": iterations, "every": every, "size": size, "bank": bank, "negatives": negatives}
        more = {"head": head, "latent": latent, "width": width, "pool": 1 if pool is None else pool}
        for name, value in {**sizes, **more, "lr": lr, "temperature": temperature}.items():
            check_positive(value, f"scheme.{name}")
        self.statistics, self.one_hot, self.adversarial, self.contrast = statistics, one_hot, adversarial, contrast
        self.temperature, self.iterations, self.lr, self.every, self.size = temperature, iterations, lr, every, size
        self.pool, self.bank, self.negatives, self.head = pool, bank, negatives, head
        self.latent, self.width, self.padding, self.flip = latent, width, padding, flip

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher, loader = teacher_at_hand(cast, "cmi"), without_data(cast, "cmi")
        if len(loader.shape) != 3:
            raise ConfigError(
                "its views are of images", where="scheme cmi", found=list(loader.shape), remedy="use dafl"
            )
        distiller = Inverting(cast.student, cast.loss, teacher, logits=cast.logits)
        distiller.plan(
            self, loader, seed=cast.seed, capacity=capacity_of(cast, loader, self.every, self.size, self.pool)
        )
        distiller.kept = capacity_of(cast, loader, self.every, self.size, self.bank)
        yield Training([Stage("cmi", distiller, cast.config)], train=loader)


class Inverting(Remembering):
    """A fresh generator in each round, beside a bank of what the teacher felt about earlier images."""

    who = "cmi"
    kept = 1

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Inverting:
        super().setup(batch, data)
        if not hasattr(self, "bank"):
            with torch.no_grad():
                width = self.features(batch.inputs)[0].shape[1]
            head = two_layers(width, width, self.scheme.head)
            self.bank = Bank(self.kept, width, head).to(batch.inputs.device)
        self.learns_in_rounds("pool.", "bank.")
        return self

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        own = {id(p) for p in self.bank.parameters()}  # the head learns in rounds alone
        return (p for p in self.parameters() if id(p) not in own)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means of what enters the teacher's normalisations, its logits, and how far it is from what they remember."""
        trace = self.inverted(images)
        entered: Sequence[Tensor] = self.inverted.entered(trace)
        feature = torch.cat([value.flatten(2).mean(dim=2) if value.ndim > 2 else value for value in entered], dim=1)
        return feature, trace.logits, self.inverted.statistics_loss(trace)

    def synthesise(self, like: Tensor) -> Tensor:
        scheme, shape = self.scheme, like.shape[1:]
        generator = Generator(scheme.latent, shape, width=scheme.width, end="pixels", normalise=self.normalise)
        generator.to(like.device).start()
        noise = torch.randn(scheme.size, scheme.latent, device=like.device, requires_grad=True)
        targets = self.targets(like.device)
        optimizer = torch.optim.Adam([*generator.parameters(), noise], lr=scheme.lr, betas=(0.5, 0.999))
        beside = self.bank.optimizer(scheme.lr)
        least = torch.full((), torch.inf, device=like.device)
        best, felt = torch.zeros(scheme.size, *shape, device=like.device), torch.empty(0)
        for _ in range(scheme.iterations):
            optimizer.zero_grad()
            beside.zero_grad()
            images = generator(noise)
            loss, feature = self.round_loss(images, targets)
            better = loss.detach() < least
            best = torch.where(better, images.detach(), best)
            felt = torch.where(better, feature.detach(), felt) if len(felt) else feature.detach()
            least = torch.where(better, loss.detach(), least)
            loss.backward()
            optimizer.step()
            beside.step()
        self.bank.keep_moments(beside)
        as_on_first([best, felt, *self.bank.head.parameters(), self.bank.moments])
        self.bank.add(felt)
        return best

    def round_loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What a round lessens, and both views' features side by side, ``[B, 2, D]``."""
        scheme = self.scheme
        low = bounds(self.normalise, images)[0] if self.normalise is not None else 0.0
        padding = images.shape[-1] // 8 if scheme.padding is None else scheme.padding
        view = shifted(images, padding, low, flip=scheme.flip)
        whole, logits, statistics = self.features(view)
        loss = scheme.statistics * statistics + scheme.one_hot * one_hot_loss(logits, targets)
        if scheme.adversarial:
            loss = loss - scheme.adversarial * disagreement(self.said(view), logits)
        local, _, _ = self.features(resized_crops(images, flip=scheme.flip))
        if scheme.contrast:
            earlier = self.bank.some(scheme.negatives)
            locals_ = F.normalize(self.bank.head(torch.cat([local, earlier[:, 0]])))
            wholes = F.normalize(self.bank.head(torch.cat([whole, earlier[:, 1]])))
            loss = loss + scheme.contrast * inversion_contrast(locals_, wholes, len(images), scheme.temperature)
        return loss, torch.stack([local, whole], dim=1)
