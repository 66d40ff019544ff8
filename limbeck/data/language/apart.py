"""Whether a model keeps the documents of a pack apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError, ModelError
from limbeck.core.survey import call_model, dry
from limbeck.core.trace import logits_of

SHARE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the spread of logits that arithmetic may cost
_HALF = 0.1  # the same of 16-bit numbers
_TOKENS = 48  # of the pack that is looked at


def check_packs(model: nn.Module, batch: Batch, *, logits: str | None = None, name: str = "student") -> None:
    """Raise where a model's logits of a document depend on what else is in its pack.

    Models of transformers tell documents by positions that begin anew, those with rotary or learned positions that
    have no window of their own state (Llama, Qwen, Mistral, Gemma, Phi, GPT-2, GPT-NeoX ...). Others (BLOOM, Falcon,
    MPT, OPT, Mamba) read on from one document into the next without a word. So this looks: it runs one small
    pack, and each of its documents alone.

    Args:
        model: Its mode is as before afterwards.
        batch: Of packs, on the model's device.
        logits: Where they stand in its output.
        name: For the message.

    Raises:
        DataError: The batch is not of packs.
        ModelError: Documents are not kept apart, or stand in other positions than alone.
    """
    inputs: Any = batch.inputs
    if "document" not in batch.extras:
        raise DataError("these are no packs", where="batch", remedy="look at a loader with pack: true")
    ids = inputs["input_ids"][:1, :_TOKENS]
    documents = ids.split([ids.shape[1] - 2 * (ids.shape[1] // 3), ids.shape[1] // 3, ids.shape[1] // 3], dim=1)
    whole = _asked(model, documents, logits)
    alone = torch.cat([_asked(model, [document], logits) for document in documents if document.numel()])
    worst, spread = float((whole - alone).abs().max()), float(alone.std())
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if not worst <= SHARE.get(dtype, _HALF) * spread:
        found = (
            f"{type(model).__name__}: logits {worst:.2g} from those of a document alone, in a spread of {spread:.2g}"
        )
        raise ModelError(
            "this model does not keep the documents of a pack apart",
            where=name,
            found=found,
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
