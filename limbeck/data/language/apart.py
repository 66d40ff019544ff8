"""Whether a model keeps the documents of a pack apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError, ModelError
from limbeck.core.survey import call_model, dry
from limbeck.core.teacher import teacher_inputs
from limbeck.core.trace import logits_of

# Of the spread of logits what arithmetic may cost: where another document is exchanged, and where a pack's logits are
# compared with those of a document alone, whose sums are ordered otherwise.
_LEAK, _ALONE = {torch.float64: 1e-9, torch.float32: 1e-5}, {torch.float64: 1e-6, torch.float32: 1e-3}
_LEAK_HALF, _ALONE_HALF = 2e-3, 0.1  # the same of 16-bit numbers
_TOKENS = 48  # of the pack that is looked at


def check_packs(model: nn.Module, batch: Batch, *, logits: str | None = None, teacher: bool = False) -> None:
    """Raise where a model's logits of a document depend on what else is in its pack.

    Models of transformers with rotary or learned positions tell documents by positions that begin anew (Llama, Qwen,
    Mistral, Gemma, Phi, GPT-2, GPT-NeoX ...). Others (BLOOM, Falcon, MPT, OPT, Mamba) read on from one document into
    the next without a word. So this looks: it runs one small pack, the same with other documents before its last, and
    each document alone.

    Args:
        model: Its mode is as before afterwards.
        batch: Of packs, on the model's device.
        logits: Where they stand in its output.
        teacher: It is the teacher, and reads what the batch has for teachers.

    Raises:
        DataError: The batch is not of packs.
        ModelError: Documents are not kept apart, or stand in other positions than alone; or it takes no positions.
    """
    inputs: Any = teacher_inputs(batch) if teacher else batch.inputs
    name = "teacher" if teacher else "student"
    if "document" not in batch.extras:
        raise DataError("these are no packs", where="batch", remedy="look at a loader with pack: true")
    ids = inputs["input_ids"][:1, :_TOKENS]
    documents = ids.split([ids.shape[1] - 2 * (ids.shape[1] // 3), ids.shape[1] // 3, ids.shape[1] // 3], dim=1)
    try:
        whole = _asked(model, documents, logits)
    except TypeError as error:
        raise ModelError(
            "packs are told apart by position_ids and use_cache, which this model does not take",
            where=name,
            found=f"{type(model).__name__}: {error}",
            remedy="pack: false",
        ) from error
    others = [torch.where(document == 1, 0, 1) for document in documents[:-1]]
    last = documents[-1].shape[1]
    exchanged = _asked(model, [*others, documents[-1]], logits)
    alone = torch.cat([_asked(model, [document], logits) for document in documents if document.numel()])
    leak, apart = float((whole - exchanged)[-last:].abs().max()), float((whole - alone).abs().max())
    dtype, spread = next((p.dtype for p in model.parameters()), torch.float32), float(alone.std())
    told = ""
    if not leak <= _LEAK.get(dtype, _LEAK_HALF) * spread:
        told = f"logits change by {leak:.2g} with the documents before"
    elif not apart <= _ALONE.get(dtype, _ALONE_HALF) * spread:
        told = f"logits are {apart:.2g} from those of a document alone"
    if told:
        raise ModelError(
            "this model does not keep the documents of a pack apart",
            where=name,
            found=f"{type(model).__name__}: {told}, in a spread of {spread:.2g}",
            wanted="the same logits",
            remedy="pack: false",
        )


def _asked(model: nn.Module, documents: Sequence[Tensor], logits: str | None) -> Tensor:
    """Logits ``[L, V]`` of one pack, as batches ask for them."""
    ids = torch.cat(list(documents), dim=1)
    position = torch.cat([torch.arange(d.shape[1], device=d.device) for d in documents]).unsqueeze(0)
    with dry(model):
        output = call_model(model, {"input_ids": ids, "position_ids": position, "use_cache": False})
    return logits_of(output, logits)[0].double()
