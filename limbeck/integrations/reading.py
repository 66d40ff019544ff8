"""From what a trainer's loader gives to a batch: the one place where labels of transformers are shifted."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.collate import to_batch
from limbeck.data.language.shift import next_tokens
from limbeck.data.language.vocabulary import ALIGNED

#: What a trainer's dict may hold beside the models' inputs. What else begins with ``teacher_`` are the teacher's.
FIELDS = ("index", "mask", "view", "shift_labels", "teacher_inputs", "extras", "totals")
EXTRAS = (*ALIGNED, "document", "tag")
_LABELS = ("labels", "label", "label_ids")
_FIRST = ("input_ids", "attention_mask", "position_ids")  # the order in which limbeck's own loaders give them


@dataclass
class Reader:
    """Reads batches as the collators of transformers make them, and as limbeck's own data are.

    ============================  =====================================================================================
    a batch's                     becomes
    ============================  =====================================================================================
    ``labels``, causal models     labels and mask of the next tokens: those at ``-100``, of padding, and the first token
                                  of a document (where ``position_ids`` begin anew) are not predicted. Where there are
                                  no labels, every token is
    ``labels``, other models      labels; where each token has one, those at ``-100`` do not count
    ``shift_labels``, ``mask``    labels that are shifted already, negative where there is none, and what counts
    ``index``, ``view``           which samples these are, and in which view
    ``teacher_*``                 what the teacher sees where that differs: ``teacher_input_ids`` and so on, or all of
                                  it in ``teacher_inputs``; ``teacher_mask``, ``teacher_labels`` and what else methods
                                  for two tokenizers ask for go to the extras, as do ``extras``
    what is left                  the inputs
    ============================  =====================================================================================

    Args:
        causal: Labels are the inputs themselves, not shifted.
        decoder: Makes an encoder-decoder's ``decoder_input_ids`` of labels.
        teacher_decoder: The same for a teacher that begins otherwise.
        language: Logits are of tokens.
        constants: What both models are told beside their inputs.
        teacher_takes: Names that the teacher's forward takes; ``None``: any.

    >>> read = Reader(causal=True)
    >>> batch = read({"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])})
    >>> batch.labels.tolist(), batch.mask.tolist()
    ([[6, 7, -1]], [[True, True, False]])
    """

    causal: bool = False
    decoder: Callable[[Tensor], Tensor] | None = None
    teacher_decoder: Callable[[Tensor], Tensor] | None = None
    language: bool = False
    constants: Mapping[str, Any] | None = None
    teacher_takes: frozenset[str] | None = None

    @classmethod
    def of(cls, student: nn.Module, teacher: Any = None, causal: bool | None = None) -> Reader:
        """How batches for these models are read.

        Args:
            student: Any module; one of transformers tells by itself what its labels mean.
            teacher: A module, or a teacher of limbeck.
            causal: Overrides what the student tells.
        """
        student = core_of(student)
        judge = core_of(teacher.model if isinstance(teacher, FrozenTeacher) else teacher)
        two = bool(getattr(getattr(student, "config", None), "is_encoder_decoder", False))
        causal = (not two and is_causal(student)) if causal is None else causal
        decoder = getattr(student, "prepare_decoder_input_ids_from_labels", None) if two else None
        other = getattr(judge, "prepare_decoder_input_ids_from_labels", None) if two else None
        begins = [_begins(m) for m in (student, judge)]
        takes = _takes(judge) if isinstance(judge, nn.Module) else None
        cached = (causal or two) and "use_cache" in (_named(student) or ())
        return cls(
            causal,
            decoder,
            other if begins[0] != begins[1] else None,
            causal or two or _is_named(student, "MASKED_LM"),
            {"use_cache": False} if cached else None,
            takes,
        )

    def __call__(self, item: Any) -> Batch:
        """Read a batch.

        Args:
            item: A dict, a ``Batch``, or anything that :func:`limbeck.data.to_batch` reads.
        """
        if not isinstance(item, Mapping):
            return to_batch(item)
        rest = dict(item)
        extras = {**(rest.pop("extras", None) or {}), **{k: rest.pop(k) for k in EXTRAS if k in rest}}
        known = {name: rest.pop(name, None) for name in FIELDS if name != "extras"}
        labels = next((rest.pop(name) for name in _LABELS if rest.get(name) is not None), None)
        for name in _LABELS:
            rest.pop(name, None)
        own = known["teacher_inputs"] or {
            name.removeprefix("teacher_"): rest.pop(name) for name in list(rest) if name.startswith("teacher_")
        }
        inputs = {**{k: rest[k] for k in _FIRST if k in rest}, **rest}
        labels, mask = self._labels(inputs, labels, known["shift_labels"], known["mask"], extras)
        if self.decoder is not None and labels is not None and inputs.get("decoder_input_ids") is None:
            inputs["decoder_input_ids"] = self.decoder(labels)
            if self.teacher_decoder is not None and "decoder_input_ids" not in own:
                own["decoder_input_ids"] = self.teacher_decoder(labels)
        inputs |= self.constants or {}
        index = known["index"]
        return Batch(
            inputs["inputs"] if set(inputs) == {"inputs"} else inputs,
            labels,
            None if index is None else index.long(),
            mask,
            teacher_inputs=self._teacher(inputs, own),
            totals=known["totals"] or {},
            extras=extras,
            view=known["view"],
        )

    def _labels(
        self, inputs: dict[str, Any], labels: Any, shifted: Any, mask: Any, extras: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Labels and mask, in limbeck's sense."""
        if shifted is not None:
            return shifted, shifted >= 0 if mask is None else mask
        ids = inputs.get("input_ids")
        if self.causal and isinstance(ids, Tensor):
            document = documents_of(inputs)
            if inputs.get("position_ids") is not None:
                extras.setdefault("document", document)
            learned = document > 0 if labels is None else labels >= 0
            ids = ids if labels is None else torch.where(learned, labels, ids)
            labels, counted = next_tokens(ids, document, learned)
            return labels, counted if mask is None else counted & mask
        if isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim == 1:
            labels = labels.unsqueeze(1)  # numbers to predict, [B, P]
        elif isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point() and mask is None:
            mask = labels >= 0
        return labels, mask

    def _teacher(self, inputs: dict[str, Any], own: dict[str, Any]) -> dict[str, Any] | None:
        """The teacher's inputs, where they differ from the student's."""
        if "input_ids" in own:
            given = {**own, **(self.constants or {})}
        else:
            given = {**inputs, **own}
        if self.teacher_takes is not None:
            given = {name: value for name, value in given.items() if name in self.teacher_takes}
        return given if own or given.keys() != inputs.keys() else None


def written(batch: Batch) -> dict[str, Any]:
    """A batch as the dict that a :class:`Reader` reads, for loops that know nothing but dicts.

    >>> sorted(written(Batch({"input_ids": torch.ones(1, 2).long()}, torch.ones(1, 2).long(), torch.arange(1))))
    ['index', 'input_ids', 'shift_labels']
    """
    inputs = dict(batch.inputs) if isinstance(batch.inputs, Mapping) else {"inputs": batch.inputs}
    inputs.pop("use_cache", None)
    labels = batch.labels
    tokens = labels is not None and labels.ndim > 1 and not labels.is_floating_point()
    found = {
        **inputs,
        "shift_labels" if tokens else "labels": labels,
        "mask": batch.mask,
        "index": batch.index,
        "view": batch.view,
        "teacher_inputs": batch.teacher_inputs,
        "extras": batch.extras or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def documents_of(inputs: Mapping[str, Any]) -> Tensor:
    """Which document of its row each token is of, ``[B, L]``, 0 for padding: positions that do not rise begin one.

    >>> documents_of({"input_ids": torch.ones(1, 5), "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}).tolist()
    [[1, 1, 2, 2, 2]]
    """
    ids, positions, attended = (inputs.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    assert isinstance(ids, Tensor)
    document = torch.ones_like(ids, dtype=torch.long)
    if isinstance(positions, Tensor) and positions.shape == ids.shape:
        begins = positions[:, 1:] <= positions[:, :-1]
        document[:, 1:] += begins.long().cumsum(dim=1)
    if isinstance(attended, Tensor) and attended.shape == ids.shape:
        document = document.masked_fill(attended == 0, 0)
    return document


def core_of(model: Any) -> Any:
    """The model inside adapters of PEFT; any other as it is."""
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) else model


def is_causal(model: nn.Module) -> bool:
    """Whether a model of transformers predicts its own next tokens, so that its labels are its inputs."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    shifts = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return shifts or _is_named(model, "CAUSAL_LM")


def _is_named(model: Any, kind: str) -> bool:
    """Whether transformers counts a model's class among those of a kind."""
    if "transformers" not in sys.modules:
        return False
    from transformers.models.auto import modeling_auto

    return type(model).__name__ in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values()


def _begins(model: Any) -> tuple[Any, Any]:
    config = getattr(model, "config", None)
    return getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)


def _named(model: Any) -> frozenset[str] | None:
    """Names of what a model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters) if isinstance(model, nn.Module) else None


def _takes(model: nn.Module) -> frozenset[str] | None:
    """The same, or ``None`` where it takes any."""
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    anything = inspect.Parameter.VAR_KEYWORD in kinds or inspect.Parameter.VAR_POSITIONAL in kinds
    return None if anything else _named(model)
