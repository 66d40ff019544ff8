"""A teacher that is not there: its cache answers in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.cache.folder import Cache
from limbeck.cache.prints import row_prints
from limbeck.core.batch import Batch, map_tensors
from limbeck.core.errors import CacheError
from limbeck.core.teacher import teacher_mask
from limbeck.core.top_k import TopK
from limbeck.core.trace import Trace

HELD = 1 << 28  # bytes of decoded answers that are kept on the device
_OFTEN, _EVERY = 16, 64  # where looking costs a wait: the first batches, then one in so many


class CachedTeacher:
    """Answers every batch with what the teacher said of these samples in these views.

    It can take a frozen teacher's place beside any objective whose taps were stored. Before it answers, it sees that
    the batch is what the teacher saw, by a fingerprint of every sample's values: other samples, another order of the
    data set, other augmentation, normalisation or tokens are refused. (On an accelerator that is done for the first
    16 batches and for one in 64 from then on.)

    A view's answers, or those of all views where a batch shows several, are decoded once and kept on the device where
    they fit; else each batch is read from the mapped files.

    Args:
        cache: Its folder, or a cache in hand.

    Raises:
        CacheError: It is damaged or unfinished.
    """

    looks_up = True  # a compiled step asks it outside of its graph

    def __init__(self, cache: Cache | str | Path) -> None:
        self.cache = cache if isinstance(cache, Cache) else Cache(cache)
        self.device = torch.device("cpu")
        self.taps: tuple[str, ...] = ()
        self._kept: dict[int | None, tuple[Tensor, dict[str, Any]]] = {}
        self._calls = 0

    @property
    def identity(self) -> str:
        """What tells it from others, for a run's checkpoint."""
        return str(self.cache.index["header"])

    @property
    def views(self) -> dict[str, Any]:
        """How a loader is built that shows the views it knows: ``views`` and ``view_seed``."""
        header = self.cache.header
        return {"views": header.views, "view_seed": header.data["view_seed"]}

    @property
    def fits(self) -> int:
        """How many views are kept in memory."""
        signals = self.cache.header.signals
        if any(s.counts is not None for s in signals):
            return 0
        size = sum(s.values * int(torch.Size(s.shape).numel()) * s.dtype.itemsize for s in signals)
        return min(self.cache.header.views, HELD // max(1, size * self.cache.header.samples))

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        """See that everything asked for was stored, and that the batch is what the teacher saw.

        Raises:
            CacheError: The message names the tap, or the sample.
        """
        known = self._known()
        for tap in taps:
            if tap not in known:
                raise CacheError(
                    "the cache does not hold this",
                    where=tap,
                    found=f"a cache of {', '.join(known)}",
                    remedy=f"build it with --store {tap} too, or use the teacher itself",
                )
        self.taps = taps
        self._refuse_other(batch, self._printed(batch))

    def __call__(self, batch: Batch) -> Trace:
        self._calls += 1
        if self.device.type == "cpu" or self._calls <= _OFTEN or self._calls % _EVERY == 0:
            self._refuse_other(batch, self._printed(batch))
        values = self._values(batch)
        if "top_k" in self.taps:
            values["top_k"] = values["logits"]
        dense = {tap: v.dense() if isinstance(v, TopK) and tap != "top_k" else v for tap, v in values.items()}
        return Trace(None, {tap: dense[tap] for tap in self.taps})

    def to(self, device: torch.device | str) -> CachedTeacher:
        """Answers are on this device from now on."""
        if torch.device(device) != self.device:
            self.device, self._kept = torch.device(device), {}
        return self

    def _known(self) -> tuple[str, ...]:
        sparse = any(s.tap == "logits" and s.codec.name == "top_k" for s in self.cache.header.signals)
        return self.cache.header.taps + (("top_k",) if sparse else ())

    def _view(self, batch: Batch) -> int | Tensor:
        """Which view a batch shows; where nothing was augmented every view is the first."""
        if self.cache.header.views == 1 and not self.cache.header.data["augment"]:
            return 0
        if batch.view is None:
            raise CacheError(
                "the batch does not say which view it shows",
                where="batch.view",
                remedy="use a loader of limbeck.data, or build the cache without augmentation",
            )
        return batch.view

    def _values(self, batch: Batch) -> dict[str, Any]:
        held = self._held(batch)
        if held is None:
            index, view, mask = batch.require("index"), self._view(batch), teacher_mask(batch)
            read = self.cache.read(index, view, None if mask is None else mask.cpu())
            found = map_tensors(read, lambda t: t.to(self.device, non_blocking=True))
        else:
            (_, values), rows = held
            found = map_tensors(values, lambda t: t.index_select(0, rows))
        return {**found, **{k: v.to(self.device) for k, v in self.cache.constants.items()}}

    def _printed(self, batch: Batch) -> Tensor:
        held = self._held(batch)
        if held is None:
            return self.cache.prints(batch.require("index").cpu(), self._view(batch))
        (prints, _), rows = held
        return prints[rows]

    def _held(self, batch: Batch) -> tuple[tuple[Tensor, dict[str, Any]], Tensor] | None:
        """What is kept that answers a batch, and the rows of it; ``None``: it is read from the mapped files."""
        index, view, header = batch.require("index"), self._view(batch), self.cache.header
        if isinstance(view, int) and None not in self._kept:
            known = self.fits and view < header.views
            return (self._whole(view), index.to(self.device)) if known else None
        if self.fits < header.views:
            return None
        return self._whole(None), self.cache.rows(index, view).to(self.device)

    def _whole(self, view: int | None) -> tuple[Tensor, dict[str, Any]]:
        """All answers of a view, or of all views one after the other, and the fingerprints of what was seen."""
        if view not in self._kept:
            samples, views = torch.arange(self.cache.header.samples), range(self.cache.header.views)
            if view is None:
                self._kept.clear()
            elif len(self._kept) >= self.fits:
                del self._kept[next(iter(self._kept))]
            of = torch.tensor([view] if view is not None else list(views)).repeat_interleave(len(samples))
            index = samples.repeat(len(of) // len(samples))
            read = map_tensors(self.cache.read(index, of), lambda t: t.to(self.device))
            self._kept[view] = self.cache.prints(index, of).to(self.device), read
        return self._kept[view]

    def _refuse_other(self, batch: Batch, wanted: Tensor) -> None:
        found = row_prints(batch)
        wrong = (found != wanted.to(found.device)).nonzero()[:, 0]
        if len(wrong):
            first = int(wrong[0])
            sample = int(batch.require("index")[first])
            view = int(torch.as_tensor(self._view(batch)).expand(batch.size)[first])
            raise CacheError(
                "the student's samples are not those that the teacher saw",
                where="batch.inputs",
                found=f"{len(wrong)} of {batch.size} differ, first sample {sample} in view {view}",
                remedy="use the data, order, augmentation, seed of views and tokens that the cache was built with; "
                "a loss that changes its teacher's inputs needs the teacher itself",
            )
