"""Students that learn from batches that are made: by anything, or by a generator that learns beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo
from limbeck.core.ranks import Rows, drawn_alike, rows_of_ranks
from limbeck.core.survey import call_model
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import logits_of
from limbeck.data.blank import BlankLoader
from limbeck.models.generator import End, Generator
from limbeck.schemes.data_free.inversion import Inverted
from limbeck.schemes.scheme import Cast

_INPUTS, _TURN = 1, 2  # keep these draws apart

#: What a generator's optimizer does not take over from the student's.
_PLAIN: dict[str, Any] = {"weight_decay": 0.0, "schedule": "constant", "schedule_options": {}, "warmup": 0.0}


def teacher_at_hand(cast: Cast, who: str) -> FrozenTeacher:
    """The teacher as a model, or an error that says why it must be one, and why the loss must ask it."""
    teacher = cast.need_teacher(f"{who} makes what it learns from, and has no labels for it: it asks")
    if not isinstance(teacher, FrozenTeacher):
        raise ConfigError(
            f"{who} asks its teacher about inputs that nobody has seen before",
            where="teacher",
            found=type(teacher).__name__,
            wanted="one model at hand",
        )
    if not cast.loss.teacher_taps:
        raise ConfigError(
            "nothing in this loss asks the teacher, and what is made teaches nothing else",
            where="loss",
            found=", ".join(cast.loss.names),
            remedy="use kd",
        )
    return teacher


def without_data(cast: Cast, who: str) -> BlankLoader:
    """As many steps as the recipe's data have, without any of them.

    Raises:
        ConfigError: Steps are cut into parts, or losses are scaled; a batch that is made is one, since its statistics
            are those of the whole.
    """
    if cast.config.accumulate != 1:
        raise ConfigError(
            f"{who} judges a made batch as a whole, so a step cannot be cut",
            where="train.accumulate",
            found=cast.config.accumulate,
            wanted="1",
            remedy="take a smaller data.batch_size",
        )
    if cast.config.precision == "fp16":
        raise ConfigError(f"{who} trains without loss scaling", where="train.precision", found="fp16", wanted="bf16")
    if cast.train is None:
        raise ConfigError("nobody says what an input looks like", where="train", found="none")
    return cast.train if isinstance(cast.train, BlankLoader) else BlankLoader(cast.train)


def unlabelled(batch: Batch, inputs: Tensor, **extras: Any) -> Batch:
    """A batch of what was made: it has no ids, and nobody knows its labels."""
    labels = torch.full((len(inputs),), -1, dtype=torch.long, device=inputs.device)
    return batch.replace(
        inputs=inputs, labels=labels, index=None, view=None, teacher_inputs=None, extras={**batch.extras, **extras}
    )


class Made(Distiller):
    """A student whose inputs are made, in the normalised space in which it is to see data.

    Labels are unknown, so terms of a loss that learn from labels are 0. A subclass says by ``make`` what is made.

    Of several processes each makes the whole step's batch, alike; its student then learns from its own rows. What is
    drawn for it follows from the seed and the number of batches made before.
    """

    who = "it"
    moves: Tensor

    def plan(self, scheme: Any, loader: BlankLoader, *, seed: int = 0) -> None:
        """Take the scheme's settings and what is known of inputs."""
        self.scheme, self.normalise, self.classes, self.seed = scheme, loader.normalise, loader.classes, seed
        self.register_buffer("moves", torch.zeros((), dtype=torch.long))  # batches that were made

    def settled(self) -> dict[str, Any]:
        return {**super().settled(), **{k: v for k, v in vars(self.scheme).items() if not k.startswith("_")}}

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Made:
        super().setup(unlabelled(batch, batch.inputs), data)
        return self

    def prepare(self, batch: Batch) -> Batch:
        """As usual; a batch of nobody's labels, such as an example, has none that are known."""
        return super().prepare(unlabelled(batch, batch.inputs) if batch.labels is None else batch)

    def make(self, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Inputs shaped ``like`` those, of all processes, and what else a turn wants to know of them."""
        raise TypeError(f"{type(self).__name__} must define make")  # pragma: no cover

    def made(self, batch: Batch) -> Batch:
        own = batch.inputs
        rows = rows_of_ranks(len(own), own.device)
        with self.drawing(_INPUTS, own.device):
            inputs, extras = self.make(own if rows.whole == len(own) else own.new_zeros(rows.whole, *own.shape[1:]))
        self.moves += 1
        return unlabelled(batch, inputs[rows.own], rows=rows, **extras)

    def drawing(self, purpose: int, device: torch.device) -> AbstractContextManager[None]:
        """Within, all processes draw the same."""
        return drawn_alike(device, self.seed, int(self.moves), purpose)

    @staticmethod
    def rows_of(batch: Batch) -> Rows:
        """Which rows of what was made a batch is."""
        return batch.extras.get("rows") or Rows((batch.size,))

    def said(self, inputs: Tensor) -> Tensor:
        """The student's logits, with gradients to the inputs."""
        return logits_of(call_model(self.student, inputs), self._logits)


class Generating(Made):
    """A student and a generator, each with its turn: the student learns from what the generator makes.

    In each step the student learns from fresh images; in every ``every``-th the generator learns too, by ``judge``.
    A step is one of the student's, so schemes are compared over as many of those. Of several processes each makes and
    judges all images, since the generator normalises over them, and entropies and statistics are those of all.
    """

    turns = ("student", "generator")
    generator: Generator | None

    def plan(
        self,
        scheme: Any,
        loader: BlankLoader,
        *,
        latent: int = 100,
        width: int = 64,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        every: int = 1,
        same: bool = False,
        end: End = "normal",
        taps: tuple[str, ...] = (),
        statistics: bool = False,
        seed: int = 0,
    ) -> None:
        """Take the settings.

        Args:
            scheme: Whose; its options tell runs apart.
            loader: Of nothing, with the shape of inputs.
            latent, width, end: Of the generator.
            lr, betas: Of its Adam.
            every: The student's steps for one of the generator's.
            same: The generator is judged by what the student learns from in this step; else by other images.
            taps: Of the teacher, wanted by ``judge``.
            statistics: The teacher's normalisations are listened to.
            seed: Of what is drawn.
        """
        super().plan(scheme, loader, seed=seed)
        self.latent, self.width, self.end, self.every, self.same = latent, width, end, every, same
        self._asked = {"taps": taps, "statistics": statistics}
        self._own = {"optimizer": "adam", "lr": lr, "optimizer_options": {"betas": list(betas)}, **_PLAIN}
        self.generator, self._weights = None, dict[str, Tensor]()
        self._inverted: tuple[Inverted, ...] = ()  # in a tuple: the teacher's modules are nobody's children here

    @property
    def inverted(self) -> Inverted:
        """The teacher, with gradients to what it is asked."""
        return self._inverted[0]

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Generating:
        super().setup(batch, data)
        inputs = batch.inputs
        assert isinstance(self.teacher, FrozenTeacher)
        self._inverted = (Inverted(self.teacher, inputs, **self._asked, where=f"scheme {self.who}"),)  # type: ignore[arg-type]
        if self.generator is None:
            self.generator = Generator(
                self.latent, inputs.shape[1:], width=self.width, end=self.end, normalise=self.normalise
            ).to(inputs.device)
        return self

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        assert self.generator is not None
        own = {id(p) for p in self.generator.parameters()}
        return (p for p in self.parameters() if (id(p) in own) == (turn == "generator"))

    def settings_of(self, turn: str) -> dict[str, Any]:
        return self._own if turn == "generator" else {}

    def draw(self, size: int, device: torch.device) -> dict[str, Tensor]:
        """What the generator starts from, as ``latent``, and what else belongs to it."""
        return {"latent": torch.randn(size, self.latent, device=device)}

    def make(self, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.generator is not None
        drawn = self.draw(len(like), like.device)
        with torch.no_grad():
            inputs = self.generator(drawn["latent"])
        return inputs, drawn if self.same else self.draw(len(like), like.device)

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        if turn == "generator":
            return self._move(batch)
        losses = self.learn(batch)
        self._weights = losses.weights
        return losses

    def learn(self, batch: Batch) -> Losses:
        """The student's turn."""
        return super().forward(batch)

    def idle(self) -> Losses:
        """Nothing reaches who has the turn, so its optimizer leaves it as it is."""
        return Losses(next(p for p in self.student.parameters() if p.requires_grad).sum() * 0, {}, self._weights)

    def judge(self, inputs: Tensor, drawn: dict[str, Tensor]) -> dict[str, tuple[float, Tensor]]:
        """The generator's losses, each with its weight."""
        raise TypeError(f"{type(self).__name__} must define judge")  # pragma: no cover

    @torch.compiler.disable
    def _move(self, batch: Batch) -> Losses:
        assert self.generator is not None
        if "latent" not in batch.extras or int(self.moves) % self.every:
            return self.idle()
        with self.drawing(_TURN, batch.inputs.device):
            found = self.judge(self.generator(batch.extras["latent"]), batch.extras)
        total = torch.stack([weight * value for weight, value in found.values()]).sum()
        weights = {name: total.new_tensor(weight) for name, (weight, _) in found.items()}
        return Losses(total, {name: value.detach() for name, (_, value) in found.items()}, self._weights | weights)

    def close(self) -> None:
        super().close()
        for inverted in self._inverted:
            inverted.close()
