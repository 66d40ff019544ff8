"""G2SD: a vision transformer first learns a masked autoencoder's hidden tokens, then a task from a tuned teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, DataInfo, Objective, Terms
from limbeck.core.reduction import check_inside, check_positive, widen
from limbeck.core.schedules import Constant
from limbeck.core.teacher import Teacher, as_teacher
from limbeck.core.trace import Trace
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.schemes.in_steps.generic import Autoencoder, Encoder, Generic, GenericLoss
from limbeck.schemes.parts.two_stages import two_configs
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.several import SeveralTeachers

#: Heads of the distillation token and of the class token, in students whose answer is the mean of both.
_HEADS = {"distillation_classifier": "cls_classifier", "head_dist": "head"}
_TOKEN = 1  # the distillation token's place
_HEAD = 32  # width of an attention head in the paper's decoders


class TokenLoss(Objective):
    r"""The distillation token's head learns the class that the teacher thinks likeliest, :math:`H(\arg\max t, d)`.

    Args:
        tap: Where that head's logits are; or, with ``own``, the student's last tokens.
        own: The head is made here, and dropped when the student ships.
    """

    contract = Contract(at_equal=None)
    teacher_taps = ("logits",)

    def __init__(self, tap: str, own: bool) -> None:
        super().__init__()
        self.student_taps, self.own = (tap,), own
        self.head: nn.Linear | None = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        if self.own:
            tokens = student[self.student_taps[0]]
            self.head = nn.Linear(tokens.shape[-1], teacher.logits.shape[-1]).to(tokens)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        said = student[self.student_taps[0]]
        if self.own:
            said = self.ready("head")(said[:, _TOKEN])
        return F.cross_entropy(widen(said), teacher.logits.detach().argmax(dim=-1))


@register(
    Card(
        key="g2sd",
        name="G2SD",
        title="Generic-to-Specific Distillation of Masked Autoencoders",
        year=2023,
        arxiv="2302.14771",
        code="pengzhiliang/G2SD",
        knowledge="scheme",
        equation=r"L_1 = \mathrm{SmoothL1}_\beta(g(s), \mathrm{LN}(h_T)), \qquad "
        r"L_2 = \tfrac{1}{2} H(y, z) + \tfrac{1}{2} H(\arg\max t, d)",
        use="A small vision transformer, a masked autoencoder with its decoder (`teachers: {mae: ...}`), and that one "
        "tuned to the task (`teacher`): much better features than distilling for the task alone.",
        defaults={
            "share": "0.6: 300 epochs of 500 in the authors' scripts",
            "teacher_blocks": "4, supervise: all and beta: 2, those of the authors' code",
            "decoder": "4 blocks; width two thirds of the student's, heads of 32: 256 and 8 for ViT-S, 128 and 4 for "
            "ViT-Ti, as there",
            "token": "0.5, as there",
        },
        evidence="parity",
        evidence_note="the generic loss of a whole step, its gradients in encoder, decoder and predictor, and the "
        "fixed positions: pengzhiliang/G2SD@6146adf (models_mae.py, engine_distill.py)",
        choices=(
            "the share of masked patches is the teacher's own (config.mask_ratio, 0.75)",
            "masks follow from sample, seed and progress, not from a generator",
            "the student's distillation token stands second, as transformers' DeiT has it; the authors append theirs, "
            "without a position. Attention does not know the difference. It rests in the first stage",
            "DeiTForImageClassification ends with its class head, DeiTForImageClassificationWithTeacher with the mean "
            "of both; both read tokens, as do the authors' students in their script, whose average-pooling cannot be "
            "joined with the token",
            "the recipe's loss takes the place of the cross-entropy on labels; with token: 0 it is all (nkd, as in the "
            "authors' option), and students need no distillation token",
            "positions are fixed in the first stage alone, as in the authors' code; transformers' DeiT, all of whose "
            "tokens start at zero, gets start: mae for its class token, too",
            "the encoder's features (weight 0 in the authors' code) and pixels are not learned",
            "drop path, layer decay and other settings are the recipe's: AdamW, betas 0.9 and 0.95, lr 1.5e-4 and 1e-3 "
            "per 256 samples, weight decay 0.05",
            "detection and segmentation, where maps of objectness weigh features and scores, are left to objectives "
            "for detectors",
        ),
        needs=("index",),
    )
)
class G2SD(Scheme):
    r"""Two stages: ``generic``, without labels, from a masked autoencoder; ``specific``, the task.

    First student and teacher see the same few patches of an image. The teacher's decoder, as far as its
    ``teacher_blocks``, gives a hidden token for each patch; a light decoder and a predictor g on the student's encoder
    shall say the same. Both are dropped afterwards: nothing but the encoder goes on.

    .. math:: L_1 = \mathrm{SmoothL1}_\beta(g(s), \mathrm{LN}(h_T))

    Then a distillation token with a head of its own, d, learns the tuned teacher's answers, and the class head z learns
    by the recipe's loss, which in the paper is cross-entropy on mixed images:

    .. math:: L_2 = (1 - w) H(y, z) + w H(\arg\max t, d), \qquad w = \frac{1}{2}

    Without such a teacher the second stage is fine-tuning by the recipe's loss.

    Args:
        generic: Name of the autoencoder among ``teachers``, or, where the task has no teacher, among ``players``.
        share: Of the training, for the first stage.
        teacher_blocks: Of the teacher's decoder that are run.
        supervise: ``all`` tokens count, or the ``masked`` alone.
        beta: :math:`\beta`.
        decoder_width: Of the student's decoder; default two thirds of the student's.
        decoder_blocks: Its blocks.
        decoder_heads: Its heads; default one for each 32 of its width.
        start: ``mae``: the student starts with positions that are fixed in the first stage, and with class and
            distillation tokens drawn from :math:`N(0, 0.02^2)`; ``own``: with those that it brings, pre-trained ones.
        token: w; 0: no distillation token.
        generic_train: Settings of training that are the first stage's own, such as ``{lr: 0.00015}``.

    Source: Generic-to-Specific Distillation of Masked Autoencoders, arXiv 2302.14771.

    >>> G2SD().decoder(384), G2SD().decoder(192)
    ((256, 8), (128, 4))
    """

    def __init__(
        self,
        generic: str = "mae",
        share: float = 0.6,
        teacher_blocks: int = 4,
        supervise: Literal["all", "masked"] = "all",
        beta: float = 2.0,
        decoder_width: int | None = None,
        decoder_blocks: int = 4,
        decoder_heads: int | None = None,
        start: Literal["mae", "own"] = "mae",
        token: float = 0.5,
        generic_train: dict[str, Any] = {},  # noqa: B006  never changed
    ) -> None:
        check_inside(share, "scheme.share")
        check_inside(token, "scheme.token", closed=True)
        sizes = {"teacher_blocks": teacher_blocks, "decoder_width": decoder_width, "decoder_heads": decoder_heads}
        for name, value in {**sizes, "decoder_blocks": decoder_blocks, "beta": beta}.items():
            if value is not None:
                check_positive(value, f"scheme.{name}")
        unknown = sorted(set(generic_train) - set(TrainConfig.model_fields))
        if unknown:
            raise ConfigError("no such setting of training", where="scheme.generic_train", found=", ".join(unknown))
        TrainConfig(**generic_train)  # tells what cannot be
        self.generic, self.share, self.teacher_blocks, self.supervise = generic, share, teacher_blocks, supervise
        self.beta, self.start, self.token = beta, start, token
        self.decoder_width, self.decoder_blocks, self.decoder_heads = decoder_width, decoder_blocks, decoder_heads
        self.generic_train = dict(generic_train)

    def decoder(self, width: int) -> tuple[int, int]:
        """Width and heads of the decoder of a student of some width.

        Raises:
            ConfigError: Heads do not share the width.
        """
        own = self.decoder_width or max(1, 2 * width // (3 * _HEAD)) * _HEAD
        heads = self.decoder_heads or max(1, own // _HEAD)
        if own % heads or own % 4:
            raise ConfigError(
                "heads share the decoder's width evenly, and it is a multiple of 4",
                where="scheme.decoder_width",
                found=f"{own}, {heads} heads",
            )
        return own, heads

    def trainings(self, cast: Cast) -> Iterator[Training]:
        if cast.train is None:
            raise ConfigError("there is nothing to learn from", where="train")
        first, second = two_configs(cast.config, self.share)
        given = cast.teachers.get(self.generic)
        teacher = as_teacher(cast.player(self.generic)) if given is None else given
        autoencoder = Autoencoder.of(teacher, f"teachers.{self.generic}")
        if self.teacher_blocks > autoencoder.blocks:
            raise ConfigError(
                "the teacher's decoder has fewer blocks",
                where="scheme.teacher_blocks",
                found=self.teacher_blocks,
                wanted=f"at most {autoencoder.blocks}",
            )
        encoder = Encoder.of(cast.student, cast.train.example(2).inputs, autoencoder.patches, cast.logits)
        resting = set(encoder.resting)
        if self.start == "mae":
            encoder.begin(cast.student, autoencoder.patches, cast.seed)
            resting |= {str(encoder.positions)}
        loss = GenericLoss(self, autoencoder, encoder)
        pair = Generic(cast.student, teacher, loss, encoder, cast.seed, cast.logits)
        learn = tuple(name for name, _ in cast.student.named_parameters() if name not in resting)
        yield Training(
            [Stage("generic", pair, first, learn, learn_to=encoder.norm), self._specific(cast, encoder, second)]
        )

    def _specific(self, cast: Cast, encoder: Encoder, config: TrainConfig) -> Stage:
        """The second stage."""
        others = [teacher for name, teacher in cast.teachers.items() if name != self.generic]
        teacher: Teacher | None = SeveralTeachers(others) if len(others) > 1 else next(iter(others), None)
        if teacher is None or not self.token:
            return Stage("specific", Distiller(cast.student, cast.loss, teacher, logits=cast.logits), config)
        if encoder.prefix <= _TOKEN:
            raise ConfigError(
                "the student has no distillation token",
                where="student",
                found=f"a {type(cast.student).__name__}",
                wanted="transformers' DeiTForImageClassification or DeiTForImageClassificationWithTeacher",
                remedy="say token: 0 to learn by the recipe's loss alone",
            )
        modules = dict(cast.student.named_modules())
        own = next((name for name in _HEADS if name in modules), None)
        token = Terms([TokenLoss(own or encoder.norm, own is None)], [Constant(self.token)], ["token"])
        loss = cast.loss * (1 - self.token) + token
        pair = Specific(cast.student, loss, teacher, logits=cast.logits, also=[] if own is None else [_HEADS[own]])
        pair.class_head = None if own is None else _HEADS[own]
        return Stage("specific", pair, config)


class Specific(Distiller):
    """The second stage, in which the recipe's loss hears the class head alone, whatever the student answers."""

    class_head: str | None = None

    def heard(self, batch: Batch) -> Trace:
        trace = super().heard(batch)
        if self.class_head is not None:
            trace.taps["logits"] = trace[self.class_head]
        return trace
