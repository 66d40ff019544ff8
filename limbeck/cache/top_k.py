"""Sparse predictions: the most probable classes and the tail, in as few bytes as tell them well."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.cache.codec import Codec, Layout, kl_name, pieces
from limbeck.cache.levels import as_half, from_levels, to_levels
from limbeck.cache.packing import pack, pack_set, packed_bytes, set_bytes, unpack, unpack_set
from limbeck.core.divergences import kl_rows
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.reduction import check_positive, widen
from limbeck.core.top_k import TopK, top_ids

_TEMPERATURES = (1.0, 4.0)  # at which students read: as it is, and as images' teachers are usually softened
_NOTHING = -1e4  # stands for minus infinity where it is multiplied: its exponential is 0 in any precision


@dataclass(frozen=True)
class TopKCodec(Codec):
    r"""The k most probable classes of logits, their log-probabilities at a few bits each, and the tail's mass.

    Stored of a position: the set of ids (:mod:`limbeck.cache.packing`), none where k is all classes; a level for each
    log-probability in the order of ids (:mod:`limbeck.cache.levels`); the widest distance below the largest one, and
    the tail's log-odds :math:`\log \frac{t}{1 - t}`, in half precision. Decoded probabilities are scaled so that they
    and the tail make 1. Of equal logits the lowest ids are kept. Logits of minus infinity (a padded vocabulary) are
    probabilities of zero.

    Args:
        k: Classes that are kept; ``None``: all of them. The default of 50 is the budget of DistillKit's small caches.
        bits: Of a log-probability, 2 to 12. Each more divides the divergence by four; with 6, the default, 50 classes
            of 152,000 take 127 bytes.
        temperature: At which the levels' places are best if values are spread evenly. 4, the default, is how images'
            teachers are usually softened, and on language models' logits was the best of 2/3 to 4 at T = 1 too.

    Example:
        >>> codec = TopKCodec(k=2)
        >>> logits = torch.tensor([[4.0, 0.0, 3.0, 0.0]])
        >>> top = codec.decode(codec.encode(logits), [4], logits.dtype)
        >>> top.ids, top.dense().exp()
        (tensor([[0, 2]]), tensor([[0.7120, 0.0131, 0.2619, 0.0131]]))
    """

    k: int | None = 50
    bits: int = 6
    temperature: float = 4.0
    name: ClassVar[str] = "top_k"
    rows_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise self.option_error("k", "1 or more, or null for all classes")
        if not 2 <= self.bits <= 12:
            raise self.option_error("bits", "2 to 12")
        check_positive(self.temperature, f"{self.name}.temperature")

    def arrays(self, shape: Sequence[int], dtype: torch.dtype) -> Layout:
        classes, k = self._sizes(shape)
        if not dtype.is_floating_point:
            raise TensorError("not logits", where="values", found=str(dtype), wanted="floating values")
        layout: Layout = {"levels": ((packed_bytes(k, self.bits),), torch.uint8), "widest": ((), torch.float16)}
        if k < classes:
            layout |= {"ids": ((set_bytes(classes, k),), torch.uint8), "tail": ((), torch.float16)}
        return layout

    @torch.no_grad()
    def encode(self, values: Tensor) -> dict[str, Tensor]:
        layout = self.arrays(values.shape[1:], values.dtype)
        found: dict[str, list[Tensor]] = {
            name: [values.new_empty((0, *row), dtype=kind)] for name, (row, kind) in layout.items()
        }
        for piece in pieces(values):
            rows = values[piece]
            if len(rows) == 1:  # a single sum may be split among threads, and then rounds otherwise than one of many
                rows = rows.expand(2, -1)
            for name, array in self._encode(rows.contiguous(), piece.start).items():
                found[name].append(array[: piece.stop - piece.start])
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _encode(self, values: Tensor, start: int) -> dict[str, Tensor]:
        classes, k = self._sizes(values.shape[1:])
        largest = values.amax(dim=1)
        if not largest.isfinite().all():
            place = int((~largest.isfinite()).int().argmax())
            raise TensorError(
                "every logit is minus infinity" if largest[place] == -math.inf else "a logit is NaN or infinite",
                where=f"logits, position {start + place}",
                found=f"class {int(values[place].argmax())}: {float(largest[place])}",
                wanted="finite logits, or minus infinity for classes that are ruled out",
            )
        ids, values = top_ids(values, k), widen(values)
        kept = values.gather(1, ids)
        levels, widest = to_levels(widen(largest).unsqueeze(1) - kept, self.bits, self.temperature)
        arrays = {"levels": pack(levels, self.bits), "widest": widest}
        if k < classes:
            others = values.scatter(1, ids, -math.inf).logsumexp(dim=1)
            arrays |= {"ids": pack_set(ids, classes), "tail": as_half(others - kept.logsumexp(dim=1))}
        return arrays

    @torch.no_grad()
    def decode(self, arrays: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> TopK:
        """The kept classes; log-probabilities are float32, or float64 where logits were."""
        self.check(arrays, shape, dtype)
        classes, k = self._sizes(shape)
        levels, widest = unpack(arrays["levels"], self.bits, k), arrays["widest"]
        values = from_levels(levels, widest, self.bits, self.temperature).log_softmax(dim=1)
        if k == classes:
            ids = torch.arange(k, device=widest.device).repeat(len(widest), 1)
            tail = torch.full_like(values[:, 0], -math.inf)
        else:
            odds = arrays["tail"].float()
            ids, tail = unpack_set(arrays["ids"], k, classes), F.logsigmoid(odds)
            values = values + F.logsigmoid(-odds).unsqueeze(1)
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        return TopK(ids, values.to(kind), tail.to(kind), classes)

    @torch.no_grad()
    def errors(self, values: Tensor, decoded: TopK, temperatures: Sequence[float] | None = None) -> dict[str, Tensor]:
        r"""Divergences of the decoded prediction from the original, at temperatures of 1 and 4 unless others are given.

        ``kl``, ``kl_t4``: over all classes, the tail spread evenly over those that were left out. With p the original,
        t its tail and u the even distribution it is

        .. math:: \mathrm{KL}(p \| q) = \mathrm{KL}((p_1, ..., p_k, t) \| (q_1, ..., q_k, s))
            + t\,\mathrm{KL}(p_{tail} \| u)

        ``kl_kept``: the first term at a temperature of 1: what quantisation alone has lost. The second is what k
        classes and a tail cannot say.
        """
        wanted = _TEMPERATURES if temperatures is None else temperatures
        found: dict[str, list[Tensor]] = {}
        for piece in pieces(values):
            rows, ids = widen(values[piece]), decoded.ids[piece]
            stored = TopK(ids, decoded.log_probs[piece], decoded.log_tail[piece], decoded.classes)
            for temperature in dict.fromkeys((1.0, *wanted)):
                top, unlike = _tail_apart(rows, ids, temperature)
                kept = kl_rows(_parts(top), _parts(stored.softened(temperature))).clamp(min=0)
                if temperature == 1:
                    found.setdefault("kl_kept", []).append(kept)
                if temperature in wanted:
                    found.setdefault(kl_name(temperature), []).append(kept + unlike)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """Classes, and how many of them are kept."""
        if len(shape) != 1 or shape[0] < 1:
            raise TensorError(
                f"{self.name} stores logits", where="values", found=f"values of shape {list(shape)}", wanted="[classes]"
            )
        k = shape[0] if self.k is None else self.k
        if k > shape[0]:
            raise ConfigError(
                "more classes than there are",
                where=f"{self.name}.k",
                found=k,
                wanted=f"at most {shape[0]}",
                remedy="null keeps them all",
            )
        return shape[0], k


def _tail_apart(logits: Tensor, ids: Tensor, temperature: float) -> tuple[TopK, Tensor]:
    """The form of :meth:`TopK.at` in few passes, and what its tail loses if it is spread evenly, ``t KL(tail | u)``."""
    largest = logits.amax(dim=1, keepdim=True)
    kept = (logits.gather(1, ids) - largest) / temperature
    z = ((logits - largest) / temperature).clamp_(min=_NOTHING).scatter_(1, ids, _NOTHING)
    p = z.exp()
    mass = p.sum(dim=1)
    log_all = (mass + kept.exp().sum(dim=1)).log()
    top = TopK(ids, kept - log_all.unsqueeze(1), mass.log() - log_all, logits.shape[1])
    others = max(1, logits.shape[1] - ids.shape[1])
    mean = p.mul_(z).sum(dim=1) / mass  # of log p over the tail, up to what all have in common
    unlike = (top.log_tail.exp() * (mean - mass.log() + math.log(others))).masked_fill(mass == 0, 0.0)
    return top, unlike.cpu().double().clamp(min=0)


def _parts(top: TopK) -> Tensor:
    """Log-probabilities of the kept classes and the tail, ``[P, k + 1]``, which make 1 in float64."""
    return top.buckets().cpu().double().log_softmax(dim=1)
