"""Distillation in the Trainer of transformers: any objective, any teacher, and a plain student in the end."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import CheckpointError, ConfigError, ModelError
from limbeck.core.survey import call_model
from limbeck.core.teacher import Teacher, as_teacher
from limbeck.data.collate import part_of
from limbeck.engine.freezing import leaves_some_out
from limbeck.integrations.hosting import NEEDS_IDS, Sums, needs_of, totals_of, units_of
from limbeck.integrations.losses import LossSpec
from limbeck.integrations.rows import Collator, as_rows, numbered
from limbeck.integrations.trainer import HostingTrainer, predictions, refuse_devices, refuse_settings
from limbeck.models.weights import load_weights, save_weights

OBJECTIVES = "objectives.safetensors"  # in a checkpoint, beside the student


class DistillationTrainer(HostingTrainer):
    """The ``Trainer`` of transformers with a teacher and a loss; all else is as it is there.

    The model is the student, before, while and after it trains: what ``save_model`` writes loads with
    ``from_pretrained`` and knows nothing of limbeck. Objectives' own helpers (projectors) train beside it and lie in
    checkpoints as ``objectives.safetensors``.

    The loss is a mean over the whole optimizer step: whatever ``gradient_accumulation_steps`` and the number of
    processes, loss and gradient are those of one large batch. Logs and metrics hold every term by name. In evaluations,
    terms that need what only the training set has (a cache's answers, a bank of samples) are left out.

    What batches may hold beside inputs and labels, :class:`~limbeck.integrations.reading.Reader` says. A split of
    ``limbeck.data.language_source`` may stand where a data set does: chats, packs, and pairs of tokenizers.

    Causal, masked and encoder-decoder language models, classifiers of texts, tokens and images, adapters of PEFT,
    gradient checkpointing, mixed precision and DDP work, and so do FSDP (its second version) and DeepSpeed: there an
    objective may look into the student, but neither read its weights nor have weights of its own, and each process
    holds the whole teacher. Several GPUs of one process (``nn.DataParallel``) are refused.

    Args:
        model: The student.
        args, data_collator, train_dataset, eval_dataset, processing_class: As in ``Trainer``.
        teacher: A module, or any teacher of limbeck, such as ``CachedTeacher``; ``None`` where no term needs one.
        loss: A method's name, ``{"cross_entropy": 0.5, "kd": {"weight": 0.5, "temperature": 2}}`` as in recipes, an
            objective or a sum of objectives.
        teacher_processing_class: The teacher's tokenizer, where it may be another one.
        logits, teacher_logits: Where logits stand in the models' outputs, where that does not tell itself.
        causal: Labels are the inputs and have to be shifted; default: what the model's class says.
        others: As in ``Trainer``.

    Raises:
        ConfigError: No such method, no teacher where a term needs one, or settings that distillation replaces.
        ModelError: Teacher and student share modules.

    ``train`` raises what does not fit before its first step: ``DataError`` where vocabularies, classes or packs do not,
    ``ModelError`` where a model reads from one document of a pack into the next, ``CheckpointError`` where a
    checkpoint's helpers are missing or are of another loss.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        teacher: nn.Module | Teacher | None = None,
        loss: LossSpec = "kd",
        teacher_processing_class: Any = None,
        logits: str | None = None,
        teacher_logits: str | None = None,
        causal: bool | None = None,
        **others: Any,
    ) -> None:
        refuse_settings(args, others)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=as_rows(train_dataset),
            eval_dataset=as_rows(eval_dataset),
            processing_class=processing_class,
            **others,
        )
        refuse_devices(self.args, self.accelerator)
        self.data_collator = Collator(self.data_collator)
        self.model_accepts_loss_kwargs = True  # it divides no loss by the number of micro-batches (before 5.20)
        self._loss, self._causal, self._logits = loss, causal, logits
        self._teacher = None if teacher is None else as_teacher(teacher, teacher_logits)
        self._teacher_processing = teacher_processing_class
        self._example, self._training = None, None
        self._said: dict[str, Tensor] = {}
        self._told = 0
        self._sums = Sums()
        self.distiller = None
        needs = set().union(*(needs_of(o) for o in self._host().loss))
        if needs & NEEDS_IDS or getattr(self._teacher, "looks_up", False):
            self.train_dataset = numbered(self.train_dataset)

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in ``Trainer``; afterwards the student is plain, without hooks."""
        with contextlib.ExitStack() as self._training:
            try:
                self._listen()
                return super().train(*args, **kwargs)
            finally:
                self._training, self._said = None, {}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The student's optimizer, objectives' own parameters in groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        loss = self._listen()[0].loss
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = {n: p for n, p in loss.named_parameters() if p.requires_grad and id(p) not in known}
        if own and self.lr_scheduler is not None and not self._created_lr_scheduler:
            raise ConfigError(
                "the loss has parameters of its own, which the given scheduler does not know",
                where="optimizers",
                found=", ".join(list(own)[:3]),
                remedy="give optimizer_cls_and_kwargs, or the optimizer without a scheduler",
            )
        decaying = set(self.get_decay_parameter_names(loss))
        for decays in (True, False):
            chosen = [p for n, p in own.items() if (n in decaying) == decays]
            if chosen:
                optimizer.add_param_group({"params": chosen, "weight_decay": self.args.weight_decay if decays else 0.0})
        return optimizer

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """In training, what is stepped (and put into DDP) is the distiller, whose child the student is."""
        if not training or self.sharded:
            return super()._wrap_model(model, training=training, dataloader=dataloader)
        distiller, example = self._listen()
        if model is not self.model:
            return model
        handler = self.accelerator.ddp_handler
        if self.accelerator.num_processes > 1 and handler and self.args.ddp_find_unused_parameters is None:
            handler.find_unused_parameters = leaves_some_out(distiller, example)
        wrapped, self.optimizer = self.accelerator.prepare(distiller, self.optimizer)
        return wrapped

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, each told what the whole step holds."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        world, device = self.accelerator.num_processes, self.args.device
        reduce = (lambda counts: self.accelerator.reduce(counts, "sum")) if world > 1 else None
        totals = totals_of([self.reader(s) for s in samples], self._host(), device, world, reduce) if samples else {}
        if totals:
            samples = [{**sample, "totals": totals} for sample in samples]
        return samples, torch.ones((), device=device)  # what else it would divide losses by

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of all terms, a micro-batch's part of its step."""
        distiller, example = self._listen()
        hosts = isinstance(self.accelerator.unwrap_model(model, keep_torch_compile=False), Distiller)
        with distiller.listening(example):
            if self.sharded:
                distiller.calls(model)
            losses: Losses = (model if hosts else distiller)(self._batch(inputs))
        if self._training is not None:
            if not self._said:
                self._told = self.state.global_step
            for name, value in losses.terms.items():
                self._said[name] = self._said.get(name, 0) + value
        return (losses.total, {"logits": losses.logits}) if return_outputs else losses.total

    def _batch(self, inputs: Any) -> Batch:
        batch = self.reader(inputs)
        batch.progress = torch.full((), self._progress, device=self.args.device)
        return batch

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in ``Trainer``; beside the loss of training stand its terms."""
        if self._said and "loss" in logs:
            values = torch.stack([v.float() for v in self._said.values()])
            values = values if self.accelerator.num_processes == 1 else self.accelerator.reduce(values, "mean")
            steps = max(self.state.global_step - self._told, 1)
            found = dict(zip(self._said, (values / steps).tolist(), strict=True))
            logs.update({name: value for name, value in found.items() if name not in logs})
            self._said = {}
        super().log(logs, *args, **kwargs)

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in ``Trainer``; the loss and each term are means over all that counts, however it is cut into batches."""
        distiller, example = self._listen(getattr(dataloader, "dataset", None))
        self._sums = Sums()
        with distiller.listening(example), distiller.unmoved():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        several = self.accelerator.num_processes > 1
        means = self._sums.means((lambda rows: self.accelerator.reduce(rows, "sum")) if several else None)
        if means and output.metrics is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
            output.metrics[f"{metric_key_prefix}_loss"] = float(self._weighed(distiller, means))
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, the student's output, and labels, of a batch that nobody learns from."""
        distiller, example = self._listen()
        inputs = self._prepare_inputs(inputs)
        batch = self._batch(inputs)
        terms = distiller.judged(labelled=batch.labels is not None)
        real = self._real(batch.size)
        judged = part_of(batch, slice(0, max(real, 1)))  # itself, but at the very end
        with torch.no_grad(), self.accelerator.autocast(), distiller.listening(example):
            if self.sharded:
                distiller.calls(model)
            values, output = distiller.judge(judged, terms)
            if not prediction_loss_only and (output is None or judged is not batch):
                output = call_model(model if self.sharded else distiller.student, batch.inputs)
        if terms is not None:
            self._sums.add(values, judged, units_of(terms), counts=real > 0)
        loss = self._weighed(distiller, values).detach() if values else None
        if prediction_loss_only:
            return loss, None, None
        return loss, predictions(output, ignore_keys, self.model), self._labels(inputs, batch)

    def _weighed(self, distiller: Distiller, values: Any) -> Any:
        weights = {name: schedule(self._progress) for name, _, schedule in distiller.loss.items()}
        return sum(weights[name.partition("/")[0]] * value for name, value in values.items())

    def _real(self, size: int) -> int:
        """How many of the last batch's samples stand there for the first time: ranks' batches are filled up."""
        state, world = self.accelerator.gradient_state, self.accelerator.num_processes
        if world == 1 or self.sharded or not state.end_of_dataloader or state.remainder <= 0:
            return size
        return min(max(state.remainder - self.accelerator.process_index * size, 0), size)

    def _labels(self, inputs: Any, batch: Batch) -> Any:
        """Labels as metrics of transformers know them: those of the user's own batch."""
        found = tuple(inputs[name] for name in self.label_names if inputs.get(name) is not None)
        if found:
            return found[0] if len(found) == 1 else found
        labels = batch.labels
        hides = labels is not None and batch.mask is not None and batch.mask.shape == labels.shape
        return labels.masked_fill(~batch.mask, -100) if hides else labels  # type: ignore[union-attr,operator]

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        loss = self._host().loss
        if self.args.should_save and loss.state_dict():
            save_weights(loss, Path(output_dir) / OBJECTIVES)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        loss, file = self._listen()[0].loss, Path(resume_from_checkpoint) / OBJECTIVES
        if not loss.state_dict():
            return
        try:
            load_weights(loss, file)
        except ModelError as error:
            raise CheckpointError(
                "this checkpoint's helpers are not those of the loss", where=str(file), found=str(error)
            ) from None
