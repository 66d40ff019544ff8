"""Build a cache: ask the teacher about every sample in every view, shard by shard, from wherever it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor, nn

from limbeck.cache.codecs import Codec, parse_codec
from limbeck.cache.folder import Cache
from limbeck.cache.header import CONSTANTS, HEADER, INDEX, Header, read_header, sealed
from limbeck.cache.prints import describe_teacher, describe_views, row_prints
from limbeck.cache.shards import PRINTS, Shard, open_shard, shard_path, write_shard
from limbeck.cache.signals import Signal, signals_of
from limbeck.core.batch import Batch
from limbeck.core.errors import CacheError, ConfigError
from limbeck.core.files import write_bytes
from limbeck.core.plain import file_digest
from limbeck.core.teacher import FrozenTeacher, Teacher, as_teacher, teacher_mask
from limbeck.core.trace import Trace
from limbeck.data.loader import IndexedLoader

Progress = Callable[[int, int], None]
CodecSpec = Codec | str | Mapping[str, Any]

SHARD_BYTES, SHARD_ROWS = 32 << 20, 16_384  # whichever is less: a killed builder loses one shard's work at most
HALF: Mapping[str, Any] = {"raw": {"dtype": "float16"}}
_WAIT = 0.2  # seconds between looks at what other builders are at


def build(
    teacher: nn.Module | Teacher,
    loader: IndexedLoader,
    folder: str | Path,
    *,
    store: Sequence[str] | Mapping[str, CodecSpec] = ("logits",),
    views: int = 1,
    batch: int = 128,
    shard_rows: int | None = None,
    logits: str | None = None,
    identity: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    part: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Cache | None:
    """Store what a teacher says of every sample, in one or more views of it.

    Shards are written at once under their final names, so that a builder killed at any moment leaves whole shards and
    nothing else; calling it again goes on. Several builders may work on one folder: each takes shards that no other is
    at. Whoever comes last writes the index. The folder is the same, byte for byte, whoever built it and however often
    he was killed.

    Args:
        teacher: A module, or anything that answers like a ``Teacher``.
        loader: Of the samples, with the augmentation that the student will see; batches and order play no part.
        folder: Of the cache; made where it is not there.
        store: Taps to store, with a codec each; without one, half precision (``raw``). A mapping names others:
            ``{"logits": {"top_k": {"k": 50}}}``.
        views: Of each sample.
        batch: Samples the teacher sees at once.
        shard_rows: Rows of a shard; default as many as 32 MiB hold, at most 16384.
        logits: Where logits stand in a module's output.
        identity: What tells a teacher that is no module.
        origin: How a recipe names it.
        part: ``(i, n)``: build every n-th shard only, from the i-th on, for :func:`merge`; nothing is finished.
        progress: Told rows done and rows in all after each batch.

    Returns:
        The finished cache; ``None`` where a part was asked for.

    Raises:
        CacheError: The folder holds a cache of another teacher, of other data or with other settings.

    >>> import tempfile
    >>> from limbeck.data import ResidentLoader
    >>> loader = ResidentLoader(torch.randn(10, 4), batch_size=5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = build(nn.Linear(4, 3), loader, folder)
    ...     cache.read(torch.tensor([7, 2]))["logits"].shape
    torch.Size([2, 3])
    """
    folder, judge = Path(folder), as_teacher(teacher, logits)
    if views < 1 or batch < 1:
        raise ConfigError("must be positive whole numbers", where="views, batch", found=f"{views}, {batch}")
    if part is not None and not 0 <= part[0] < part[1]:
        raise ConfigError("no such part", where="part", found=part, wanted="(i, n) with 0 <= i < n")
    told = describe_teacher(judge.model, logits) if isinstance(judge, FrozenTeacher) else dict(identity or {})
    wanted = store if isinstance(store, Mapping) else dict.fromkeys(store, HALF)
    taps, data = tuple(wanted), describe_views(loader)
    (example,) = loader.read([[(torch.arange(min(2, loader.samples), device=loader.device), 0)]])
    judge.to(loader.device)
    judge.attach(taps, example)
    signals, constants = _stored(judge(example), example, wanted)
    header = Header(
        data=data,
        views=views,
        teacher=told,
        signals=signals,
        constants=tuple(constants),
        origin=None if origin is None else dict(origin),
        batch=batch,
        shard_rows=shard_rows or _rows(signals, judge(example), example, batch),
        made_with={name: version(name) for name in ("limbeck", "torch")},
    )
    builder = Builder(folder, header, lambda seen: judge(seen), loader, progress)
    builder.begin(save(constants))
    if part is not None:
        builder.work(range(part[0], header.shards, part[1]))
        return None
    builder.work(range(header.shards))
    return builder.finish()


def merge(folder: str | Path, parts: Sequence[str | Path]) -> Cache:
    """Put together what several builders wrote into folders of their own.

    Args:
        folder: Of the whole cache.
        parts: Folders that :func:`build` left for ``part``.

    Raises:
        CacheError: They are of different caches, or shards are missing or damaged.
    """
    folder, sources = Path(folder), [Path(p) for p in parts]
    if not sources:
        raise ConfigError("nothing to merge", where="parts")
    header = read_header(sources[0])
    for source in sources[1:]:
        header.refuse_other(read_header(source).written(), f"kind than that in {sources[0]}")
    builder = Builder(folder, header)
    place = sources[0] / CONSTANTS
    builder.begin(place.read_bytes() if header.constants else b"")
    for number in range(header.shards):
        holders = [s for s in [folder, *sources] if shard_path(s, number).is_file()]
        if not holders:
            raise CacheError("none of the parts holds this shard", where="parts", found=f"shard {number}")
        if holders[0] != folder:
            path = shard_path(holders[0], number)
            open_shard(path, header=header.digest, number=number)
            write_bytes(shard_path(folder, number), path.read_bytes())
    return builder.finish()


class Builder:
    """Writes the shards of one folder.

    Args:
        folder: Of the cache.
        header: Of the cache.
        ask: The teacher, ready to answer.
        loader: Gives what it is asked about.
        progress: Told rows done and in all.
    """

    def __init__(
        self,
        folder: Path,
        header: Header,
        ask: Callable[[Batch], Trace] | None = None,
        loader: IndexedLoader | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.folder, self.header, self.ask, self.loader, self.progress = folder, header, ask, loader, progress
        self.whole: dict[int, Shard] = {}  # shards that were looked at
        self.done = 0  # rows

    def begin(self, constants: bytes) -> None:
        """Write the header, or see that it is the one which is there."""
        if (self.folder / HEADER).is_file():
            there = read_header(self.folder)
            there.refuse_other(self.header.written(), "kind")
            self.header = there  # with the versions it was begun with
        else:
            if self.header.constants:
                write_bytes(self.folder / CONSTANTS, constants)
            write_bytes(self.folder / HEADER, sealed(self.header.written()))

    def work(self, numbers: range) -> None:
        """Write those of these shards that are not there, but for what other builders are at; then wait for them."""
        missing = [n for n in numbers if not self._there(n)]
        self._tell(sum(len(self.header.shard(n)) for n in self.whole))
        while missing:
            left = []
            for number in missing:
                lock = FileLock(self._lock(number))
                try:
                    with lock.acquire(timeout=0):
                        if not self._there(number):
                            self._write(number)
                except Timeout:
                    left.append(number)
            if len(left) == len(missing):
                time.sleep(_WAIT)
            missing = [n for n in left if not self._there(n)]

    def finish(self) -> Cache:
        """Write the index, once every shard is there."""
        facts: list[dict[str, Any]] = []
        sums: dict[str, dict[str, list[float]]] = {}
        for number in range(self.header.shards):
            shard = self.whole.get(number) or self._open(number)
            facts.append({"bytes": shard.path.stat().st_size, "digest": file_digest(shard.path)})
            for signal, measures in shard.facts["errors"].items():
                for measure, (total, count, most) in measures.items():
                    held = sums.setdefault(signal, {}).setdefault(measure, [0.0, 0, 0.0])
                    sums[signal][measure] = [held[0] + total, held[1] + count, max(held[2], most)]
        errors = {
            signal: {m: {"mean": total / max(count, 1), "max": most} for m, (total, count, most) in measures.items()}
            for signal, measures in sums.items()
        }
        index = {"header": self.header.digest, "shards": facts, "errors": errors}
        if self.header.constants:
            index["constants"] = file_digest(self.folder / CONSTANTS)
        write_bytes(self.folder / INDEX, sealed(index))
        for left in (self.folder / _LOCKS).glob("*"):
            left.unlink(missing_ok=True)
        if (self.folder / _LOCKS).is_dir():
            (self.folder / _LOCKS).rmdir()
        return Cache(self.folder)

    def _lock(self, number: int) -> Path:
        (self.folder / _LOCKS).mkdir(exist_ok=True)
        return self.folder / _LOCKS / str(number)

    def _there(self, number: int) -> bool:
        """Whether a shard is there and whole; a damaged one is removed, as its builder's work is to be done again."""
        if number in self.whole:
            return True
        path = shard_path(self.folder, number)
        if not path.is_file():
            return False
        try:
            self.whole[number] = self._open(number)
        except CacheError:
            path.unlink(missing_ok=True)
            return False
        return True

    def _open(self, number: int) -> Shard:
        return open_shard(shard_path(self.folder, number), header=self.header.digest, number=number)

    def _write(self, number: int) -> None:
        rows = self.header.shard(number)
        arrays: dict[str, list[Tensor]] = {}
        errors: dict[str, dict[str, list[float]]] = {}
        for seen in self._batches(rows):
            assert self.ask is not None
            found, lost = encode(self.header.signals, self.ask(seen), seen)
            for name, array in found.items():
                arrays.setdefault(name, []).append(array)
            for signal, measures in lost.items():
                for measure, values in measures.items():
                    held = errors.setdefault(signal, {}).setdefault(measure, [0.0, 0, 0.0])
                    most = float(values.max()) if len(values) else 0.0
                    held[:] = [held[0] + float(values.double().sum()), held[1] + len(values), max(held[2], most)]
            self._tell(seen.size)
        facts = {"header": self.header.digest, "shard": number, "errors": errors}
        write_shard(shard_path(self.folder, number), {n: torch.cat(parts) for n, parts in arrays.items()}, facts)
        self.whole[number] = self._open(number)

    def _batches(self, rows: range) -> Iterator[Batch]:
        assert self.loader is not None
        wanted = []
        for start in range(rows.start, rows.stop, self.header.batch):
            own = range(start, min(start + self.header.batch, rows.stop))
            pieces = []
            for view in range(own.start // self.header.samples, (own.stop - 1) // self.header.samples + 1):
                first = view * self.header.samples
                index = torch.arange(max(own.start, first), min(own.stop, first + self.header.samples)) - first
                pieces.append((index.to(self.loader.device), view))
            wanted.append(pieces)
        return self.loader.read(wanted)

    def _tell(self, rows: int) -> None:
        self.done += rows
        if self.progress is not None:
            self.progress(self.done, self.header.rows)


_LOCKS = "building"


def encode(
    signals: Sequence[Signal], trace: Trace, batch: Batch
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A batch's arrays as shards hold them, and what each codec lost, by signal and measure."""
    arrays, errors, mask = {PRINTS: row_prints(batch).cpu()}, {}, teacher_mask(batch)
    for signal in signals:
        value = signal.of(trace)
        counts = signal.count(value, mask)
        if counts is not None:
            arrays[signal.counts or ""] = counts
        rows = signal.flatten(value, mask).cpu()
        stored = signal.codec.encode(rows)
        arrays.update({f"{signal.name}/{name}": array for name, array in stored.items()})
        errors[signal.name] = signal.lost(rows, signal.codec.decode(stored, signal.shape, signal.dtype))
    return arrays, errors


def _stored(
    trace: Trace, example: Batch, wanted: Mapping[str, CodecSpec]
) -> tuple[tuple[Signal, ...], dict[str, Tensor]]:
    """What is stored of each sample, and what is the same for all."""
    modules = [tap for tap in wanted if tap.endswith("@module")]
    if modules:
        raise CacheError("a module cannot be stored", where="signals", found=", ".join(modules))
    constants = {tap: trace[tap].detach().cpu().contiguous() for tap in wanted if tap.endswith(("@weight", "@bias"))}
    signals = [
        signal
        for tap, spec in wanted.items()
        if tap not in constants
        for signal in signals_of(tap, trace[tap], parse_codec(spec), teacher_mask(example))
    ]
    if not signals:
        raise ConfigError("nothing to store", where="signals")
    return tuple(signals), constants


def _rows(signals: tuple[Signal, ...], trace: Trace, example: Batch, batch: int) -> int:
    """Rows of a shard: whole batches of the teacher, within the limits of a shard."""
    arrays, _ = encode(signals, trace, example)
    size = max(1, sum(a.nbytes for a in arrays.values()) // example.size)
    return max(1, min(SHARD_ROWS, SHARD_BYTES // size) // batch) * batch
