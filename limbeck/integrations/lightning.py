"""Distillation as a module of Lightning: any objective, any teacher, and a plain student in the end."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from limbeck.core.batch import Batch
from limbeck.core.distiller import Losses
from limbeck.core.errors import ConfigError, MissingExtra
from limbeck.core.objective import DataInfo
from limbeck.core.teacher import Teacher, as_teacher
from limbeck.data.collate import part_of
from limbeck.data.order import cut
from limbeck.engine.optim import build_optimizer, build_scheduler
from limbeck.integrations.checks import check_models
from limbeck.integrations.hosting import Hosted, Sums, totals_of, units_of
from limbeck.integrations.losses import LossSpec, as_terms
from limbeck.integrations.reading import Reader
from limbeck.models.student import save_student


def _lightning() -> Any:
    """Lightning under whichever of its two names is in use: a module of the one is none to a trainer of the other."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in (*(name for name in names if name in sys.modules), *names):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise MissingExtra("pytorch-lightning", extra="lightning")


_Module: Any = _lightning().LightningModule
Optimizers = Callable[[Iterable[nn.Parameter]], Optimizer]


class DistillationModule(_Module):
    """A student that learns from a teacher in the ``Trainer`` of Lightning.

    Batches may be dicts, ``(inputs, labels)`` or ``limbeck.Batch``; see :class:`~limbeck.integrations.reading.Reader`.
    The loss is a mean over the whole optimizer step: with several devices over all of them. A batch of the DataLoader
    is one step's; ``accumulate`` cuts it, so that less memory is needed and nothing else changes.

    Terms are logged as ``train_kd`` and ``val_kd``, the sum as ``train_loss`` and ``val_loss``; those of validation are
    means over all that counts. Checkpoints hold the student and objectives' helpers, never the teacher.

    Args:
        student: The module to train, in place.
        teacher: A module, or any teacher of limbeck; ``None`` where no term needs one.
        loss: A method's name, ``{"cross_entropy": 0.5, "kd": {"weight": 0.5, "temperature": 2}}`` as in recipes, an
            objective or a sum of objectives.
        example: A batch, as the DataLoader gives it: a dry run on it sizes projectors.
        optimizer: A class of ``torch.optim`` by name, or a function of parameters.
        lr, weight_decay, optimizer_options: Of an optimizer by name.
        schedule: Of the learning rate, as in recipes: ``constant``, ``cosine``, ``linear``, ``step`` ...
        warmup: Share of the steps over which it rises from 0.
        accumulate: Micro-batches that a batch is cut into.
        clip: Largest norm of the gradient.
        task: What labels mean, for a bare method's name: ``"classification"``, ``"multilabel"``, ``"regression"``.
        data: What is known of the training set, for objectives that need it.
        logits, teacher_logits: Where logits stand in the models' outputs, where that does not tell itself.
        causal: Labels are the inputs and have to be shifted; default: what a model of transformers says.
        seed: Of helpers' first weights.

    Raises:
        ConfigError: No such method, no teacher where a term needs one, or an objective that knows no masks.
        LimbeckError: Models, taps, vocabularies or data do not fit the loss.
        MissingExtra: Lightning is not installed.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | None = None,
        loss: LossSpec = "kd",
        *,
        example: Any,
        optimizer: str | Optimizers = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        optimizer_options: dict[str, Any] | None = None,
        schedule: Any = "constant",
        warmup: float = 0.0,
        accumulate: int = 1,
        clip: float | None = None,
        task: str = "classification",
        data: DataInfo | None = None,
        logits: str | None = None,
        teacher_logits: str | None = None,
        causal: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        judge = None if teacher is None else as_teacher(teacher, teacher_logits)
        self.reader = Reader.of(student, judge, causal)
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        self._example: Batch = self.reader(example).to(device)
        self.distiller = Hosted(student, as_terms(loss, task), judge, logits=logits)
        if judge is not None:
            judge.to(device)
        names = example if isinstance(example, Mapping) else {}
        size = check_models(self.distiller, self._example, names, language=self.reader.language)
        self.distiller.ready(self._example, replace(data or DataInfo(task=task), vocabulary=size), seed)
        self._optimizer, self._options = optimizer, optimizer_options
        self._lr, self._decay, self._schedule, self._warmup = lr, weight_decay, schedule, warmup
        self._accumulate, self._clip, self._logits = accumulate, clip, logits
        self.automatic_optimization = accumulate == 1
        self._open = contextlib.ExitStack()
        self._judging = contextlib.ExitStack()
        self._sums = Sums()

    @property
    def student(self) -> nn.Module:
        """The student; outside of training it is plain."""
        return self.distiller.student

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's own."""
        return self.student(*args, **kwargs)

    def save_student(self, folder: str | Path) -> None:
        """Write the student alone: a folder of transformers where it is one of theirs, else as ``limbeck`` reads it."""
        save = getattr(self.student, "save_pretrained", None)
        if save is not None:
            save(str(folder))
        else:
            save_student(self.student, folder, logits=self._logits)

    # Listening: from a call of the trainer's to its end

    def setup(self, stage: str) -> None:
        if not self.distiller.listens:
            device = next((p.device for p in self.student.parameters()), torch.device("cpu"))
            self._open.enter_context(self.distiller.listening(self._example.to(device)))

    def teardown(self, stage: str) -> None:
        self._judging.close()
        self._open.close()

    def on_fit_start(self) -> None:
        """Refuse what would change the loss, or pass a gradient by."""
        if self.trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                "Lightning gives one micro-batch after the other, so none knows what the whole step holds",
                where="accumulate_grad_batches",
                found=self.trainer.accumulate_grad_batches,
                remedy="leave it at 1, make batches larger, and give DistillationModule(accumulate=...)",
            )
        if not self.automatic_optimization and self._clip is not None and self.trainer.precision == "16-mixed":
            raise ConfigError("gradients are scaled when they are clipped", where="precision", remedy="use bf16-mixed")

    # Steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        whole = self._read(batch)
        parts = [part_of(whole, part) for part in cut(whole.size, 0, 1, self._accumulate)]
        totals = totals_of(parts, self.distiller, self.device, self.trainer.world_size, self._add_up)
        for part in parts:
            part.totals = totals
        if self.automatic_optimization:
            losses = self.distiller(parts[0])
            self._say(losses, losses.terms, losses.total, whole)
            return losses.total
        optimizer = self.optimizers()
        optimizer.zero_grad()
        said: dict[str, Tensor] = {}
        total: Any = 0.0
        for part in parts:
            losses = self.distiller(part)
            self.manual_backward(losses.total)
            said = {name: said.get(name, 0) + value for name, value in losses.terms.items()}
            total = total + losses.total.detach()
        if self._clip is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self._clip, gradient_clip_algorithm="norm")
        optimizer.step()
        self.lr_schedulers().step()
        self._say(losses, said, total, whole)
        return None

    def _read(self, item: Any) -> Batch:
        batch = self.reader(item)
        steps = self.trainer.estimated_stepping_batches
        done = self.global_step / steps if math.isfinite(steps) and steps else 0.0
        batch.progress = torch.full((), done, device=self.device)
        return batch

    def _add_up(self, counts: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(counts, reduce_op="sum")

    def _say(self, losses: Losses, terms: dict[str, Tensor], total: Tensor, batch: Batch) -> None:
        """Every term is a rank's part of its mean over the step."""
        found = {f"train_{name}": value for name, value in terms.items()}
        sync = self.trainer.world_size > 1
        self.log("train_loss", total.detach(), prog_bar=True, sync_dist=sync, batch_size=batch.size)
        self.log_dict(found, sync_dist=sync, batch_size=batch.size)

    def on_validation_epoch_start(self) -> None:
        self._sums = Sums()
        self._judging.enter_context(self.distiller.unmoved())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        held = self._read(batch)
        terms = self.distiller.judged(labelled=held.labels is not None)
        if terms is not None:
            values, _ = self.distiller.judge(held, terms)
            self._sums.add(values, held, units_of(terms))
            self._progress = held.progress

    def on_validation_epoch_end(self) -> None:
        self._judging.close()
        means = self._sums.means(self._add_up if self.trainer.world_size > 1 else None)
        if means:
            weights = {name: schedule(self._progress) for name, _, schedule in self.distiller.loss.items()}
            loss = sum(float(weights[name.partition("/")[0]]) * value for name, value in means.items())
            self.log("val_loss", loss, prog_bar=True)
            self.log_dict({f"val_{name}": value for name, value in means.items()})

    # Optimizer

    def configure_optimizers(self) -> Any:
        named = [(n, p) for n, p in self.distiller.named_parameters() if p.requires_grad]
        if isinstance(self._optimizer, str):
            optimizer = build_optimizer(
                self._optimizer, named, lr=self._lr, weight_decay=self._decay, options=self._options
            )
        else:
            optimizer = self._optimizer([p for _, p in named])
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            if self._schedule != "constant" or self._warmup:
                raise ConfigError("it is not known how many steps there are", where="schedule", remedy="say max_steps")
            steps = 1
        scheduler = build_scheduler(optimizer, self._schedule, {}, total=int(steps), warmup=self._warmup)
        if isinstance(scheduler, LambdaLR):  # checkpoints pickle callable objects, but leave plain functions out
            scheduler.lr_lambdas = [_plain(function) for function in scheduler.lr_lambdas]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self._clip is not None:
            gradient_clip_val, gradient_clip_algorithm = self._clip, "norm"
        self.clip_gradients(
            optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm
        )


def _plain(function: Callable[[int], float]) -> Callable[[int], float]:
    return lambda done: function(done)
