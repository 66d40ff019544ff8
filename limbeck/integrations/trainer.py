"""The Trainer of transformers with a distiller beside its model: what it holds, sees and checks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from limbeck.core.batch import Batch, map_tensors
from limbeck.core.errors import ConfigError, DataError, MissingExtra
from limbeck.core.objective import DataInfo
from limbeck.core.teacher import Teacher
from limbeck.data.loader import Loader
from limbeck.integrations.checks import check_models, tokens_of
from limbeck.integrations.feeding import look, walk
from limbeck.integrations.hosting import Hosted
from limbeck.integrations.losses import LossSpec, as_terms
from limbeck.integrations.reading import EXTRAS, FIELDS, Reader, core_of
from limbeck.integrations.rows import TextRows

try:
    import transformers
except ModuleNotFoundError as error:
    raise MissingExtra("transformers", extra="language") from error


class HostingTrainer(transformers.Trainer):
    """Makes the distiller of its model, checks and sets it up, and lets it listen while it is needed."""

    distiller: Hosted | None
    reader: Reader
    _loss: LossSpec
    _teacher: Teacher | None
    _teacher_processing: Any
    _causal: bool | None
    _logits: str | None
    _example: Batch | None
    _training: contextlib.ExitStack | None

    @property
    def sharded(self) -> bool:
        """Whether FSDP or DeepSpeed keeps each process but a part of the weights."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def whole(self) -> bool:
        """Whether the student can run as it is, before its weights are sharded."""
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:  # the first version puts modules around its own
            return False
        return all(p.numel() and not p.is_meta for p in self._student.parameters())

    @property
    def task(self) -> str:
        """What labels mean."""
        config = getattr(core_of(self._student), "config", None)
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            return "multilabel"
        if problem == "regression" or getattr(config, "num_labels", None) == 1:
            return "regression"
        return "language" if self.reader.language else "classification"

    def loader(self, batch_size: int = 64) -> Loader:
        """The training set as limbeck walks through it, such as for ``limbeck.cache.build``."""
        collate = self._get_collator_with_removed_columns(self.data_collator)
        return walk(self.train_dataset, collate, self.reader, batch_size, self.task)

    @property
    def _student(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _host(self) -> Hosted:
        """The distiller of the present student; another one where ``model_init`` made another student."""
        student = self._student
        if self.distiller is None or self.distiller.student is not student:
            self.reader = Reader.of(student, self._teacher, self._causal)
            terms = as_terms(self._loss, self.task)
            self.distiller = Hosted(student, terms, self._teacher, logits=self._logits)
            self._example = None
        return self.distiller

    def _listen(self, dataset: Any = None) -> tuple[Hosted, Batch]:
        """The distiller, checked and set up, and an example; while training, it listens from then on."""
        distiller = self._host()
        if self._example is None:
            self._example = self._set_up(distiller, self.train_dataset if self.train_dataset is not None else dataset)
        if self._training is not None and not distiller.listens:
            self._training.enter_context(distiller.listening(self._example))
        return distiller, self._example

    def _set_up(self, distiller: Hosted, dataset: Any) -> Batch:
        collate = self._get_collator_with_removed_columns(self.data_collator)
        names, example = look(dataset, collate, self.reader)
        example = example.to(self.args.device)
        tokens, teacher_tokens = self._tokens(dataset)
        if distiller.teacher is not None:
            distiller.teacher.to(self.args.device)
        vocabulary = check_models(
            distiller,
            example,
            names,
            language=self.reader.language,
            tokens=tokens,
            teacher_tokens=teacher_tokens,
            runs=self.whole,
        )
        if self.whole:
            distiller.ready(example, self._info(vocabulary), self.args.seed, sharded=self.sharded)
        else:
            distiller.ready_sharded(example, vocabulary)
        return example

    def _tokens(self, dataset: Any) -> tuple[Any, Any]:
        if isinstance(dataset, TextRows):
            return dataset.split.tokens, dataset.split.teacher_tokens
        given = (self.processing_class, "processing_class"), (self._teacher_processing, "teacher_processing_class")
        own, other = (tokens_of(*each) for each in given)
        return own, other

    def _info(self, vocabulary: int | None) -> DataInfo:
        config, task = getattr(core_of(self._student), "config", None), self.task
        classes = None if task == "language" else getattr(config, "num_labels", None)
        try:
            loader = self.loader()
        except DataError:  # samples that are only walked through
            return DataInfo(classes=classes, task=task, vocabulary=vocabulary)
        return DataInfo(loader.samples, loader.labels, classes, loader.plain, task=task, vocabulary=vocabulary)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            sets = [self.train_dataset, *(self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else ())]
            names = {name for each in sets for name in getattr(each, "column_names", None) or ()}
            self._signature_columns: Any = [
                *(self._signature_columns or ()),
                *("labels", *FIELDS, *EXTRAS),
                *(name for name in names if name.startswith("teacher_")),
            ]


def refuse_settings(args: Any, others: dict[str, Any]) -> None:
    """Settings that would be passed over in silence."""
    if others.get("compute_loss_func") is not None:
        raise ConfigError("the loss is given as loss", where="compute_loss_func", remedy="write it as an Objective")
    if getattr(args, "label_smoothing_factor", 0):
        raise ConfigError(
            "the loss is given as loss",
            where="label_smoothing_factor",
            found=args.label_smoothing_factor,
            remedy='set it to 0, and use loss={"label_smoothing": ..., "kd": ...}',
        )


def refuse_devices(args: Any, accelerator: Any) -> None:
    """Ways of running that this does not go with."""
    if args.n_gpu > 1:
        raise ConfigError(
            "several GPUs in one process copy the model at every step, and what listens to it is left behind",
            where="args",
            found=f"{args.n_gpu} GPUs",
            remedy="launch with torchrun or accelerate launch, or let CUDA_VISIBLE_DEVICES show one",
        )
    plan = getattr(accelerator, "parallelism_config", None)
    cuts = [name for name in ("cp_enabled", "sp_enabled") if getattr(plan, name, False)]
    if cuts:
        raise ConfigError("parts of a sequence cannot be distilled alone", where="parallelism_config", found=cuts[0])


def predictions(output: Any, ignore_keys: list[str] | None, model: Any) -> Any:
    """What metrics of transformers are given: everything in the output but what the model says to leave out."""
    if ignore_keys is None:
        ignore_keys = getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", ["past_key_values"])
    if isinstance(output, Mapping):
        found = tuple(value for name, value in output.items() if name not in (*ignore_keys, "loss"))
    else:
        found = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    found = map_tensors(found, Tensor.detach)
    return found[0] if len(found) == 1 else found
