"""Checkpoints: a folder of safetensors and JSON that is there as a whole or not at all.

    checkpoints/step-00000100/student.safetensors ... state.json      last.json
    best.safetensors  best.json

A checkpoint is written under a temporary name, every file is flushed to the disk, then it is renamed. ``state.json``
holds the checksum of every file and of itself, so damage is found before anything is used. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.errors import CheckpointError
from limbeck.core.files import flush, write_json, write_text

FORMAT = 1
_NAME = re.compile(r"^step-(\d{8,})(?:-(\d+))?$")


@dataclass
class Checkpoint:
    """A checkpoint found whole.

    Args:
        path: Its folder.
        state: What its ``state.json`` says.
        files: Its tensor files.
    """

    path: Path
    state: dict[str, Any]
    files: tuple[str, ...]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, such as ``"student"``; empty where there is no such file."""
        file = f"{name}.safetensors"
        if file not in self.files:
            return {}
        try:
            return load_file(self.path / file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot be read: {error}", where=str(self.path / file)) from None


class Checkpoints:
    """The checkpoints of a run's folder.

    Args:
        folder: The run's folder.
        keep: How many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.root, self.folder, self.keep = folder, folder / "checkpoints", keep

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> Path:
        """Write one checkpoint and point ``last.json`` to it.

        Args:
            step: Steps done over the whole run; names the folder.
            tensors: Tensors by file, then by name.
            state: Everything else, as JSON.
        """
        final = self._free(f"step-{step:08d}")
        temporary = self.folder / f".writing-{final.name}-{os.getpid()}"
        try:
            temporary.mkdir(parents=True)
            for name, values in tensors.items():
                save_file(_alone(values), temporary / f"{name}.safetensors", metadata={"format": "pt"})
                flush(temporary / f"{name}.safetensors")
            files = {f"{name}.safetensors": _fingerprint(temporary / f"{name}.safetensors") for name in tensors}
            body = json.loads(json.dumps({"format": FORMAT, "files": files, "state": state}))
            write_text(
                temporary / "state.json", json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True)
            )
            flush(temporary)
            temporary.rename(final)
            flush(self.folder)
            write_json(self.root / "last.json", {"checkpoint": final.name, "step": step})
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"cannot be written: {error}", where=str(final)) from error
        self._prune()
        return final

    def _free(self, name: str) -> Path:
        """A name of this step that no folder has: what was once written is never written over."""
        taken, number = set(self.names()), 0
        while (full := f"{name}-{number}" if number else name) in taken:
            number += 1
        return self.folder / full

    def names(self) -> list[str]:
        """Folders that claim to be checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        found = [(m, p.name) for p in self.folder.iterdir() if p.is_dir() and (m := _NAME.match(p.name))]
        return [name for _, name in sorted(((int(m[1]), int(m[2] or 0)), name) for m, name in found)][::-1]

    def newest(self) -> tuple[Checkpoint | None, list[CheckpointError]]:
        """The newest whole checkpoint, and what is wrong with those newer than it.

        Raises:
            CheckpointError: There are checkpoints, and none is whole.
        """
        damaged: list[CheckpointError] = []
        for name in self.names():
            try:
                return self.read(name), damaged
            except CheckpointError as error:
                damaged.append(error)
        if damaged:
            raise CheckpointError(
                f"no checkpoint is whole; the newest: {damaged[0]}",
                where=str(self.folder),
                remedy="start again in another folder",
            )
        return None, []

    def read(self, name: str) -> Checkpoint:
        """One checkpoint, once every file in it is found to be as it was written.

        Raises:
            CheckpointError: A file is missing or damaged; the message names it.
        """
        path = self.folder / name
        body = _read_state(path / "state.json")
        for file, wanted in body["files"].items():
            if not (path / file).is_file():
                raise CheckpointError("this file of a checkpoint is missing", where=str(path / file))
            try:
                found = _fingerprint(path / file)
            except OSError as error:
                problem = f"this file of a checkpoint cannot be read: {error.strerror}"
                raise CheckpointError(problem, where=str(path / file)) from None
            if found != wanted:
                raise CheckpointError(
                    "this file of a checkpoint is damaged",
                    where=str(path / file),
                    found=f"{found['bytes']} bytes, blake2b {found['blake2b'][:12]}",
                    wanted=f"{wanted['bytes']} bytes, blake2b {wanted['blake2b'][:12]}",
                )
        return Checkpoint(path, body["state"], tuple(body["files"]))

    def clean(self) -> None:
        """Remove what a killed process left half written."""
        if self.folder.is_dir():
            for path in self.folder.glob(".writing-*"):
                shutil.rmtree(path, ignore_errors=True)

    def save_best(self, student: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Write the best weights so far, ``best.safetensors``; ``best.json`` says why they are, and their checksum."""
        file = self.root / "best.safetensors"
        temporary = self.root / f".best-{os.getpid()}.safetensors"
        try:
            save_file(_alone(student), temporary, metadata={"format": "pt"})
            flush(temporary)
            fingerprint = _fingerprint(temporary)
            os.replace(temporary, file)
            write_json(self.root / "best.json", {**facts, **fingerprint})
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(f"cannot be written: {error}", where=str(file)) from error

    def best(self, step: int) -> dict[str, Tensor]:
        """The best weights, which are those of this step.

        Raises:
            CheckpointError: They are missing, damaged, or of another step.
        """
        file = self.root / "best.safetensors"
        try:
            facts = json.loads((self.root / "best.json").read_bytes())
            sound = facts["step"] == step and _fingerprint(file).items() <= facts.items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise CheckpointError(f"the best weights, of step {step}, are missing or damaged", where=str(file))
        return load_file(file)

    def _prune(self) -> None:
        for name in self.names()[self.keep :]:
            going = self.folder / f".writing-{name}-old"  # a kill must not leave half a folder under its name
            (self.folder / name).rename(going)
            shutil.rmtree(going, ignore_errors=True)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
        checksum = body.pop("checksum")
        sound = checksum == _checksum(body)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"this file of a checkpoint cannot be read: {problem}", where=str(path)) from None
    if not sound:
        raise CheckpointError("this file of a checkpoint is damaged", where=str(path), found="another checksum")
    if body["format"] != FORMAT:
        raise CheckpointError("written in another format", where=str(path), found=body["format"], wanted=FORMAT)
    return body


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=32).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
    return {"bytes": path.stat().st_size, "blake2b": digest}


def _alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: dense, and none sharing memory with another."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        if tensor.numel():
            place = tensor.untyped_storage().data_ptr()
            if place in seen or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result
