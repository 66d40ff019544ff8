"""Fingerprints: of a teacher, of a data set, and of every single view a teacher saw."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.core.hashing import draw_bits, key, key_tensor
from limbeck.core.plain import canonical, digest
from limbeck.core.teacher import teacher_inputs, teacher_mask
from limbeck.data.augment import describe_augment
from limbeck.data.collate import tensors_in
from limbeck.data.loader import IndexedLoader, Loader

_PRINTS = 8  # keeps the multipliers of prints apart from all other draws
_SAMPLES = 64  # looked at to tell a data set


def weights_print(model: nn.Module) -> str:
    """A hash of every name, shape, type and value a model holds."""
    sums = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            sums.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            sums.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sums.hexdigest()


def describe_teacher(model: nn.Module, logits: str | None = None) -> dict[str, Any]:
    """What tells a teacher: its class, precision and weights, and where its logits stand."""
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": "+".join(sorted(kinds)),
        "weights": weights_print(model),
        "logits": logits,
    }


def describe_views(loader: Loader) -> dict[str, Any]:
    """What tells the views that a loader gives, but for their order and number.

    Raises:
        DataError: Samples cannot be asked for by index.
    """
    if not isinstance(loader, IndexedLoader):
        raise DataError(
            "a cache needs samples that can be asked for by index",
            where="data",
            found=type(loader).__name__,
            remedy="pass the data set itself, not a DataLoader or an iterable",
        )
    known = loader.describe()
    spread = torch.linspace(0, loader.samples - 1, min(_SAMPLES, loader.samples)).round().long()
    (some,) = loader.bare().read([[(spread.to(loader.device), 0)]])
    return {
        "samples": loader.samples,
        "augment": describe_augment(loader.augment.transforms),
        "view_seed": loader.augment.seed if loader.augment.transforms else None,
        "normalise": known["normalise"],
        "language": known.get("language"),  # of texts: the tokenizer's fingerprint, lengths, packs
        "content": digest(canonical(row_prints(some).tolist())),
    }


def row_prints(batch: Batch) -> Tensor:
    r"""32 bits for each sample of a batch, ``[B]`` int32, that tell what the teacher sees of it.

    A multilinear hash, :math:`\sum_j a_j w_j \bmod 2^{64}` over the 32-bit (or wider) words of its values, with random
    odd :math:`a_j`; its upper half. Two samples that differ anywhere share it with a chance near :math:`2^{-32}`.
    Where a mask of the inputs' shape is there, places that do not count are left out, so padding changes nothing.
    """
    total: Tensor | int = 0
    mask = teacher_mask(batch)
    for number, tensor in enumerate(tensors_in(teacher_inputs(batch))):
        if not tensor.ndim or len(tensor) != batch.size:
            continue
        words = _words(tensor)
        factors = _factors(number, words.shape[1], words.device)
        if mask is not None and mask.shape == tensor.shape[:2] and words.shape == mask.shape:
            counted = mask.long()
            words, factors = (words + 1) * counted, factors[(counted.cumsum(1) - 1).clamp(min=0)]
        # a product of int64 with a vector is made in one pass, but on the host alone
        whole = factors.ndim == 1 and words.device.type == "cpu"
        total = total + (torch.mv(words, factors) if whole else (words * factors).sum(dim=1))
    if isinstance(total, int):
        raise DataError("there is no tensor with a row a sample", where="batch.inputs", found=type(batch.inputs))
    return (total >> 32).int()


@lru_cache(maxsize=16)
def _factors(number: int, count: int, device: torch.device) -> Tensor:
    """Random odd multipliers ``[count]`` of a batch's ``number``-th tensor, the same in every batch."""
    keys = key_tensor([key(_PRINTS, number)], device)
    return draw_bits(keys, torch.arange(count, device=device))[:, 0] | 1


def _words(tensor: Tensor) -> Tensor:
    """The bits of ``[B, *]`` as integers ``[B, M]``; zero is zero whatever its sign."""
    rows = tensor.reshape(len(tensor), -1)
    if not rows.is_floating_point():
        return rows.long()
    rows = (rows + 0.0).contiguous()
    return rows.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]).long()
