"""One optimizer step: forward, backward and update, over all micro-batches and ranks as if they were one batch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from limbeck.core.batch import Batch, Unit, map_tensors
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError, TrainingError
from limbeck.engine.config import TrainConfig
from limbeck.engine.device import is_distributed
from limbeck.engine.dot import DOT
from limbeck.engine.ema import Ema
from limbeck.engine.meter import Meter
from limbeck.engine.optim import build_optimizer, build_scheduler

FETCH_EVERY = 16  # steps between looks at an accelerator's numbers


@dataclass
class Player:
    """What moves one turn's parameters."""

    parameters: list[nn.Parameter]
    optimizer: Optimizer
    prepared: Any  # accelerate's wrapper, which knows the loss scale
    scheduler: Any


class Step:
    """Runs optimizer steps.

    Losses are means over the whole step, however its batch is cut: before any forward the units that the losses count
    (samples, positions, labels) are summed over all micro-batches and ranks, and each part weighs what it counts.

    Args:
        accelerator: Device, ranks and precision.
        distiller: Set up, on its device, frozen where it shall be.
        model: The distiller as accelerate wrapped it.
        config: The stage's settings.
        total: Steps of the stage.
    """

    def __init__(
        self, accelerator: Accelerator, distiller: Distiller, model: nn.Module, config: TrainConfig, total: int
    ) -> None:
        self.accelerator, self.distiller, self.model = accelerator, distiller, model
        self.config, self.total = config, total
        self.device = accelerator.device
        self.distributed = is_distributed(accelerator)
        self.units: list[Unit] = sorted({o.contract.normalizer for o in distiller.objectives()})
        self.whole = config.accumulate == 1 and not self.distributed
        self.names = {id(p): n for n, p in distiller.named_parameters()}
        self.players = {turn: self._player(turn) for turn in dict.fromkeys(distiller.turns)}
        distiller.keeps_apart = any(isinstance(p.optimizer, DOT) for p in self.players.values())
        if distiller.keeps_apart and self.distributed:
            raise ConfigError(
                "it takes two gradients of every step apart, which several ranks do not allow",
                where="optimizer",
                found=config.optimizer,
                remedy="train in one process, or with sgd",
            )
        self.ema = Ema(distiller.student, config.ema) if config.ema is not None else None
        self.meter = Meter(
            every=1 if self.device.type == "cpu" else FETCH_EVERY,
            overflow_is_usual=accelerator.scaler is not None,
            explain=self._bad_gradient,
        )

    def _player(self, turn: str) -> Player:
        own = {id(p) for p in self.distiller.parameters_of(turn)}
        named = [(n, p) for n, p in self.distiller.named_parameters() if id(p) in own and p.requires_grad]
        if not named:
            raise ConfigError("this turn has nothing to train", where=f"turn {turn!r}")
        config = self.config.model_copy(update=self.distiller.settings_of(turn))
        optimizer = build_optimizer(
            config.optimizer,
            named,
            lr=config.lr,
            weight_decay=config.weight_decay,
            decay=config.decay,
            options=config.optimizer_options,
            fused=self.accelerator.scaler is None,  # a fused step would hide from accelerate that it was skipped
        )
        # The scheduler first: both it and accelerate wrap the optimizer's step.
        scheduler = build_scheduler(
            optimizer, config.schedule, config.schedule_options, total=self.total, warmup=config.warmup
        )
        prepared = self.accelerator.prepare_optimizer(optimizer)
        return Player([p for _, p in named], optimizer, prepared, scheduler)

    def __call__(self, parts: list[Batch], done: int) -> None:
        """Take one step.

        Args:
            parts: This rank's micro-batches.
            done: Steps of the stage done before.

        Raises:
            TrainingError: A loss or gradient is not finite, or memory ran out.
        """
        try:
            self._step(parts, done)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._no_memory(parts, done, error) from error
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how the host's allocator says it
                raise
            raise self._no_memory(parts, done, error) from error

    def _step(self, parts: list[Batch], done: int) -> None:
        progress = torch.full((), done / self.total, device=self.device)
        batches = [self.distiller.made(self._ready(part, progress)) for part in parts]
        if not self.whole:
            self._share(batches)
        for turn in self.distiller.turns:
            for player in self.players.values():
                player.optimizer.zero_grad(set_to_none=True)
            values: dict[str, Tensor] = {}
            for i, batch in enumerate(batches):
                last = i == len(batches) - 1
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                    with self.accelerator.autocast():
                        losses: Losses = self.model(batch, turn)
                    self._backward(losses, self.players[turn])
                self._note(values, losses, batch)
            self._update(self.players[turn], values, turn, done)
            self.meter.weights = losses.weights
        self.meter.steps += 1
        self.meter.samples += sum(part.size for part in parts)
        if self.ema is not None:
            self.ema.update()

    def _backward(self, losses: Losses, player: Player) -> None:
        """Add a micro-batch's gradients to those of the step."""
        if not isinstance(player.optimizer, DOT):
            self.accelerator.backward(losses.total)
            return
        if not losses.apart:
            raise ConfigError("this scheme does not tell task and teacher apart", where="optimizer", remedy="use sgd")
        for i, (side, value) in enumerate(losses.apart.items()):
            more = i + 1 < len(losses.apart)
            found = torch.autograd.grad(value, player.parameters, retain_graph=more, allow_unused=True)
            if side == "distill":
                player.optimizer.add_distill(player.parameters, found)
                continue
            for parameter, gradient in zip(player.parameters, found, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _ready(self, batch: Batch, progress: Tensor) -> Batch:
        batch = batch.to(self.device)
        if self.config.channels_last:
            batch.inputs = map_tensors(batch.inputs, channels_last)
        batch.progress = progress
        return batch

    def _share(self, batches: list[Batch]) -> None:
        """Tell each micro-batch how much the whole step holds; a rank's part of it, since DDP averages over ranks."""
        if not batches:
            raise TrainingError(
                "this rank got no sample of a step",
                where="data",
                remedy="leave incomplete batches out (drop_last), or use a larger batch",
            )
        if not self.units:  # nothing but a scheme's own losses
            return
        counts = torch.zeros(len(self.units), dtype=torch.float32, device=self.device)
        for batch in batches:
            counts += torch.stack([torch.as_tensor(batch.count(u), device=self.device) for u in self.units])
        if self.distributed:
            counts = self.accelerator.reduce(counts, "sum") / self.accelerator.num_processes
        totals: dict[str, Tensor | float] = dict(zip(self.units, counts.clamp(min=1e-12).unbind(), strict=True))
        for batch in batches:
            batch.totals = totals

    def _update(self, player: Player, values: dict[str, Tensor], turn: str, done: int) -> None:
        if isinstance(player.optimizer, DOT):
            values["grad_norm"] = get_total_norm(player.optimizer.gradients())
            if self.config.clip is not None:
                player.optimizer.scale((self.config.clip / (values["grad_norm"] + 1e-6)).clamp(max=1.0))
        elif self.config.clip is not None:
            values["grad_norm"] = self.accelerator.clip_grad_norm_(player.parameters, self.config.clip)
        elif self.accelerator.scaler is None:
            values["grad_norm"] = get_total_norm([p.grad for p in player.parameters if p.grad is not None])
        # Looked at before the weights move: where the device is the host, a bad step leaves them as they were.
        self.meter.add(done + 1, turn if len(self.players) > 1 else "", values)
        if self.accelerator.scaler is None:
            player.optimizer.step()
        else:
            player.prepared.step()
        if not player.prepared.step_was_skipped and not isinstance(player.scheduler, ReduceLROnPlateau):
            player.scheduler.step()

    def judged(self, value: float) -> None:
        """Tell schedules that follow the validation what it came to."""
        for player in self.players.values():
            if isinstance(player.scheduler, ReduceLROnPlateau):
                player.scheduler.step(value)

    def _note(self, values: dict[str, Tensor], losses: Losses, batch: Batch) -> None:
        """Add one micro-batch's numbers to the step's."""
        found = {"total": losses.total.detach(), **{f"terms/{k}": v for k, v in losses.terms.items()}}
        labels = batch.labels
        if losses.logits is not None and labels is not None and labels.shape == losses.logits.shape[:-1]:
            known = labels >= 0
            if batch.mask is not None and batch.mask.shape == labels.shape:  # prompts have labels and do not count
                known = known & batch.mask
            found["correct"] = ((losses.logits.argmax(-1) == labels) & known).sum().float()
            found["labelled"] = known.sum().float()
        for name, value in found.items():
            values[name] = values[name] + value if name in values else value

    def lr(self) -> float:
        """The learning rate of the coming step, of the first player's first group."""
        return float(next(iter(self.players.values())).optimizer.param_groups[0]["lr"])

    def _bad_gradient(self) -> str | None:
        for name, parameter in self.distiller.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return name
        return None

    def _no_memory(self, parts: list[Batch], done: int, error: BaseException) -> TrainingError:
        sizes = [part.size for part in parts]
        return TrainingError(
            f"memory ran out: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=f"step {done + 1}",
            found=f"micro-batches of {max(sizes)} samples ({sum(sizes)} in the step on this device)",
            remedy=f"set accumulate above {self.config.accumulate}, precision to bf16, or a smaller batch_size",
        )


def channels_last(tensor: Tensor) -> Tensor:
    """Images with their channels innermost; anything else as it is."""
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
