"""The generic stage of G2SD: a student's encoder learns a masked autoencoder's hidden tokens, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.hashing import key
from limbeck.core.objective import Contract, DataInfo, Objective, Terms
from limbeck.core.reduction import check_same_shape, reduce, widen
from limbeck.core.roles import resolve
from limbeck.core.survey import survey
from limbeck.core.teacher import FrozenTeacher, Teacher, teacher_inputs
from limbeck.core.trace import Trace
from limbeck.schemes.parts.looking import Unlabelled
from limbeck.schemes.parts.masked_patches import Masking, PatchDecoder, drawn_evenly, patch_order, sincos_positions

if TYPE_CHECKING:
    from limbeck.schemes.in_steps.g2sd import G2SD

_START = 53  # keeps the draw of tokens apart from others
_TOKENS = ("cls", "class", "dist")  # what models call tokens that are no patches


def generic_loss(predicted: Tensor, hidden: Tensor, masked: Tensor | None = None, *, beta: float = 2.0) -> Tensor:
    r"""How far predicted tokens are from a teacher's, normalised: :math:`\mathrm{SmoothL1}_\beta(p, \mathrm{LN}(h))`.

    Args:
        predicted: ``[B, 1 + N, D]``, the class token first.
        hidden: The same of the teacher; detached, and normalised without weight or bias.
        masked: ``[B, N]``, True at patches that were not shown: these count alone. ``None``: all tokens.
        beta: Where the square ends.

    Raises:
        TensorError: Shapes differ.

    >>> hidden = torch.randn(2, 5, 8)
    >>> goal = F.layer_norm(hidden, (8,), eps=1e-6)
    >>> generic_loss(goal, hidden), generic_loss(goal + 1, hidden), generic_loss(goal + 4, hidden)
    (tensor(0.), tensor(0.2500), tensor(3.))
    """
    check_same_shape(predicted, hidden, "predicted", "hidden")
    goal = F.layer_norm(widen(hidden.detach()), hidden.shape[-1:], eps=1e-6)
    rows = F.smooth_l1_loss(widen(predicted), goal, reduction="none", beta=beta).mean(dim=-1)
    return reduce(rows) if masked is None else reduce(rows[:, 1:], masked)


@dataclass(frozen=True)
class Autoencoder:
    """What is known of the teacher, transformers' ``ViTMAEForPreTraining``.

    Args:
        patches: N, of an image.
        shown: How many of them its encoder sees.
        blocks: Of its decoder.
    """

    patches: int
    shown: int
    blocks: int

    @classmethod
    def of(cls, teacher: Teacher, where: str) -> Autoencoder:
        """Look at a teacher.

        Raises:
            ConfigError: It is another kind.
        """
        model = teacher.model if isinstance(teacher, FrozenTeacher) else None
        blocks = getattr(getattr(model, "decoder", None), "decoder_layers", None)
        ratio = getattr(getattr(model, "config", None), "mask_ratio", None)
        if model is None or blocks is None or ratio is None:
            raise ConfigError(
                "the generic stage learns from a masked autoencoder with its decoder",
                where=where,
                found=type(teacher if model is None else model).__name__,
                wanted="transformers' ViTMAEForPreTraining, such as auto: ViTMAEForPreTraining of transformers:vit_mae",
            )
        patches = model.get_submodule("vit.embeddings.patch_embeddings").num_patches
        return cls(int(patches), int(patches * (1 - ratio)), len(blocks))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Encoder:
    """What is known of a student that is a vision transformer.

    Args:
        block: Name of its first block.
        norm: Name of the normalisation after its last: what it gives are its tokens.
        prefix: Tokens before the patches: 1, the class token; 2, a distillation token after it.
        positions: Name of the parameter of positions, if there is one.
        tokens: Names of the parameters of class and distillation token, those that are there.
    """

    block: str
    norm: str
    prefix: int
    positions: str | None
    tokens: tuple[str, ...]

    @classmethod
    def of(cls, student: nn.Module, inputs: Any, patches: int, logits: str | None = None) -> Encoder:
        """Look at a student.

        Args:
            student: It runs once.
            inputs: An example.
            patches: Of an image, as the teacher has them.
            logits: Where logits stand in its output.

        Raises:
            ConfigError: It has no normalisation after its blocks.
            TensorError: It sees other patches than the teacher.
        """
        places = survey(student, inputs, logits)
        spots = resolve("blocks", places)
        blocks = [places[spot.module] for spot in (spots if isinstance(spots, list) else [spots])]
        shape = blocks[-1].shape or ()
        after = [p for p in places.values() if p.order > blocks[-1].order and p.leaf and "Norm" in p.module]
        norm = next((p.name for p in after if p.shape == shape), None)
        if len(shape) != 3 or norm is None:
            raise ConfigError(
                "the student is a vision transformer whose tokens are normalised after the last block",
                where="student",
                found=f"a {type(student).__name__} whose blocks give {list(shape)}",
            )
        if shape[1] - patches not in (1, 2):
            raise TensorError(
                "student and teacher look at images through the same grid of patches",
                where="student",
                found=f"{shape[1]} tokens",
                wanted=f"{patches} patches, a class token and perhaps a distillation token",
            )
        named = {n: p for n, p in student.named_parameters() if p.ndim == 3 and p.shape[::2] == (1, shape[2])}
        lengths = range(patches, shape[1] + 1)
        positions = (n for n, p in named.items() if "pos" in _last(n) and p.shape[1] in lengths)
        tokens = (n for n, p in named.items() if p.shape[1] == 1 and any(kind in _last(n) for kind in _TOKENS))
        return cls(blocks[0].name, norm, shape[1] - patches, next(positions, None), tuple(tokens))

    @property
    def resting(self) -> tuple[str, ...]:
        """Parameters that masked images have no use for: that of the distillation token."""
        return tuple(name for name in self.tokens if "dist" in _last(name))

    def begin(self, student: nn.Module, patches: int, seed: int) -> None:
        r"""Let the student start as masked autoencoders do: fixed positions, class token :math:`N(0, 0.02^2)`.

        Tokens that are no patches have no position. The distillation token is drawn, too.

        Raises:
            ConfigError: It has no positions.
        """
        if self.positions is None:
            raise ConfigError(
                "no positions are known in this student",
                where="scheme.start",
                found="mae",
                remedy="say start: own",
            )
        generator = torch.Generator().manual_seed(key(_START, seed) >> 1)
        with torch.no_grad():
            for name in self.tokens:
                token = student.get_parameter(name)
                token.copy_(0.02 * torch.randn(token.shape, generator=generator))
            positions = student.get_parameter(self.positions).zero_()
            positions[:, -patches:] = sincos_positions(patches, positions.shape[-1]).to(positions)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


class GenericLoss(Objective):
    """A light decoder on the student's tokens predicts the teacher's hidden ones; see :func:`generic_loss`."""

    contract = Contract(normalizer="samples", at_equal=None)

    def __init__(self, scheme: G2SD, teacher: Autoencoder, encoder: Encoder) -> None:
        super().__init__()
        self.scheme, self.autoencoder = scheme, teacher
        self.student_taps = (encoder.norm,)
        self.teacher_taps = (f"decoder.decoder_layers.{scheme.teacher_blocks - 1}",)
        self.decoder: PatchDecoder | None = None
        self.predictor: nn.Sequential | None = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        tokens, wide = student[self.student_taps[0]], teacher[self.teacher_taps[0]].shape[-1]
        width, heads = self.scheme.decoder(tokens.shape[-1])
        self.decoder = PatchDecoder(
            tokens.shape[-1], self.autoencoder.patches, width, self.scheme.decoder_blocks, heads
        ).to(tokens)
        self.predictor = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, wide)).to(tokens)
        self.predictor.apply(drawn_evenly)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        order = batch.extras["patch_order"]
        predicted = self.ready("predictor")(self.ready("decoder")(student[self.student_taps[0]], order))
        masked = None if self.scheme.supervise == "all" else order >= self.autoencoder.shown
        return generic_loss(predicted, teacher[self.teacher_taps[0]], masked, beta=self.scheme.beta)


class Generic(Unlabelled):
    """The stage: student and teacher are shown the same patches of each image.

    Args:
        student: Its encoder learns.
        teacher: The masked autoencoder.
        loss: What its decoder is in, with the settings.
        encoder: What is known of the student.
        seed: Of the masks.
        logits: Where logits stand in the student's output.
    """

    masking: Masking | None = None

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        loss: GenericLoss,
        encoder: Encoder,
        seed: int,
        logits: str | None = None,
    ) -> None:
        super().__init__(student, Terms.of(loss), teacher, logits=logits)
        self.encoder, self.seed, self.scheme, self.autoencoder = encoder, seed, loss.scheme, loss.autoencoder

    def prepare(self, batch: Batch) -> Batch:
        """Draw what is shown; the teacher is told as noise, whose lowest values are shown."""
        patches = self.autoencoder.patches
        order = patch_order(batch.require("index"), patches, self.seed, batch.progress)
        images, noise = teacher_inputs(batch), order / patches
        given = {**images} if isinstance(images, Mapping) else {"pixel_values": images}
        batch = batch.replace(teacher_inputs={**given, "noise": noise}, extras={**batch.extras, "patch_order": order})
        return super().prepare(batch)

    def heard(self, batch: Batch) -> Trace:
        if self.masking is None:
            self.masking = Masking(self.student, self.encoder.block, self.encoder.prefix, self.autoencoder.shown)
        masking = self.masking
        masking.order = batch.extras["patch_order"]
        try:
            return super().heard(batch)
        finally:
            masking.order = None

    def close(self) -> None:
        super().close()
        if self.masking is not None:
            self.masking.close()
            self.masking = None

    def settings_of(self, turn: str) -> dict[str, Any]:
        return dict(self.scheme.generic_train)

    def settled(self) -> dict[str, Any]:
        return dict(vars(self.scheme))
