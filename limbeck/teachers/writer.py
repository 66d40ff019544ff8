"""A teacher at hand that writes texts, each once: what it wrote is on disk before anybody sees it."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import ConfigError
from limbeck.core.hashing import key, key_tensor
from limbeck.core.plain import canonical, digest
from limbeck.models.generating import Decoding, check_writes, write
from limbeck.teachers.journal import Reader, Writer, body_of, damaged, pack

_FORMAT, _DRAWS = 1, 22
_LOOK = 0.1  # seconds between looks at what other processes have written

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Wrote:
    """One text that a teacher wrote after a prompt.

    Args:
        finished: It came to an end by itself.
        ids: Its tokens, the end included; ``None`` where only the text is known.
        text: What it says; ``None`` where only the tokens are known.
        score: Its log-probability, where beams were searched.
    """

    finished: bool
    ids: tuple[int, ...] | None = None
    text: str | None = None
    score: float | None = None


class ModelWriter:
    """Has a transformers model write after prompts, and keeps every answer in a folder.

    Prompts are answered in chunks of like length, which follow from all prompts together. A chunk is one line of a
    file, written whole and flushed: after a kill, chunks that are there are not written again, and the others are
    written with the same neighbours as in a run that was not interrupted, so that arithmetic rounds them alike. In
    distributed runs every process writes its share of the chunks and reads those of the others.

    Args:
        model: Of transformers, on the device where it shall write.
        decoding: How it writes.
        ends, pad: Ids that end a text, and the one that fills up.
        folder: Where answers are kept; ``None``: nowhere.
        identity: What tells the model from others: answers of another one are not taken.
        batch_size: Prompts of a chunk.
        seed: Of drawing.
        decode: Makes texts of ids, for who reads the files; ``None``: they hold ids alone.
        draws: Answers to each prompt, where chance has a part in them.

    Raises:
        ModelError: It does not write texts.
        DataError: A line of the record is damaged.
    """

    def __init__(
        self,
        model: nn.Module,
        decoding: Decoding,
        *,
        ends: Sequence[int],
        pad: int,
        folder: str | Path | None = None,
        identity: str = "",
        batch_size: int = 16,
        seed: int = 0,
        decode: Callable[[Sequence[int]], str] | None = None,
        draws: int = 1,
    ) -> None:
        check_writes(model, "teacher")
        for name, value in (("batch_size", batch_size), ("draws", draws)):
            if value < 1:
                raise ConfigError("must be 1 or more", where=name, found=value)
        if draws > 1 and not decoding.draws:
            raise ConfigError("only what is drawn can be drawn several times", where="draws", found=draws, wanted=1)
        self.model, self.decoding, self.ends, self.pad = model, decoding, list(ends), pad
        self.batch_size, self.seed, self.decode, self.draws = batch_size, seed, decode, draws
        self.folder = None if folder is None else Path(folder)
        self.asked = 0  # prompts that were answered by this process
        self._about = {"format": _FORMAT, "model": identity, "decoding": asdict(decoding), "ends": self.ends}
        if decoding.draws:
            self._about["seed"] = seed
        if draws > 1:
            self._about["draws"] = draws
        self._readers: dict[Path, Reader] = {}
        self._known: dict[str, list[list[Wrote]]] = {}
        self._writer: Writer | None = None

    def write(self, prompts: Sequence[Prompt]) -> list[list[Wrote]]:
        """Answers to each prompt, the best first; two equal prompts are answered once."""
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if self.folder is None:
            rank, world = 0, 1
        order = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
        size = max(1, self.batch_size // self.draws)
        chunks = [order[first : first + size] for first in range(0, len(order), size)]
        names = [self._name(chunk) for chunk in chunks]
        self._refresh()
        try:
            for number, (name, chunk) in enumerate(zip(names, chunks, strict=True)):
                if name not in self._known and number % world == rank:
                    self._keep(name, chunk, self._answer(chunk))
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
        while not all(name in self._known for name in names):
            time.sleep(_LOOK)
            self._refresh()
        found = {
            p: a for n, chunk in zip(names, chunks, strict=True) for p, a in zip(chunk, self._known[n], strict=True)
        }
        return [found[prompt] for prompt in prompts]

    def _name(self, chunk: Sequence[Prompt]) -> str:
        return digest(canonical({**self._about, "prompts": [list(prompt) for prompt in chunk]}))

    def _answer(self, chunk: Sequence[Prompt]) -> list[list[Wrote]]:
        asked = [(prompt, draw) for prompt in chunk for draw in range(self.draws)]
        rows = []
        for first in range(0, len(asked), self.batch_size):
            rows += self._rows(asked[first : first + self.batch_size])
        self.asked += len(chunk)
        several = self.decoding.keep * self.draws
        return [rows[first : first + several] for first in range(0, len(rows), several)]

    def _rows(self, asked: Sequence[tuple[Prompt, int]]) -> list[Wrote]:
        device = next(self.model.parameters()).device
        width = max(len(prompt) for prompt, _ in asked)
        ids = torch.tensor([[self.pad] * (width - len(p)) + list(p) for p, _ in asked])
        mask = torch.arange(width) >= width - torch.tensor([[len(p)] for p, _ in asked])
        keys = key_tensor([key(_DRAWS, self.seed + draw, *prompt) for prompt, draw in asked], device)
        found = write(
            self.model,
            ids.to(device),
            mask.to(device),
            self.decoding,
            ends=self.ends,
            pad=self.pad,
            keys=keys,
            where="teacher",
        )
        scores = [None] * len(found.ids) if found.scores is None else found.scores.tolist()
        return [
            Wrote(finished, tuple(ids[:length]), self._text(ids[:length], finished), score)
            for ids, length, finished, score in zip(
                found.ids.tolist(), found.lengths.tolist(), found.finished.tolist(), scores, strict=True
            )
        ]

    def _text(self, ids: Sequence[int], finished: bool) -> str | None:
        return None if self.decode is None else self.decode(ids[:-1] if finished else ids)

    def _keep(self, name: str, chunk: Sequence[Prompt], answers: list[list[Wrote]]) -> None:
        if self.folder is not None:
            if self._writer is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._writer = Writer(self.folder / f"texts-{secrets.token_hex(6)}.jsonl")
            body = [{"prompt": list(p), "wrote": [asdict(w) for w in a]} for p, a in zip(chunk, answers, strict=True)]
            self._writer.add(pack({"key": name}, body))
            self._writer.sync()
        self._known[name] = answers

    def _refresh(self) -> None:
        """Read what was added to the folder; a line that a kill cut short is nothing."""
        if self.folder is None:
            return
        for path in sorted(self.folder.glob("texts-*.jsonl")):
            reader = self._readers.setdefault(path, Reader(path))
            for line in reader.news():
                if line.head["key"] not in self._known:
                    self._known[line.head["key"]] = _read(path, line.offset, line.length)


def _read(path: Path, offset: int, length: int) -> list[list[Wrote]]:
    with path.open("rb") as file:
        file.seek(offset)
        raw = file.read(length)
    try:
        body: list[dict[str, Any]] = body_of(raw)
    except (ValueError, json.JSONDecodeError) as error:
        raise damaged(path, f"the one at byte {offset}") from error
    return [[Wrote(**{**wrote, "ids": tuple(wrote["ids"])}) for wrote in row["wrote"]] for row in body]
