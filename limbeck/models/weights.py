"""Weights to and from files: safetensors, and torch's own files where they hold nothing but tensors."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.core.errors import LimbeckError, ModelError
from limbeck.core.files import flush

_IN_FOLDER = ("student.safetensors", "model.safetensors")
_NESTINGS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile
_SHOWN = 5


class Misfits(NamedTuple):
    """Names that a lenient :func:`load_weights` passed over."""

    missing: list[str]
    unexpected: list[str]


def load_weights(model: nn.Module, path: str | os.PathLike[str], strict: bool = True) -> Misfits:
    """Copy the weights in a file into a model.

    Reads ``.safetensors``; a folder with ``student.safetensors`` (a limbeck run or checkpoint) or
    ``model.safetensors``; and ``.pt`` or ``.pth`` files that hold only tensors, plain or under ``state_dict``,
    ``model_state_dict``, ``model`` or ``net``. A prefix ``module.`` or ``_orig_mod.`` on all names is dropped. The
    zoo's models also read the names under which the distillation papers' CIFAR teachers are published.

    Args:
        model: Where the weights go; it is left as it was when they do not fit.
        path: File or folder.
        strict: Every name must be on both sides. Otherwise names on one side only are passed over; shapes must
            agree in any case, and at least one name must.

    Returns:
        The names passed over; both lists are empty if ``strict``.

    Raises:
        ModelError: No such file, a damaged file, or weights that do not fit.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_weights(nn.Linear(2, 3), folder.name + "/model.safetensors")
        >>> load_weights(nn.Linear(2, 3), folder.name)
        Misfits(missing=[], unexpected=[])
    """
    file = _find(Path(path))
    found = _read(file)
    own = _own(model)
    twins = _twins(own)
    found = _rename(found, set(own), getattr(model, "foreign_names", ()))
    present = {twins.get(name, name) for name in found}
    missing = [name for name in own if twins.get(name, name) not in present and not _is_counter(name, found)]
    unexpected = [name for name in found if name not in own]
    common = [name for name in found if name in own]
    shapes = [name for name in common if found[name].shape != own[name].shape]
    if shapes or (strict and (missing or unexpected)) or not common:
        raise _do_not_fit(file, found, own, missing, unexpected, shapes)
    with torch.no_grad():
        model.load_state_dict({name: found[name] for name in common}, strict=False)
    return Misfits(missing, unexpected)


def save_weights(model: nn.Module, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write a model's weights as safetensors, at once or not at all.

    Tensors that share their memory are written once, under the first of their names. The file is written beside its
    place under a temporary name, flushed to the disk and then renamed, so a crash leaves the old file or the new one.

    Args:
        model: Whose ``state_dict`` is written.
        path: The file, ending in ``.safetensors``; its folder is made if need be.
        metadata: Texts for the file's header.

    Raises:
        ModelError: The state dict holds something other than tensors, or the file cannot be written.
    """
    path = Path(path)
    own = _own(model)
    twins = _twins(own)
    tensors = {name: _alone(tensor) for name, tensor in own.items() if name not in twins}
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        mode = os.fstat(handle).st_mode
        os.close(handle)
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        flush(Path(temporary))
        os.chmod(temporary, mode | 0o044)
        os.replace(temporary, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"these weights cannot be written: {error}", where=str(path)) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _own(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ModelError("safetensors holds only tensors", where=name, found=kind, remedy="register a buffer")
    return state


def _twins(state: dict[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are an earlier tensor over again (tied weights), to the name of that one."""
    first: dict[tuple[Any, ...], str] = {}
    twins = {}
    for name, tensor in state.items():
        if tensor.numel() and tensor.device.type != "meta":
            key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if key in first:
                twins[name] = first[key]
            else:
                first[key] = name
    return twins


def _alone(tensor: Tensor) -> Tensor:
    """The tensor laid out in order, in memory of its own size: a file holds no views."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in _IN_FOLDER:
            if (path / name).is_file():
                return path / name
        there = ", ".join(sorted(p.name for p in path.iterdir())[:_SHOWN]) or "nothing"
        raise ModelError("no weights in this folder", where=str(path), found=there, wanted=" or ".join(_IN_FOLDER))
    if not path.is_file():
        raise ModelError("there is no such file", where=str(path), remedy="check the path")
    return path


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix in (".pt", ".pth"):
            return _tensors(torch.load(path, map_location="cpu", weights_only=True), path)
    except pickle.UnpicklingError as error:
        remedy = "save model.state_dict() alone; whole models are not unpickled, since that can run any code"
        raise ModelError("this file holds more than tensors, or is damaged", where=str(path), remedy=remedy) from error
    except LimbeckError:
        raise
    except Exception as error:  # torch's reader raises what it likes on damaged bytes
        first = str(error).strip().splitlines()[:1]
        reason = "".join(first) or type(error).__name__
        remedy = "copy or download it again"
        raise ModelError(f"this file is damaged or truncated ({reason})", where=str(path), remedy=remedy) from error
    wanted = ".safetensors, .pt, .pth or a folder"
    raise ModelError("no such kind of weights file", where=str(path), found=path.suffix or "no suffix", wanted=wanted)


def _tensors(value: Any, path: Path) -> dict[str, Tensor]:
    """The first mapping of names to tensors in a checkpoint, looking under the usual names."""
    if isinstance(value, Mapping):
        if value and all(isinstance(v, Tensor) for v in value.values()):
            return {str(name): tensor for name, tensor in value.items()}
        for key in _NESTINGS:
            if isinstance(value.get(key), Mapping):
                return _tensors(value[key], path)
    found = f"keys {', '.join(map(str, list(value)[:_SHOWN]))}" if isinstance(value, Mapping) else type(value).__name__
    raise ModelError(
        "no weights in this file", where=str(path), found=found, wanted=f"names to tensors, alone or under {_NESTINGS}"
    )


def _rename(found: dict[str, Tensor], own: set[str], foreign: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    for prefix in _PREFIXES * 2:  # they nest in either order
        wrapped = bool(found) and all(name.startswith(prefix) for name in found)
        if wrapped and not any(name.startswith(prefix) for name in own):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    translated = {_translate(name, foreign): tensor for name, tensor in found.items()}
    better = len(own & translated.keys()) > len(own & found.keys())
    return translated if better else found


def _is_counter(name: str, found: dict[str, Tensor]) -> bool:
    """The step counter of a batch normalisation whose statistics are there: old files lack it, it changes nothing."""
    stem, _, last = name.rpartition(".")
    return last == "num_batches_tracked" and f"{stem}.running_mean".removeprefix(".") in found


def _translate(name: str, foreign: tuple[tuple[str, str], ...]) -> str:
    """A name by the first rule that knows it, applied once; rules may exchange names."""
    for pattern, replacement in foreign:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _do_not_fit(
    file: Path,
    found: dict[str, Tensor],
    own: dict[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
) -> ModelError:
    pairs = [f"{name} {list(found[name].shape)} in the file, {list(own[name].shape)} in the model" for name in shapes]
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", pairs))
        if names
    ]
    message = "these weights do not fit the model: " + "; ".join(parts or ["the file holds no tensors"])
    remedy = "check the model's name, num_classes and options"
    if missing and all(".shortcut." in name for name in missing) and not unexpected:
        remedy = "they are of a net with option A shortcuts: write resnet{depth}_a"
    return ModelError(message, where=str(file), remedy=remedy)
