"""Train a student: stages, epochs, steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError, TrainingError
from limbeck.core.objective import DataInfo
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.build import as_loader
from limbeck.data.language.loader import LanguageLoader
from limbeck.engine.compiling import cannot_compile, compile_step, forget_compiled, should_compile, work
from limbeck.engine.config import SHARED
from limbeck.engine.device import deterministic, is_distributed, make_accelerator
from limbeck.engine.freezing import learning, leaves_some_out, reaches, train_mode
from limbeck.engine.language import check_language
from limbeck.engine.operations import Operations
from limbeck.engine.run import Run
from limbeck.engine.snapshot import load_into
from limbeck.engine.stage import Stage
from limbeck.engine.state import seed_everything
from limbeck.engine.step import Step

EXAMPLE = 4  # samples of the dry run that sizes projectors


@dataclass
class Fit:
    """What training came to.

    Args:
        student: The trained model: the one that was given, in evaluation mode.
        history: The lines of ``metrics.jsonl``.
        validation: What the last validation said.
        best: The best validation of the last stage that had one: metric, value and step.
        steps: Optimizer steps over all stages.
        seconds: How long it took, time before a resume counted in.
        operations: Floating-point operations of all steps: ``total``, and of that ``teacher``, the teacher's; counted
            on each stage's first steps, of compiled steps estimated.
    """

    student: nn.Module
    history: list[dict[str, Any]]
    validation: dict[str, Any] | None
    best: dict[str, Any] | None
    steps: int
    seconds: float
    operations: dict[str, float] = field(default_factory=dict)


def fit(
    stages: Sequence[Stage],
    train: Any,
    validation: Any = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    quiet: bool = False,
) -> Fit:
    """Train a student through one or more stages.

    Every rank calls it alike; ranks come from ``accelerate launch`` or ``torchrun``. The same seed gives the same
    weights, on a CPU bit for bit, also over a kill and a resume.

    Args:
        stages: In order.
        train: A loader of ``limbeck.data``, or anything ``limbeck.data.as_loader`` takes.
        validation: The same, to judge by; ``None`` judges nothing.
        out: Folder for metrics, checkpoints and the student; ``None`` keeps everything in memory.
        resume: Go on from the newest whole checkpoint in ``out``; from the beginning where there is none yet.
        seed: Of everything random in training; the data have their own.
        quiet: Show no progress bar.

    Raises:
        ConfigError: Stages, settings or folder cannot be used.
        CheckpointError: No checkpoint is whole, or it is of another run.
        TrainingError: A loss or gradient is not finite, or memory ran out; checkpoints stay.
        Stopped: Ctrl-C or SIGTERM; a checkpoint was written.

    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import KD, CrossEntropy
    >>> inputs = torch.randn(64, 4); labels = (inputs[:, 0] > 0).long()
    >>> distiller = Distiller(nn.Linear(4, 2), CrossEntropy() + KD(), nn.Linear(4, 2))
    >>> train = as_loader((inputs, labels), batch_size=16, train=True)
    >>> fit([Stage("kd", distiller, TrainConfig(epochs=2))], train, quiet=True).steps
    8
    """
    stages = list(stages)
    out = Path(out) if out is not None else None
    _check(stages, validation, out, resume)
    accelerator = make_accelerator(stages[0].config, out)
    train = as_loader(train, train=True)
    validation = None if validation is None else as_loader(validation)
    run = Run(stages, train, validation, accelerator, out, seed, quiet)
    with deterministic(stages[0].config.deterministic), run.open(resume):
        _carry(run)
        while run.number < len(stages):
            _learn(run)
    run.student.eval()
    return Fit(run.student, run.journal.lines, run.scores, run.best, run.steps, run.journal.elapsed(), run.took)


def _learn(run: Run) -> None:
    """One stage, from its first step or from where its checkpoint stands."""
    stage, config, accelerator = run.stage, run.stage.config, run.accelerator
    total = config.total_steps(run.train.steps_per_epoch)
    with _set_up(run, stage) as distiller, learning(distiller, stage.learn, _below(run, stage)):
        _compile(run, distiller, total)
        step = Step(accelerator, distiller, _wrap(run, distiller), config, total)
        seed_everything(run.seed, run.number, run.rank)
        place = run.begin(step)
        train_mode(distiller)
        counter = Operations(int(place.operations[0]), *place.operations[1:])
        if run.compiled and not counter.counted and run.train.batch_size is not None:
            example = run.train.example(EXAMPLE).to(run.device)
            counter = Operations.estimated(distiller, example, run.train.batch_size / run.world)
        while place.step < total and not place.ended:
            epoch = run.train.epoch(
                place.epoch, start_step=place.epoch_step, rank=run.rank, world=run.world, parts=config.accumulate
            )
            for parts in epoch:
                with counter.counting(distiller) if not run.compiled else contextlib.nullcontext():
                    _take(run, step, parts)
                place.operations = [counter.counted, counter.whole, counter.teacher]
                place.step += 1
                place.epoch_step += 1
                run.after_step()
                if place.step == total or place.ended:
                    break
            else:
                if place.epoch_step == 0:
                    raise DataError("an epoch gave no batch", where="data", found=f"epoch {place.epoch}")
                place.epoch, place.epoch_step = place.epoch + 1, 0
                run.after_epoch()
        run.finish_stage()


def _carry(run: Run) -> None:
    """Going on between two stages: helpers that the next stage shares with the finished one learn again what they knew.

    Within a process they simply go on; here the finished stage is set up once more, to have somewhere to load them.
    """
    found, run.finished = run.finished, None
    if found is None or run.number == len(run.stages):
        return
    before, after = ({id(m) for m in s.distiller.loss.modules()} for s in run.stages[run.number - 1 : run.number + 1])
    if before & after:
        with _set_up(run, run.stages[run.number - 1]) as distiller:
            student = {f"student.{k}": v for k, v in found.tensors("student").items()}
            load_into(distiller, student | found.tensors("objectives"), found.path)


def _take(run: Run, step: Step, parts: list[Batch]) -> None:
    """One step; what cannot be compiled after all goes on without, unless compiling was asked for."""
    try:
        step(parts, run.place.step)
    except Exception as error:
        if not run.compiled or not cannot_compile(error):
            raise
        reason = " ".join(str(error).split())[:200]
        if run.stage.config.compile == "on":
            problem = f"the step cannot be compiled: {type(error).__name__}: {reason}"
            raise TrainingError(problem, where="compile", remedy="set compile to auto or off") from error
        run.bar.say(f"the step cannot be compiled, going on without: {type(error).__name__}: {reason}")
        run.compiled = False
        forget_compiled(step.distiller)
        step(parts, run.place.step)


@contextlib.contextmanager
def _set_up(run: Run, stage: Stage) -> Iterator[Distiller]:
    """The stage's distiller on its device, its helpers sized and drawn from (seed, stage).

    Afterwards the student is plain: no hooks, no gradients, nothing of accelerate's or the compiler's.
    """
    distiller, device = stage.distiller, run.device
    distiller.to(device)
    if stage.config.channels_last:
        distiller.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(distiller.teacher, FrozenTeacher):
            distiller.teacher.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seed_everything(run.seed, run.number)
    train = run.train
    example = run.train.example(EXAMPLE).to(device)
    vocabulary = check_language(distiller, train, example) if isinstance(train, LanguageLoader) else None
    data = DataInfo(
        train.samples,
        train.labels,
        train.classes,
        batches=train.plain,
        task=train.task,
        vocabulary=vocabulary,
        tokenizers=train.tokenizers if isinstance(train, LanguageLoader) else None,
    )
    try:
        yield distiller.setup(example, data).to(device)
    finally:
        forget_compiled(distiller)
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):  # accelerate's autocast around it
            distiller.__dict__.pop(name, None)
        distiller.zero_grad(set_to_none=True)
        distiller.close()
        if device.type != "cpu":  # it collects garbage, which takes longer than many a small stage
            run.accelerator.free_memory()


def _below(run: Run, stage: Stage) -> list[str] | None:
    """The parameters that ``learn_to`` leaves to train."""
    if stage.learn_to is None:
        return None
    student = stage.distiller.student
    return reaches(student, run.train.example(EXAMPLE).to(run.device).inputs, stage.learn_to)


def _compile(run: Run, distiller: Distiller, total: int) -> None:
    """Compile where that pays; a resumed stage does as its checkpoint did."""
    config, device = run.stage.config, run.device.type
    if config.apart:  # compiled graphs are run backward once
        run.compiled = False
    elif run.found is not None:
        run.compiled = run.found.state["compiled"]
    else:
        operations, modules = 0.0, 1
        if config.compile == "auto" and device == "cpu" and run.train.batch_size is not None:
            example = run.train.example(EXAMPLE).to(run.device)
            operations, modules = work(distiller, example, run.train.batch_size / run.world)
        run.compiled = should_compile(
            config.compile, device=device, steps=total, step_flops=operations, modules=modules
        )
    if run.compiled:
        compile_step(distiller, device)


def _wrap(run: Run, distiller: Distiller) -> nn.Module:
    """The distiller as it is called: in DDP where there are ranks."""
    accelerator = run.accelerator
    if not is_distributed(accelerator):
        return distiller
    search = leaves_some_out(distiller, run.train.example(EXAMPLE).to(run.device))
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=search)
    return accelerator.prepare_model(distiller)


def _check(stages: list[Stage], validation: Any, out: Path | None, resume: bool) -> None:
    if not stages:
        raise ConfigError("there is no stage to train", where="stages")
    names = [s.name for s in stages]
    if len(set(names)) != len(names):
        raise ConfigError("stages need different names", where="stages", found=", ".join(names))
    if any(s.distiller.student is not stages[0].distiller.student for s in stages):
        raise ConfigError(
            "all stages of a run train one student", where="stages", remedy="call fit once for each student"
        )
    for stage in stages[1:]:
        for field_name in SHARED:
            own, first = getattr(stage.config, field_name), getattr(stages[0].config, field_name)
            if own != first:
                raise ConfigError(
                    "this setting belongs to the whole run, so all stages must say the same",
                    where=f"stage {stage.name!r}: {field_name}",
                    found=own,
                    wanted=first,
                )
    for stage in stages:
        if validation is None and (stage.config.patience is not None or stage.config.select == "best"):
            setting = "patience" if stage.config.patience is not None else "select: best"
            raise ConfigError(f"{setting} needs validation data", where="validation", found="none")
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = "this is a file, not a folder" if out.is_file() else f"the folder cannot be made: {error.strerror}"
            raise ConfigError(reason, where="out", found=str(out), remedy="choose another folder") from None
    if resume and out is None:
        raise ConfigError("there is nothing to resume from", where="out", found="none", remedy="give the run's folder")
