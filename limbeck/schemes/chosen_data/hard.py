"""HARD: an augmentation learns to find inputs on which student and teacher disagree, and the student learns on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import key
from limbeck.core.objective import DataInfo
from limbeck.core.ranks import as_on_first, mean_of_rows, mean_over_ranks, rows_of_ranks
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.survey import call_model
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import logits_of
from limbeck.core.views import stack_views
from limbeck.engine.stage import Stage
from limbeck.schemes.chosen_data.augmenters import Autoencoding, LatentMover, Mover, drawn_from, plain_adam
from limbeck.schemes.data_free.inversion import Inverted
from limbeck.schemes.data_free.memory import Replay
from limbeck.schemes.data_free.pool import at_rest, bounds
from limbeck.schemes.parts.looking import whole_batches
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_START = 13  # keeps the draw of first weights apart from others


def disagreement(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    r"""How far the student is from the teacher, :math:`\tau^2\, KL(p^T_\tau \| p^S_\tau)`: all ranks' samples' mean.

    >>> disagreement(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), 1.0)
    tensor(0.3278)
    """
    rows = kl_rows(soften(teacher_logits, temperature), soften(student_logits, temperature))
    return temperature**2 * mean_of_rows(rows)


@register(
    Card(
        key="hard",
        name="HARD",
        title="HARD: Hard Augmentations for Robust Distillation",
        year=2023,
        arxiv="2305.14890",
        knowledge="scheme",
        equation=r"\max_\phi\; D\big( z^T(x'), z^S(x') \big) - \lambda D\big( z^T(x), z^T(x') \big), \quad "
        r"\min_\theta\; L(x) + L(x'), \qquad x' = A_\phi(x)",
        use="Where a student does not take over what its teacher is indifferent to, such as shifts: it is shown images "
        "moved so that the two disagree. No labels are needed. `augment: latent` changes inputs of any kind in what an "
        "autoencoder makes of them, which is trained on the data first.",
        defaults={
            "augment": "affine, the first of the paper's two",
            "temperature": "4, ours",
            "keep": "1, ours: what changes the teacher's own answer counts against it",
            "lr": "1e-4 with Adam, gradients no longer than 1; ours",
            "control": "turns, one step each; thresholds of 3 and 1.5 times the disagreement on unchanged inputs; ours",
            "limits": "a quarter of a side, 30 degrees, a quarter in size, a fifth of shear; ours",
        },
        evidence="reading",
        evidence_note="from the abstract; the losses and the control are reconstructed and tested by what they promise",
        choices=(
            "A network of the image and of noise says how each image is moved, within limits. It begins with moves by "
            "chance alone: on the images themselves the search would stay, as any small move blurs them.",
            "Student and teacher see each batch as it is and augmented, side by side, with labels for the former "
            "alone; a term is the mean over both.",
            "The augmentation's gradient is taken with the student in evaluation mode.",
            "What the recipe augments comes first, the learned augmentation after it.",
            "On several ranks the two are judged over all of a batch; each has the autoencoder's batch statistics and "
            "noise of its own part.",
        ),
        cost="Each step shows both models two batches, and takes both models' gradients to one more.",
    )
)
class HARD(Scheme):
    r"""One training with the players ``student`` and ``augmenter``; of ``latent`` an autoencoder's before it.

    Args:
        augment: ``"affine"`` moves images, ``"latent"`` changes their code in an autoencoder.
        temperature: :math:`\tau` of D.
        keep: :math:`\lambda`.
        lr: Of the augmentation's Adam.
        clip: The most that its gradient is long.
        control: ``"turns"``: both learn in each step; ``"thresholds"``: the augmentation until the two disagree by
            ``high`` times what they do on unchanged inputs, then the student until it is below ``low`` times that.
        high, low: See there.
        shift, turn, scale, shear: Limits of moves: parts of a side, degrees, logarithm, and a slope.
        spread: Of moves in the beginning; with 0 nothing is moved at first.
        noise: Width of what is random in it; 5 or more.
        latent: Width of the autoencoder's code.
        width: Of the autoencoder.

    Source: HARD: Hard Augmentations for Robust Distillation, arXiv 2305.14890.

    >>> HARD(turn=0, scale=0, shear=0).limits
    (0.25, 0.25, 0.0, 0.0, 0.0)
    """

    def __init__(
        self,
        augment: Literal["affine", "latent"] = "affine",
        temperature: float = 4.0,
        keep: float = 1.0,
        lr: float = 1e-4,
        clip: float = 1.0,
        control: Literal["turns", "thresholds"] = "turns",
        high: float = 3.0,
        low: float = 1.5,
        shift: float = 0.25,
        turn: float = 30.0,
        scale: float = 0.25,
        shear: float = 0.2,
        spread: float = 0.5,
        noise: int = 16,
        latent: int = 32,
        width: int = 32,
    ) -> None:
        zeros = {
            "keep": keep,
            "shift": shift,
            "turn": turn,
            "scale": scale,
            "shear": shear,
            "low": low,
            "spread": spread,
        }
        for name, value in zeros.items():
            check_inside(value, f"scheme.{name}", 0.0, float("inf"), closed=True)
        sizes = {"temperature": temperature, "lr": lr, "clip": clip, "noise": noise, "latent": latent, "width": width}
        for name, value in sizes.items():
            check_positive(value, f"scheme.{name}")
        if noise < 5:
            raise ConfigError("each move has a noise of its own", where="scheme.noise", found=noise, wanted="5 or more")
        if not low < high:
            raise ConfigError("the game would never turn", where="scheme.low", found=low, wanted=f"less than {high}")
        self.augment, self.temperature, self.keep, self.lr, self.clip = augment, temperature, keep, lr, clip
        self.control, self.high, self.low = control, high, low
        self.shift, self.turn, self.scale, self.shear = shift, turn, scale, shear
        self.spread, self.noise, self.latent, self.width = spread, noise, latent, width

    @property
    def limits(self) -> tuple[float, ...]:
        """Of the five moves."""
        return tuple(float(v) for v in (self.shift, self.shift, self.turn * torch.pi / 180, self.scale, self.shear))

    def trainings(self, cast: Cast) -> Iterator[Training]:
        whole_batches(cast.config.accumulate, "HARD", "judges a batch as a whole")
        teacher = cast.need_teacher("HARD asks about inputs of its own making")
        if not isinstance(teacher, FrozenTeacher):
            message = "inputs are changed by what changes the teacher's mind"
            raise ConfigError(message, where="teacher", found=type(teacher).__name__, wanted="one model at hand")
        if cast.train is None:
            raise ConfigError("there is nothing to learn from", where="train", found="none")
        inputs = cast.train.example(2).inputs
        images = isinstance(inputs, Tensor) and inputs.ndim == 4
        vectors = isinstance(inputs, Tensor) and inputs.ndim == 2 and inputs.is_floating_point()
        if not images and not (vectors and self.augment == "latent"):
            raise DataError(
                "these inputs cannot be moved",
                where="data.source",
                found=type(inputs).__name__ if not isinstance(inputs, Tensor) else list(inputs.shape[1:]),
                wanted="images; of augment: latent, images or vectors",
            )
        known = getattr(cast.train, "augment", None)
        normalise = None if known is None else known.normalise
        seed = key(_START, cast.seed) >> 33
        if self.augment == "affine":
            black = None if normalise is None else bounds(normalise, inputs.cpu())[0]
            with drawn_from(seed):
                augmenter: nn.Module = Mover(inputs.shape[1], self.limits, black, spread=self.spread, noise=self.noise)
        else:
            with drawn_from(seed):
                autoencoder = Replay(self.latent, tuple(inputs.shape[1:]), self.width)
            more = {"patience": None, "select": "last", "ema": None, "compile": "off"}
            config = cast.config.model_copy(update={**plain_adam(1e-3), **more})
            stage = Stage("autoencoder", Autoencoding(autoencoder), config)
            yield Training([stage], "autoencoder", judged=False)
            with drawn_from(seed):
                augmenter = LatentMover(autoencoder, noise=self.noise)
        distiller = Hardened(cast.student, cast.loss, teacher, logits=cast.logits)
        distiller.plan(self, augmenter)
        yield Training([Stage("hard", distiller, cast.config)])


class Hardened(Distiller):
    """A student, and an augmentation that looks for what it gets wrong; see :class:`HARD`."""

    turns = ("student", "augmenter")
    hunting: Tensor
    _inverted: tuple[Inverted, ...] = ()  # in a tuple: the teacher's modules are nobody's children here

    def plan(self, scheme: HARD, augmenter: nn.Module) -> None:
        """Take settings and augmentation."""
        self.scheme, self.augmenter = scheme, augmenter
        self.register_buffer("hunting", torch.ones((), dtype=torch.bool))  # of thresholds: the augmentation's phase

    def settled(self) -> dict[str, Any]:
        return {**super().settled(), **vars(self.scheme)}

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Hardened:
        super().setup(batch, data)
        assert isinstance(self.teacher, FrozenTeacher)
        self.augmenter.to(batch.inputs.device)
        self._inverted = (Inverted(self.teacher, batch.inputs, where="scheme hard"),)
        return self

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        own = {id(p) for p in self.augmenter.parameters()}
        return (p for p in self.parameters() if (id(p) in own) == (turn == "augmenter"))

    def settings_of(self, turn: str) -> dict[str, Any]:
        return plain_adam(self.scheme.lr) if turn == "augmenter" else {}

    def made(self, batch: Batch) -> Batch:
        if batch.teacher_inputs is not None:
            raise DataError("the teacher sees other inputs than the student", where="batch.teacher_inputs")
        rows = rows_of_ranks(len(batch.inputs), batch.inputs.device)
        noise = torch.randn(rows.whole, self.scheme.noise, device=batch.inputs.device)
        as_on_first([noise])
        noise = noise[rows.own]
        with torch.no_grad():
            changed = self.augmenter(batch.inputs, noise)
        hidden = batch.labels is None or not batch.labels.is_floating_point()
        stacked = stack_views(batch, [batch.inputs, changed], labelled=1 if hidden else 2)
        stacked.extras = {**stacked.extras, "clean": batch.inputs, "noise": noise}
        return stacked

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        if turn == "augmenter":
            return self._hunt(batch if "clean" in batch.extras else self.made(batch))  # an example is not made
        if self.scheme.control == "thresholds" and "clean" in batch.extras and bool(self.hunting):
            return Losses(self._nothing("augmenter"), {}, {})
        return super().forward(batch)

    def gain(self, images: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the augmentation raises, and its parts."""
        scheme, teacher = self.scheme, self._inverted[0]
        changed = self.augmenter(images, noise)
        with at_rest(self.student):
            student = logits_of(call_model(self.student, changed), self._logits)
        of_changed = teacher(changed).logits
        with torch.no_grad():
            of_clean = teacher(images).logits
        apart = disagreement(student, of_changed, scheme.temperature)
        strayed = disagreement(of_changed, of_clean, scheme.temperature)
        return apart - scheme.keep * strayed, {"apart": apart.detach(), "strayed": strayed.detach()}

    @torch.compiler.disable
    def _hunt(self, batch: Batch) -> Losses:
        """The augmentation's turn; its gradient is made no longer than ``clip``."""
        images, noise = batch.extras["clean"], batch.extras["noise"]
        gain, parts = self.gain(images, noise)
        if self.scheme.control == "thresholds":
            learns = bool(self.hunting)
            self._turn(images, parts["apart"])
            if not learns:
                return Losses(self._nothing("student"), parts, self._ones(parts))
        own = [p for p in self.augmenter.parameters() if p.requires_grad]
        found = [mean_over_ranks(g) for g in torch.autograd.grad(-gain, own)]
        length = torch.stack([g.norm() for g in found]).norm()
        shrunk = (self.scheme.clip / (length + 1e-6)).clamp(max=1.0)
        line = torch.stack([(p * (g * shrunk)).sum() for p, g in zip(own, found, strict=True)]).sum()
        return Losses(line - line.detach() - gain.detach(), parts, self._ones(parts))

    @torch.no_grad()
    def _turn(self, images: Tensor, apart: Tensor) -> None:
        """Whose phase comes next, by how far the two are apart beside what they are on unchanged inputs."""
        with at_rest(self.student), torch.no_grad():
            student = logits_of(call_model(self.student, images), self._logits)
            usual = disagreement(student, self._inverted[0](images).logits, self.scheme.temperature)
        ratio = apart / usual.clamp(min=1e-12)
        self.hunting.copy_(torch.where(self.hunting, ratio < self.scheme.high, ratio < self.scheme.low))

    def _nothing(self, whose: str) -> Tensor:
        """0, of parameters that this turn does not move."""
        return next(p for p in self.parameters_of(whose) if p.requires_grad).sum() * 0

    @staticmethod
    def _ones(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.ones_like(value) for name, value in parts.items()}

    def close(self) -> None:
        super().close()
        for inverted in self._inverted:
            inverted.close()
