"""A finished cache, opened for reading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from limbeck.cache.header import CONSTANTS, INDEX, Header, read_header, read_plain
from limbeck.cache.prints import describe_views
from limbeck.cache.shards import PRINTS, Shard, open_shard, places_of, shard_path
from limbeck.cache.signals import Signal
from limbeck.core.errors import CacheError
from limbeck.core.plain import digest, file_digest
from limbeck.data.loader import Loader


class Cache:
    """What a teacher said of every sample of a set, in one or more views.

    Opening looks at the header, at the index and at every file's size; a shard's digest is computed when it is first
    read. What is damaged is refused, never decoded. Rows are found by sample and view, so order, batches and ranks of
    whoever reads play no part, and any number of processes may read at once.

    Args:
        folder: As ``limbeck cache build`` or :func:`limbeck.cache.build` left it.

    Raises:
        CacheError: It is damaged or unfinished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header: Header = read_header(self.folder)
        if not (self.folder / INDEX).is_file():
            done = sum(shard_path(self.folder, n).is_file() for n in range(self.header.shards))
            raise CacheError(
                "the cache is not finished",
                where=str(self.folder),
                found=f"{done} of {self.header.shards} shards",
                remedy="go on with limbeck cache build",
            )
        self.index = read_plain(self.folder / INDEX)
        if self.index["header"] != self.header.digest:
            raise CacheError("header and index are of different caches", where=str(self.folder / INDEX))
        for number, facts in enumerate(self.index["shards"]):
            place = shard_path(self.folder, number)
            if not place.is_file() or place.stat().st_size != facts["bytes"]:
                self._open(number)  # says what is wrong with it
        self._shards: dict[int, Shard] = {}
        self.constants: dict[str, Tensor] = self._constants()

    @property
    def errors(self) -> dict[str, dict[str, dict[str, float]]]:
        """What the codecs lost, by signal and measure: ``mean`` and ``max`` over all values stored."""
        return dict(self.index["errors"])

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(int(facts["bytes"]) for facts in self.index["shards"])

    def refuse_other_views(self, loader: Loader) -> None:
        """Raise unless a loader gives the samples, augmentation and normalisation that the teacher saw.

        Raises:
            CacheError: The message names the field that differs.
        """
        self.header.refuse_other({"data": describe_views(loader)}, "data set, or of other views of it")

    def read(self, index: Tensor, view: int | Tensor = 0, mask: Tensor | None = None) -> dict[str, Any]:
        """What the teacher said, by tap; on the CPU.

        Args:
            index: ``[B]`` samples.
            view: Of each, or of all.
            mask: ``[B, L]``, the positions that count, where the teacher's values stand at positions.

        Raises:
            CacheError: No such sample or view, or a shard is damaged.
        """
        found = self.arrays(index, view)
        values: dict[str, Any] = {}
        for signal in self.header.signals:
            counts = found[signal.counts].long() if signal.counts is not None else None
            if signal.masked and counts is not None and (mask is None or not torch.equal(mask.sum(1).long(), counts)):
                raise CacheError(
                    "the batch's positions are not those that the teacher saw",
                    where=f"{signal.name}, batch.mask",
                    found=None if mask is None else f"{mask.sum(1).tolist()[:8]} positions",
                    wanted=f"{counts.tolist()[:8]}",
                    remedy="cut and mask texts as when the cache was built",
                )
            value = signal.codec.decode(own_arrays(signal, found), signal.shape, signal.dtype)
            restored = signal.restore(value, counts, len(index), mask)
            if signal.part is None:
                values[signal.tap] = restored
            else:
                values.setdefault(signal.tap, []).append(restored)
        return values

    def prints(self, index: Tensor, view: int | Tensor = 0) -> Tensor:
        """Fingerprints ``[B]`` of what the teacher saw; see :func:`limbeck.cache.prints.row_prints`."""
        return self._gather(index, view, lambda shard, rows: {PRINTS: shard.arrays[PRINTS][rows]})[PRINTS]

    def arrays(self, index: Tensor, view: int | Tensor = 0) -> dict[str, Tensor]:
        """The stored arrays of some rows, one below the other."""
        return self._gather(index, view, self._stored)

    def rows(self, index: Tensor, view: int | Tensor = 0) -> Tensor:
        """Where samples in a view, or in one each, stand in the cache: view after view; on the CPU.

        Raises:
            CacheError: No such sample or view.
        """
        index, views = index.long().cpu(), torch.as_tensor(view).cpu().long()
        for name, value, limit in (("index", index, self.header.samples), ("view", views, self.header.views)):
            if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < limit:
                raise CacheError(
                    "the cache holds no such row",
                    where=f"batch.{name}",
                    found=f"{int(value.min())} to {int(value.max())}",
                    wanted=f"0 to {limit - 1}",
                )
        return views * self.header.samples + index

    def _stored(self, shard: Shard, rows: Tensor) -> dict[str, Tensor]:
        found = {}
        for signal in self.header.signals:
            if signal.counts is not None:
                places = shard.values_of(rows, signal.counts)
                found[signal.counts] = shard.arrays[signal.counts][rows]
            elif signal.values == 1:
                places = rows
            else:
                places = (rows.unsqueeze(1) * signal.values + torch.arange(signal.values)).flatten()
            found.update({n: a.index_select(0, places) for n, a in shard.arrays.items() if owner(n) == signal.name})
        return found

    def _gather(
        self, index: Tensor, view: int | Tensor, take: Callable[[Shard, Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Rows from all shards they lie in, in the order asked for."""
        rows = self.rows(index, view)
        number = rows // self.header.shard_rows
        if len(rows) == 0 or int(number.max()) == int(number.min()):
            first = int(number[0]) if len(rows) else 0
            return take(self._open(first), rows - first * self.header.shard_rows)
        parts, places = [], []
        for own in number.unique().tolist():
            place = (number == own).nonzero()[:, 0]
            parts.append(take(self._open(own), rows[place] - own * self.header.shard_rows))
            places.append(place)
        back, joined = torch.cat(places).argsort(), {n: torch.cat([p[n] for p in parts]) for n in parts[0]}
        counts = {s.name: joined[s.counts].long() if s.counts in joined else s.values for s in self.header.signals}
        return {name: _reorder(array, back, counts.get(owner(name), 1)) for name, array in joined.items()}

    def _open(self, number: int) -> Shard:
        held = getattr(self, "_shards", {})
        if number not in held:
            facts = self.index["shards"][number]
            path = shard_path(self.folder, number)
            same = path.is_file() and file_digest(path) == facts["digest"]
            # where the file is as it was indexed, its own digest says nothing new; else it tells what is wrong
            shard = open_shard(path, header=self.header.digest, number=number, bytes=facts["bytes"], check=not same)
            if not same:
                raise CacheError("this shard is not the one that was indexed", where=str(path))
            held[number] = shard
        return held[number]

    def check(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Look at every bit of every shard.

        Raises:
            CacheError: Something is damaged.
        """
        for number in range(self.header.shards):
            self._open(number)
            if progress is not None:
                progress(number + 1, self.header.shards)

    def _constants(self) -> dict[str, Tensor]:
        if not self.header.constants:
            return {}
        place = self.folder / CONSTANTS
        try:
            content = place.read_bytes()
            found = load_tensors(content)
        except (OSError, SafetensorError) as error:
            raise CacheError("this file is missing or damaged", where=str(place)) from error
        if digest(content) != self.index["constants"]:
            raise CacheError("this file is damaged", where=str(place))
        return found


def owner(array: str) -> str:
    """The signal whose array this is."""
    return array.rpartition("/")[0]


def own_arrays(signal: Signal, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A signal's arrays, by its codec's names."""
    return {name.rpartition("/")[2]: array for name, array in found.items() if owner(name) == signal.name}


def _reorder(values: Tensor, back: Tensor, counts: int | Tensor) -> Tensor:
    """Rows of so many values each, put into another order."""
    if isinstance(counts, Tensor):
        return values[places_of((counts.cumsum(0) - counts)[back], counts[back])]
    return values.view(len(back), counts, *values.shape[1:])[back].flatten(0, 1) if counts != 1 else values[back]
