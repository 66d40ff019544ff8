"""CAE-DFKD: images are made from diffused embeddings of their classes, and the student tells classes apart by them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Losses
from limbeck.core.errors import ConfigError
from limbeck.core.heads import two_layers
from limbeck.core.objective import DataInfo
from limbeck.core.ranks import as_on_first
from limbeck.core.reduction import check_inside, check_positive
from limbeck.data.blank import BlankLoader
from limbeck.engine.stage import Stage
from limbeck.models.generator import Generator
from limbeck.schemes.data_free.class_codes import KINDS, diffused, orthogonal_codes, text_codes
from limbeck.schemes.data_free.cmi import disagreement
from limbeck.schemes.data_free.contrast import supervised_contrast
from limbeck.schemes.data_free.losses import one_hot_loss
from limbeck.schemes.data_free.made import teacher_at_hand, without_data
from limbeck.schemes.data_free.pool import Pool, Remembering, at_rest, capacity_of
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="cae_dfkd",
        name="CAE-DFKD",
        title="CAE-DFKD: Bridging the Transferability Gap in Data-Free Knowledge Distillation",
        year=2025,
        arxiv="2504.21478",
        knowledge="scheme",
        equation=r"L_G = \alpha R_{BN}(x) + \beta\, CE(z^T(x), c) - \gamma\, [\hat y^S = \hat y^T]\, KL(p^T \| p^S), "
        r"\quad x = G(e_c + \sigma \epsilon_m), \qquad L_S = L + \lambda L_{CN}",
        use="When there are no data and what the student feels is to be of use elsewhere too. The generator begins "
        "from an embedding of the class, so a round takes a few steps. With any loss that asks the teacher; kd at a "
        "high temperature.",
        defaults={
            "sources": "4, the paper's best",
            "statistics, one_hot, adversarial": "10, 0.5 and 1.33, of NAYER's script, on which it builds",
            "iterations, lr, life, size": "40, 0.004, 10 and 400, of the same",
            "contrast": "0.1 at temperature 0.1, ours: the paper's were not read",
            "degree": "1, ours: noise at most as long as the embedding",
        },
        evidence="reading",
        evidence_note="from the abstract and a summary; the contrast of groups against its definition",
        choices=(
            "Kinds of noise: Gaussian, uniform, Laplace, and Gaussian of which half is masked; added to the embedding.",
            "Without `text`, a class's embedding is a random vector orthogonal to the others'; with it, what a text "
            "encoder such as CLIP's says of `prompt`, which tells classes by number where they have no names.",
            "A batch normalisation and a linear layer that each round draws anew stand before the generator, as in "
            "NAYER; the generator goes on from round to round, and starts anew after `life` of them.",
            "A batch's images are compared by a small head on the student's feature, which is dropped afterwards; "
            "images are shown as they were made, since the paper finds that views of them hurt.",
            "A round's images are those of its least loss; they are kept as bytes.",
        ),
        cost="A round takes forty steps of generator, teacher and student over its images; several processes make the "
        "same images, each for itself.",
    )
)
class CAEDFKD(Scheme):
    r"""One training; before every so many steps a generator makes images of each class, which are kept.

    .. math:: L_{CN} = -\frac 1 B \sum_i \frac{1}{|P(i)|} \sum_{p \in P(i)}
        \log \frac{e^{h_i \cdot h_p / \tau}}{\sum_{a \ne i} e^{h_i \cdot h_a / \tau}}

    P(i): images of the same class, made at other degrees of diffusion.

    Args:
        degree: The most that :math:`\sigma` is; each image draws its own evenly from 0 on.
        sources: Kinds of noise.
        contrast: :math:`\lambda`.
        temperature: :math:`\tau`.
        statistics: :math:`\alpha`, of the teacher's batch normalisations; 0 for a teacher that has none.
        one_hot: :math:`\beta`.
        adversarial: :math:`\gamma`.
        text: A text encoder, as transformers knows it; ``None``: random embeddings.
        prompt: What it is asked.
        iterations: Of a round.
        lr: Of the generator's Adam.
        life: Rounds after which the generator starts anew.
        every: Steps of the student from one round to the next.
        size: Images of a round.
        pool: Images kept at most; default all.
        latent: Width of embeddings that are random, and of what enters the generator.
        width: Of the generator.
        head: Width of what is contrasted.

    Source: CAE-DFKD: Bridging the Transferability Gap in Data-Free Knowledge Distillation, arXiv 2504.21478; the round
    is that of NAYER, arXiv 2310.00258.

    >>> CAEDFKD(iterations=10).sources
    4
    """

    def __init__(
        self,
        degree: float = 1.0,
        sources: int = 4,
        contrast: float = 0.1,
        temperature: float = 0.1,
        statistics: float = 10.0,
        one_hot: float = 0.5,
        adversarial: float = 1.33,
        text: str | None = None,
        prompt: str = "a photo of a {}",
        iterations: int = 40,
        lr: float = 4e-3,
        life: int = 10,
        every: int = 400,
        size: int = 400,
        pool: int | None = None,
        latent: int = 256,
        width: int = 64,
        head: int = 128,
    ) -> None:
        if not 1 <= sources <= len(KINDS):
            raise ConfigError("no such number of kinds", where="scheme.sources", found=sources, wanted="1 to 4")
        weights = {"degree": degree, "contrast": contrast, "statistics": statistics, "one_hot": one_hot}
        for name, value in {**weights, "adversarial": adversarial}.items():
            check_inside(value, f"scheme.{name}", 0.0, float("inf"), closed=True)
        sizes = {"iterations": iterations, "lr": lr, "life": life, "every": every, "size": size, "latent": latent}
        more = {"width": width, "head": head, "temperature": temperature, "pool": 1 if pool is None else pool}
        for name, value in {**sizes, **more}.items():
            check_positive(value, f"scheme.{name}")
        self.degree, self.sources, self.contrast, self.temperature = degree, sources, contrast, temperature
        self.statistics, self.one_hot, self.adversarial = statistics, one_hot, adversarial
        self.text, self.prompt, self.iterations, self.lr, self.life = text, prompt, iterations, lr, life
        self.every, self.size, self.pool, self.latent, self.width, self.head = every, size, pool, latent, width, head

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher, loader = teacher_at_hand(cast, "cae_dfkd"), without_data(cast, "cae_dfkd")
        distiller = Naming(cast.student, cast.loss, teacher, logits=cast.logits, also=("penultimate",))
        capacity = capacity_of(cast, loader, self.every, self.size, self.pool)
        distiller.plan(self, loader, seed=cast.seed, capacity=capacity, statistics=self.statistics > 0)
        yield Training([Stage("cae_dfkd", distiller, cast.config)], train=loader)


class NamedPool(Pool):
    """A pool that knows of which class each of its inputs was meant to be.

    >>> pool = NamedPool(4, (2,), None)
    >>> pool.add_named(torch.ones(3, 2), torch.tensor([7, 7, 7])); pool.draw_named(2)[1].tolist()
    [7, 7]
    """

    classes: Tensor

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.register_buffer("classes", torch.zeros(len(self.kept), dtype=torch.long))

    def add_named(self, inputs: Tensor, classes: Tensor) -> None:
        """Keep some more."""
        classes = classes[-len(self.kept) :]
        places = (self.added + torch.arange(len(classes), device=self.kept.device)) % len(self.kept)
        self.classes[places] = classes
        self.add(inputs)

    def draw_named(self, number: int) -> tuple[Tensor, Tensor]:
        """Some of them by chance, with replacement, and their classes."""
        rows = torch.randint(self.size, (number,), device=self.kept.device)
        found = self.kept[rows]
        return (found if self.normalise is None else self.normalise(found)), self.classes[rows]


class Named(nn.Module):
    """A generator that begins from embeddings of classes: a batch normalisation, a linear layer, a generator."""

    def __init__(self, inside: int, generator: Generator) -> None:
        super().__init__()
        self.norm, self.noisy = nn.BatchNorm1d(inside), nn.Linear(inside, generator.latent)
        self.generator = generator

    def forward(self, codes: Tensor) -> Tensor:
        return self.generator(self.noisy(self.norm(codes)))

    def begin(self, anew: bool) -> None:
        """Of a round: draw the layer before the generator, with ``anew`` all."""
        nn.init.normal_(self.noisy.weight)
        nn.init.zeros_(self.noisy.bias)
        if anew:
            self.norm.reset_running_stats()
            nn.init.ones_(self.norm.weight)
            nn.init.zeros_(self.norm.bias)
            self.generator.start()


class Naming(Remembering):
    """Makes images of classes and tells classes apart by them; see :class:`CAEDFKD`."""

    who = "cae_dfkd"
    codes: Tensor
    maker: Named | None

    def plan(self, scheme: CAEDFKD, loader: BlankLoader, **settings: Any) -> None:
        """Take the settings."""
        super().plan(scheme, loader, **settings)
        self.names = loader.class_names or tuple(str(number) for number in range(loader.classes or 0))
        self.maker = None

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Naming:
        inputs, scheme = batch.inputs, self.scheme
        if self.pool is None:
            self.pool = NamedPool(self._capacity, tuple(inputs.shape[1:]), self.normalise).to(inputs.device)
        super().setup(batch, data)
        if self.maker is None:
            random = scheme.text is None
            codes = (
                orthogonal_codes(len(self.names), scheme.latent)
                if random
                else text_codes(self.names, scheme.text, scheme.prompt)
            )
            self.register_buffer("codes", codes.to(inputs.device))
            generator = Generator(
                scheme.latent, inputs.shape[1:], width=scheme.width, end="pixels", normalise=self.normalise
            )
            self.maker = Named(codes.shape[1], generator).to(inputs.device)
            with at_rest(self.student), torch.no_grad():
                width = self.heard(batch)["penultimate"].flatten(1).shape[1]
            self.head = two_layers(width, width, scheme.head).to(inputs.device)
        self.learns_in_rounds("pool.", "maker.")
        return self

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        assert self.maker is not None
        own = {id(p) for p in self.maker.parameters()}  # it learns in rounds alone
        return (p for p in self.parameters() if id(p) not in own)

    def make(self, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(self.pool, NamedPool)
        if int(self.moves) % self.scheme.every == 0:
            with at_rest(self.student):
                self.pool.add_named(self.synthesise(like), self.targets(like.device))
        images, classes = self.pool.draw_named(len(like))
        return images, {"classes": classes}

    def synthesise(self, like: Tensor) -> Tensor:
        scheme, maker = self.scheme, self.maker
        assert maker is not None
        maker.begin(int(self.moves) // scheme.every % scheme.life == 0)
        maker.train()
        targets = self.targets(like.device)
        degree = scheme.degree * torch.rand(len(targets), device=like.device)
        codes = diffused(self.codes[targets], degree, scheme.sources)
        optimizer = torch.optim.Adam(maker.parameters(), lr=scheme.lr, betas=(0.5, 0.999))
        least, best = torch.full((), torch.inf, device=like.device), torch.empty(0)
        for _ in range(scheme.iterations):
            images = maker(codes)
            loss = self.round_loss(images, targets)
            best = torch.where(loss.detach() < least, images.detach(), best) if len(best) else images.detach()
            least = torch.minimum(least, loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        maker.zero_grad()
        as_on_first([best, *maker.state_dict().values()])
        return best

    def round_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """What a round lessens."""
        scheme, trace = self.scheme, self.inverted(images)
        loss = scheme.one_hot * one_hot_loss(trace.logits, targets)
        if scheme.statistics:
            loss = loss + scheme.statistics * self.inverted.statistics_loss(trace)
        if scheme.adversarial:
            loss = loss - scheme.adversarial * disagreement(self.said(images), trace.logits)
        return loss

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        classes = batch.extras.get("classes")
        if classes is None or not self.scheme.contrast:  # other data, by which it is judged, have no class of this kind
            return super().forward(batch, turn)
        prepared = self.prepare(batch)
        student, teacher = self.traces(prepared)
        losses = self.compare(student, teacher, prepared, counted=batch)
        feature, rows = self.head(student["penultimate"].flatten(1).float()), self.rows_of(batch)
        feature = rows.gather(feature.unflatten(0, (-1, batch.size)).transpose(0, 1))  # views stand view after view
        groups = classes.repeat(feature.shape[1])
        value = supervised_contrast(feature.transpose(0, 1).flatten(0, 1), groups, self.scheme.temperature)
        losses.total = losses.total + self.scheme.contrast * rows.of_whole(value)
        losses.terms["classes_apart"] = value.detach()
        losses.weights["classes_apart"] = value.new_tensor(self.scheme.contrast)
        return losses
