"""What a teacher says of the held-out data, worked out once for all the runs of a comparison."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from limbeck.core.files import write_tensors
from limbeck.core.survey import dry
from limbeck.core.taps import Listener
from limbeck.core.teacher import teacher_inputs
from limbeck.data.loader import Loader

LIMIT = 1 << 30  # bytes of answers


def answers(
    teacher: nn.Module, loader: Loader, folder: Path, *, data: dict[str, Any], where: str | None = None
) -> Tensor | None:
    """The teacher's logits by sample id, ``[N, ...]``; read from ``folder`` where an earlier run left them there.

    The file's name follows from the teacher's weights and from what the loader gives, so it is never another's.
    ``None`` where samples have no ids, logits differ in shape, or all of them are more than 1 GiB.

    Args:
        teacher: Any module.
        loader: Of held-out data, unaugmented.
        folder: Where answers are kept.
        data: What tells these data from others.
        where: Where logits stand in the teacher's output.
    """
    file = folder / f"{_digest(teacher, loader, [data, where])}.safetensors"
    if file.is_file():
        return load_file(file)["logits"]
    listener, parts, ids = Listener(teacher, ("logits",), logits=where), [], []
    with dry(teacher):
        for batch in loader.batches():
            if batch.index is None:
                return None
            parts.append(listener(teacher_inputs(batch)).logits.cpu())
            ids.append(batch.index.cpu())
            share = sum(len(own) for own in ids) / (loader.samples or 1)
            if sum(part.nbytes for part in parts) > LIMIT * share or parts[-1].shape[1:] != parts[0].shape[1:]:
                return None
    index = torch.cat(ids)
    if not torch.equal(index.sort().values, torch.arange(len(index))):
        return None
    logits = torch.empty(len(index), *parts[0].shape[1:], dtype=parts[0].dtype)
    logits[index] = torch.cat(parts)
    write_tensors(file, {"logits": logits})
    return logits


def _digest(teacher: nn.Module, loader: Loader, identity: list[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    told = [type(teacher).__qualname__, loader.describe(), *identity]
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for tensor in teacher.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
