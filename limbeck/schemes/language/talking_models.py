"""Talking models: the student sends its state to the teacher, which answers by what its own upper layers make of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.layout import is_grid, patch_tokens, resize, to_map, to_tokens
from limbeck.core.objective import Contract, DataInfo, Objective, Terms
from limbeck.core.reduction import check_positive, fit_mask, reduce, widen
from limbeck.core.relations import channel_dim, pooled
from limbeck.core.schedules import Constant
from limbeck.core.teacher import FrozenTeacher, teacher_inputs
from limbeck.core.trace import Trace
from limbeck.engine.stage import Stage
from limbeck.models.split_forward import SplitForward
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="talking_models",
        name="Talking Models",
        title="Talking Models: Distill Pre-trained Knowledge to Downstream Models via Interactive Communication",
        year=2023,
        arxiv="2310.03188",
        knowledge="scheme",
        equation=r"L + w_i \| r - h_S^b \|^2 + w_m \| e_S(h_S) - e_T(h_T) \|^2 "
        r"+ w_s \sum_{M} \| d_M(e_M(h_M)) - h_M \|^2, "
        r"\quad r = d_S \big( e_T(T^{a \to b}(d_T(e_S(h_S^a)))) \big)",
        use="For a teacher that was trained on something broader than the student's task: the student asks, and the "
        "teacher says what it makes of that. Classes of the two may differ; the recipe's loss is the task's own.",
        defaults={
            "lower, upper": "the first block and the last, our choice",
            "width": "256, our choice",
            "interact, message, state": "1, 1 and 0.1, our choice: the answer alone may be what the student said "
            "before, and carries knowledge over only where both mean the same by a message",
            "rounds": "1, our choice",
        },
        evidence="reading",
        choices=(
            "of the paper the abstract and reviews could be read, which name the three losses and the two layers of "
            "each model; their forms are ours",
            "encoders and decoders are two linear layers with GELU between, twice as wide inside as a message; a "
            "message is normalised (LayerNorm)",
            "every state has an encoder and a decoder of its own: two layers of two models; messages and states are "
            "compared at both layers, and the mean of the two counts",
            "messages are sent place by place; between maps of two resolutions they are resized, and a class token "
            "of the teacher hears their mean",
            "the teacher is frozen; the gradient runs through its layers to who asked",
            "in a further round the student's next message is what it makes of the last answer",
        ),
        tasks=("classification", "language"),
        cost="The teacher runs twice in each round, and its upper layers backward.",
    )
)
class TalkingModels(Scheme):
    r"""One stage; in each step the student talks with its teacher about every sample.

    .. math:: m_1 = e_S^a(h_S^a), \quad k = T^{a \to b}(d_T^a(m_1)), \quad r = d_S^b(e_T^b(k)), \qquad
        L_{\text{interact}} = \frac 1 {d_S} \| r - h_S^b \|^2

    where :math:`h^a, h^b` are states at the lower and the upper place, and :math:`T^{a \to b}` is what lies between
    the teacher's. Messages of both models about one sample are to be alike, :math:`L_{\text{message}}`, and the states
    they came from are to be read out of them again, :math:`L_{\text{state}}`.

    Args:
        lower, upper: Taps of the student; the upper one comes later.
        teacher_lower, teacher_upper: The teacher's, where they are called otherwise.
        width: Of a message.
        interact, message, state: Weights of the three losses.
        rounds: How often the student asks; the loss is the mean over rounds.

    Source: Talking Models, arXiv 2310.03188.

    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import CrossEntropy
    >>> def model(width):
    ...     return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 3))
    >>> cast = Cast(model(5), Terms.of(CrossEntropy()), FrozenTeacher(model(9)), TrainConfig())
    >>> (training,) = TalkingModels(lower="0", upper="2", width=8).trainings(cast)
    >>> batch = Batch(torch.ones(2, 4), torch.tensor([0, 2]))
    >>> sorted(training.stages[0].distiller.setup(batch)(batch).terms)
    ['cross_entropy', 'talk/interact', 'talk/message', 'talk/state']
    """

    def __init__(
        self,
        lower: str = "blocks:0",
        upper: str = "blocks:-1",
        teacher_lower: str | None = None,
        teacher_upper: str | None = None,
        width: int = 256,
        interact: float = 1.0,
        message: float = 1.0,
        state: float = 0.1,
        rounds: int = 1,
    ) -> None:
        check_positive(width, "scheme.width")
        check_positive(rounds, "scheme.rounds")
        for name, value in (("interact", interact), ("message", message), ("state", state)):
            if value < 0:
                raise ConfigError("must not be negative", where=f"scheme.{name}", found=value)
        self.student_taps, self.width, self.rounds = (lower, upper), width, rounds
        self.teacher_taps = (teacher_lower or lower, teacher_upper or upper)
        self.weights = {"interact": interact, "message": message, "state": state}

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher = cast.need_teacher("the student talks with")
        if not isinstance(teacher, FrozenTeacher):
            raise ConfigError(
                "what a teacher makes of the student's states can be asked only where it is a model at hand",
                where="teacher",
                found=type(teacher).__name__,
                remedy="give the model itself, not a cache of what it said",
            )
        loss = cast.loss + Terms([Talk(self, teacher.model)], [Constant(1.0)], ["talk"])
        yield Training(
            [Stage("talking_models", Distiller(cast.student, loss, teacher, logits=cast.logits), cast.config)]
        )


class Codec(nn.Module):
    """Puts a state into a message, place by place, and reads it out again.

    Args:
        dim: Channels of the state.
        width: Of the message.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.encoder: nn.Module = nn.Sequential(
            nn.Linear(dim, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.LayerNorm(width)
        )
        self.decoder: nn.Module = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, dim))

    def encode(self, state: Tensor) -> Tensor:
        """The message, as a state has its places: ``[B, W]``, ``[B, N, W]`` or ``[B, W, H, W]``."""
        return _along(self.encoder, state)

    def decode(self, message: Tensor) -> Tensor:
        """The state that a message tells of."""
        return _along(self.decoder, message)


class Talk(Objective):
    """The three losses of a conversation; see :class:`TalkingModels`."""

    contract = Contract(normalizer="samples", at_equal=None, mask=True)
    codecs: nn.ModuleDict | None

    def __init__(self, scheme: TalkingModels, model: nn.Module) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = scheme.student_taps, scheme.teacher_taps
        self.width, self.rounds, self.parts, self.codecs = scheme.width, scheme.rounds, dict(scheme.weights), None
        self._model: tuple[nn.Module] = (model,)  # in a tuple: the teacher is no part of what learns
        self._between: SplitForward | None = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        lower, upper = self.teacher_taps
        self._between = SplitForward(self._model[0], lower, upper, teacher_inputs(batch))
        if self.codecs is None:
            states = dict(zip(_NAMES, [*self._states(student), *self._states(teacher, False)], strict=True))
            kind = widen(states["student_lower"])  # all compute in the student's precision
            found = {name: Codec(s.shape[channel_dim(s)], self.width).to(kind) for name, s in states.items()}
            self.codecs = nn.ModuleDict(found)

    def _states(self, trace: Trace, own: bool = True) -> list[Tensor]:
        return [trace[tap] for tap in (self.student_taps if own else self.teacher_taps)]

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        codecs: Any = self.ready("codecs")
        mine, its = self._states(student), [state.detach() for state in self._states(teacher, False)]
        states = dict(zip(_NAMES, [*mine, *its], strict=True))
        said = {name: codecs[name].encode(_fit(codecs[name], state)) for name, state in states.items()}
        pairs = [("student_lower", "teacher_lower"), ("student_upper", "teacher_upper")]
        message = [_distance(said[s], carried(said[t], said[s]), batch.mask) for s, t in pairs]
        again = [_distance(codecs[name].decode(said[name]), state, batch.mask) for name, state in states.items()]
        return {
            "interact": self.parts["interact"] * self._interact(said["student_lower"], states, batch),
            "message": self.parts["message"] * (message[0] + message[1]) / 2,
            "state": self.parts["state"] * sum(again[1:], again[0]) / 2,
        }

    def _interact(self, message: Tensor, states: dict[str, Tensor], batch: Batch) -> Tensor:
        codecs: Any = self.codecs
        between, losses = self._between, list[Tensor]()
        assert between is not None
        lower, upper, asked = states["student_lower"], states["student_upper"], states["teacher_lower"]
        for number in range(self.rounds):
            heard = codecs["teacher_lower"].decode(carried(message, asked))
            reply = codecs["teacher_upper"].encode(_fit(codecs["teacher_upper"], between(teacher_inputs(batch), heard)))
            answer = codecs["student_upper"].decode(carried(reply, upper))
            losses.append(_distance(answer, upper, batch.mask))
            if number + 1 < self.rounds:
                thought = codecs["student_lower"].decode(carried(codecs["student_upper"].encode(answer), lower))
                message = codecs["student_lower"].encode(thought)
        return sum(losses[1:], losses[0]) / self.rounds


_NAMES = ("student_lower", "student_upper", "teacher_lower", "teacher_upper")


def carried(message: Tensor, like: Tensor) -> Tensor:
    """A message, with the places of a state that it goes to; channels stay as they are.

    Tokens of one number and vectors stay; maps are resized; a vector is said to every place, and to a vector the mean
    of all places is said. Tokens in front of a square grid (class tokens) hear the mean.

    Raises:
        TensorError: Texts of different numbers of tokens.

    >>> carried(torch.ones(2, 5, 4, 4), torch.ones(2, 10, 7)).shape
    torch.Size([2, 10, 5])
    """
    if message.ndim == like.ndim and (like.ndim == 2 or (like.ndim == 3 and message.shape[1] == like.shape[1])):
        return message
    if like.ndim == 2:
        return to_tokens(message).mean(dim=1)
    if message.ndim == 2:
        places = like.movedim(channel_dim(like), -1).shape[1:-1]
        spread = message.view(len(message), *[1] * len(places), -1).expand(-1, *places, -1)
        return spread.movedim(-1, channel_dim(like))
    if not all(is_grid(t) for t in (message, like) if t.ndim == 3):
        raise TensorError(
            "messages go from token to token, and these texts have different numbers of them",
            where="student_feature",
            found=f"{list(message.shape)} beside the teacher's {list(like.shape)}",
            wanted="one tokenizer",
        )
    if like.ndim == 4:
        return resize(to_map(message), like.shape[2:])
    patches = patch_tokens(like).shape[1]
    grid = to_tokens(resize(to_map(message), (math.isqrt(patches),) * 2))
    front = grid.mean(dim=1, keepdim=True).expand(-1, like.shape[1] - patches, -1)
    return torch.cat([front, grid], dim=1)


def _along(module: nn.Module, feature: Tensor) -> Tensor:
    """A module for rows, along the channels of a feature."""
    dim = channel_dim(feature)
    return module(feature.movedim(dim, -1)).movedim(-1, dim)


def _fit(codec: Codec, state: Tensor) -> Tensor:
    """A state in the precision of its codec: a teacher may have one of its own."""
    weight = next(codec.parameters(), None)
    return state if weight is None else state.to(weight.dtype)


def _distance(first: Tensor, second: Tensor, mask: Tensor | None) -> Tensor:
    """The mean square over channels, a sample's places that count, and samples."""
    gaps = (widen(first) - widen(second)).square().mean(dim=channel_dim(first))
    if mask is not None and mask.shape != gaps.shape[: mask.ndim]:  # places of labels that are not those of a map
        mask = mask.reshape(len(mask), -1).any(dim=1)
    counts = None if mask is None else fit_mask(mask, gaps).reshape(len(gaps), -1)
    values, some = pooled(gaps.reshape(len(gaps), -1, 1), counts)
    return reduce(values.squeeze(1), some)
