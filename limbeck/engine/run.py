"""Everything around the steps of a run: validation, log, checkpoints, resume, stopping."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from limbeck.core.errors import ConfigError, TrainingError
from limbeck.core.ranks import as_on_first
from limbeck.data.loader import Loader
from limbeck.engine.checkpoint import Checkpoint, Checkpoints
from limbeck.engine.device import flat
from limbeck.engine.evaluation import evaluate, evaluate_loss
from limbeck.engine.identity import describe_distiller, refuse_other
from limbeck.engine.journal import Journal, environment
from limbeck.engine.operations import Operations, together
from limbeck.engine.progress import Bar
from limbeck.engine.snapshot import load_into, pack, unpack
from limbeck.engine.stage import Stage
from limbeck.engine.state import pack_random, unpack_random
from limbeck.engine.step import FETCH_EVERY, Step
from limbeck.engine.stopping import Stopped, StopRequest
from limbeck.models.describe import parameters
from limbeck.models.weights import save_weights


@dataclass
class Place:
    """How far a stage is.

    Args:
        step: Steps done.
        epoch: Which pass through the data.
        epoch_step: Steps done in it.
        validated: The step of the last validation.
        best: The best validation so far: metric, value and step over the whole run.
        waited: Validations since then.
        ended: The stage stops before its last step.
        operations: What its first steps took, by :class:`~limbeck.engine.operations.Operations`: how many steps, what
            they took in all, and the teacher's part.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    validated: int = -1
    best: dict[str, Any] | None = None
    waited: int = 0
    ended: bool = False
    operations: list[float] = field(default_factory=lambda: [0, 0.0, 0.0])


class Run:
    """A run while it goes: its folder, its clock, its stage and place.

    Args:
        stages: All of them.
        train: Training data.
        validation: Data to judge by, or ``None``.
        accelerator: Device, ranks and precision.
        out: The run's folder, or ``None``.
        seed: Of everything random in training.
        quiet: Show no bar.
    """

    def __init__(
        self,
        stages: list[Stage],
        train: Loader,
        validation: Loader | None,
        accelerator: Accelerator,
        out: Path | None,
        seed: int,
        quiet: bool,
    ) -> None:
        self.stages, self.train, self.validation = stages, train, validation
        self.accelerator, self.out, self.seed = accelerator, out, seed
        self.main, self.rank, self.world = (
            accelerator.is_main_process,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.device = accelerator.device
        self.student: nn.Module = stages[0].distiller.student
        self.config = stages[0].config
        self.checkpoints = Checkpoints(out, self.config.keep) if out is not None else None
        self.bar = Bar(quiet, active=self.main)
        self.stop = StopRequest()
        self.number = 0  # of the stage
        self.before = 0  # steps of the stages before
        self.took = {"total": 0.0, "teacher": 0.0}  # operations of the stages before
        self.place = Place()
        self.step: Step | None = None
        self.compiled = False
        self.scores: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None  # of the last stage that was judged
        self.found: Checkpoint | None = None
        self.finished: Checkpoint | None = None  # of the stage before, where the run goes on between two
        self._scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        self._best_weights: dict[str, Tensor] | None = None
        self._saved_at, self._logged_at = time.monotonic(), time.perf_counter()
        self.identity: dict[str, Any] = {}
        self.journal = Journal(out if self.main else None, self._facts())

    def _facts(self) -> dict[str, Any]:
        teacher = getattr(self.stages[0].distiller.teacher, "model", None)
        return {
            "environment": environment(),
            "stages": [s.name for s in self.stages],
            "parameters": parameters(self.student),
            "teacher_parameters": parameters(teacher) if isinstance(teacher, nn.Module) else None,
            "seed": self.seed,
            "ranks": self.world,
            "precision": self.config.precision,
        }

    # -- the whole run ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def open(self, resume: bool) -> Iterator[None]:
        """The run, from its folder's state to its last line. Whatever happens, ``run.json`` tells."""
        if self.out is not None:
            own = {"seed": self.seed, "ranks": self.world, "data": self.train.describe()}
            told = [{"name": s.name, "learn": [*s.learn, s.learn_to], "train": s.config.settled()} for s in self.stages]
            losses = [describe_distiller(s.distiller) for s in self.stages]
            self.identity = json.loads(
                json.dumps({**own, "stages": [{**a, **b} for a, b in zip(told, losses, strict=True)]})
            )
        self._find(resume)
        if self.config.trackers:
            self.accelerator.init_trackers("limbeck", config=flat(self.config.settled()))
        self.journal.status("running")
        try:
            with self.stop:
                yield
        except BaseException as error:
            status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            self.journal.status(status, steps=self.steps, error=str(error) or type(error).__name__)
            if isinstance(error, TrainingError):
                raise self._with_checkpoint(error) from error
            raise
        finally:
            self.bar.stop()
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.trackers.clear()
        if self.out is not None and self.main:
            save_weights(self.student, self.out / "student" / "model.safetensors")
        self.journal.status("finished", steps=self.steps, validation=self.scores)

    @property
    def steps(self) -> int:
        """Steps done over all stages."""
        return self.before + self.place.step

    def _find(self, resume: bool) -> None:
        """Look for a checkpoint to go on from, and refuse to write over a run."""
        if self.checkpoints is None:
            self.journal.open()
            return
        if not resume:
            if self.checkpoints.names():
                raise ConfigError(
                    "this folder holds a run already", where=str(self.out), remedy="resume it, or choose another folder"
                )
            self.journal.open()
            return
        if self.main:
            self.checkpoints.clean()
        self.accelerator.wait_for_everyone()
        self.found, damaged = self.checkpoints.newest()
        for error in damaged:
            self.bar.say(f"{error}; passed over, going on from the checkpoint before it")
        if self.found is None:
            self.bar.say(f"no checkpoint in {self.out} yet: starting from the beginning")
            self.journal.open()
            return
        state = self.found.state
        refuse_other(state["identity"], self.identity)
        self.number, self.before = state["stage"], state["before"]
        self.place, self.scores, self.best = Place(**state["place"]), state["scores"], state["best"]
        self.took = state.get("took", self.took)
        if not self.journal.open(state["metrics"], state["seconds"]):
            self.bar.say(f"{self.journal.path} is shorter than when the checkpoint was written: lines are missing")
        load_into(self.student, self.found.tensors("student"), self.found.path)
        if state["stage_done"]:
            self.before, self.number = self.steps, self.number + 1
            self.place, self.found, self.finished = Place(), None, self.found

    def _with_checkpoint(self, error: TrainingError) -> TrainingError:
        """The same error, with where to go on from."""
        last = self.checkpoints.names()[:1] if self.checkpoints else []
        where = (
            f"the last good checkpoint is {self.out}/checkpoints/{last[0]}" if last else "no checkpoint was written yet"
        )
        parts = [p for p in (error.remedy, where) if p]
        return TrainingError(
            error.message, where=error.where, found=error.found, wanted=error.wanted, remedy="; ".join(parts)
        )

    # -- one stage -------------------------------------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        """The stage that is being trained."""
        return self.stages[self.number]

    def begin(self, step: Step) -> Place:
        """Start the stage, or go on where its checkpoint stands."""
        self.step, self._best_weights = step, None
        if self.found is None:
            self.place = Place()
            if self._scaler is not None:  # as in a run that begins with this stage
                self.accelerator.scaler.load_state_dict(self._scaler)
        else:
            self._restore(self.found, step)
            self.found = None
        self.bar.start(self.stage.name, self.place.step, step.total)
        self._saved_at, self._logged_at = time.monotonic(), time.perf_counter()
        return self.place

    def after_step(self) -> None:
        """What is due after a step: the log, a validation, a checkpoint, leaving."""
        config, place, step = self.stage.config, self.place, self._step()
        if place.step % config.log_every == 0:
            self.log()
        if config.validate_steps and place.step % config.validate_steps == 0:
            self.validate()
        if place.step == step.total or place.ended:
            return
        due = bool(config.checkpoint_every) and place.step % (config.checkpoint_every or 1) == 0
        if self.device.type == "cpu" or place.step % FETCH_EVERY == 0:
            stop, late = self._agree()
            if stop:
                self._leave(stop)
            due = due or late
        if due:
            self.save()
        self.bar.update(place.step)

    def after_epoch(self) -> None:
        """What is due after a pass through the data."""
        config = self.stage.config
        if self._step().meter.steps:
            self.log()
        if not config.validate_steps and self.place.epoch % config.validate_epochs == 0:
            self.validate()

    def finish_stage(self) -> None:
        """The last line, the last validation, and the weights that the stage ends with."""
        config, step = self.stage.config, self._step()
        as_on_first(step.distiller.student.buffers())
        if step.meter.steps:
            self.log()
        if self.place.validated != self.place.step:
            self.validate()
        place, best = self.place, self.place.best
        if config.select == "best" and best is not None and best["step"] != self.steps:
            self._take_best(best["step"])
        elif step.ema is not None:
            step.ema.keep()
        counted, whole, teacher = place.operations
        stage = Operations(int(counted), whole, teacher).of(place.step * self.world)
        self.took = together([self.took, stage])
        self.save(stage_done=True)
        self.before, self.number, self.step = self.steps, self.number + 1, None
        self.place = Place()

    def _step(self) -> Step:
        assert self.step is not None
        return self.step

    def _agree(self) -> tuple[int, bool]:
        """Whether to stop (the signal's number) and whether a checkpoint is late; all ranks say the same."""
        minutes = self.stage.config.checkpoint_minutes
        late = self.main and minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        stop = self.stop.number or 0
        if self.world > 1:
            flags = torch.tensor([stop, int(late)], device=self.device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            stop, late = flags.tolist()
        return stop, bool(late) and self.checkpoints is not None

    def _leave(self, number: int) -> None:
        if self.checkpoints is None:
            raise Stopped(f"stopped after step {self.steps}; nothing was saved, since no folder was given", number)
        path = self.save()
        raise Stopped(f"stopped after step {self.steps}; resume from {path}", number)

    # -- what is said ----------------------------------------------------------------------------------------------

    def log(self) -> None:
        """Write a line about the steps since the last."""
        step, place, now = self._step(), self.place, time.perf_counter()
        rate = step.meter.samples * self.world / max(now - self._logged_at, 1e-9)
        line = step.meter.line(self._mean)
        self._logged_at = now
        self._say("train", {**line, "lr": step.lr(), "samples_per_s": round(rate, 1)})
        self.bar.update(place.step, rate, loss=line["total"], accuracy=line["accuracy"])

    def _say(self, split: str, facts: dict[str, Any]) -> None:
        place = self.place
        place_facts = {
            "split": split,
            "stage": self.stage.name,
            "epoch": place.epoch,
            "step": self.steps,
            "progress": round(place.step / self._step().total, 6),
        }
        self.journal.write({**place_facts, **facts, "seconds": round(self.journal.elapsed(), 3)})
        if self.accelerator.trackers:
            numbers = {**facts, **facts.get("terms", {})}
            values = {f"{split}/{k}": v for k, v in numbers.items() if isinstance(v, (int, float))}
            self.accelerator.log(values, step=self.steps)

    def _mean(self, values: list[float]) -> list[float]:
        if self.world == 1 or not values:
            return values
        return (self.accelerator.reduce(torch.tensor(values, device=self.device), "sum") / self.world).tolist()

    def validate(self) -> None:
        """Judge the student, remember whether it is the best so far, and stop the stage where it no longer improves."""
        if self.validation is None or self.place.validated == self.place.step:
            return
        step, place, config = self._step(), self.place, self.stage.config
        as_on_first(step.distiller.student.buffers())  # each rank normalised its own part of the last batch
        step.meter.fetch()  # numbers that went bad are reported as such, not as a poor score
        shared: dict[str, Any] = {"precision": config.precision, "rank": self.rank, "world": self.world}
        scores: dict[str, Any] = {}
        with step.ema.swapped() if step.ema is not None else contextlib.nullcontext():
            if config.monitor != "total" or "logits" in step.distiller.loss.student_taps:
                scores |= evaluate(self.student, self.validation, logits=step.distiller._logits, **shared)
            if config.monitor == "total":
                progress = torch.full((), place.step / step.total, device=self.device)
                scores |= evaluate_loss(step.distiller, self.validation, progress, **shared)
            if self._monitored not in scores:
                known = [k for k, v in scores.items() if isinstance(v, float)]
                raise ConfigError(
                    "the validation does not tell this",
                    where="monitor",
                    found=self._monitored,
                    wanted=f"one of {known}",
                )
            self._judge(scores)
        self.scores = scores
        step.judged(scores[self._monitored])
        self._say("validation", scores)
        self._logged_at = time.perf_counter()

    @property
    def _task(self) -> str:
        return self.train.task if self.validation is None else self.validation.task

    @property
    def _monitored(self) -> str:
        """What the stage is judged by."""
        return self.stage.config.monitored(self._task)

    def _judge(self, scores: dict[str, Any]) -> None:
        place, config = self.place, self.stage.config
        place.validated, value = place.step, scores[self._monitored]
        sign = -1 if config.lower_is_better(self._task) else 1
        if value == value and (place.best is None or sign * value > sign * place.best["value"]):
            place.best, place.waited = {"metric": self._monitored, "value": value, "step": self.steps}, 0
            self.best = place.best
            self._keep_best(place.best)
        else:
            place.waited += 1
            place.ended = config.patience is not None and place.waited >= config.patience

    def _keep_best(self, best: dict[str, Any]) -> None:
        """Keep the weights that were judged: the averaged ones, where there are such."""
        if self.checkpoints is None:
            if self.stage.config.select == "best":
                self._best_weights = {k: v.clone() for k, v in self.student.state_dict().items()}
        elif self.main:
            self.checkpoints.save_best(self.student.state_dict(), {"stage": self.stage.name, **best})

    def _take_best(self, step: int) -> None:
        if self.checkpoints is None:
            assert self._best_weights is not None
            self.student.load_state_dict(self._best_weights)
            return
        self.accelerator.wait_for_everyone()
        load_into(self.student, self.checkpoints.best(step), self.checkpoints.root / "best.safetensors")

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, stage_done: bool = False) -> Path | None:
        """Write a checkpoint; its folder is returned on the first rank."""
        if self.checkpoints is None:
            return None
        step, path = self._step(), None
        step.meter.fetch()  # a checkpoint never holds weights that went bad
        random = self._gather(pack_random(self.device))
        if self.main:
            tensors, state = pack(step, self.accelerator.scaler)
            state |= {
                "identity": self.identity,
                "stage": self.number,
                "stage_done": stage_done,
                "before": self.before,
                "took": self.took,
                "place": asdict(self.place),
                "scores": self.scores,
                "best": self.best,
                "compiled": self.compiled,
                "metrics": self.journal.sync(),
                "seconds": self.journal.elapsed(),
            }
            path = self.checkpoints.save(self.steps, {**tensors, "random": random}, state)
        self._saved_at = time.monotonic()
        return path

    def _restore(self, found: Checkpoint, step: Step) -> None:
        unpack(step, self.accelerator.scaler, found)
        unpack_random({k: v[self.rank] for k, v in found.tensors("random").items()}, self.device)

    def _gather(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every rank's states, one row each."""
        rows = {k: v.unsqueeze(0) for k, v in states.items()}
        if self.world == 1:
            return rows
        return {k: self.accelerator.gather(v.to(self.device)).cpu() for k, v in rows.items()}
