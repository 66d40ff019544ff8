"""One door to every kind of data."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError, LimbeckError, did_you_mean
from limbeck.core.importing import current_folder_on_path
from limbeck.data.language.source import language_source
from limbeck.data.sources.digits import digits
from limbeck.data.sources.folder import image_folder
from limbeck.data.sources.hub import hub
from limbeck.data.sources.parquet import parquet
from limbeck.data.sources.source import SPLITS, VALIDATION, DataSource, complete, split_name
from limbeck.data.sources.split import DatasetSplit, Split, StreamSplit, TensorSplit

_KINDS = (
    "'digits', a folder or Parquet file, text with a tokenizer, 'hf:NAME', 'package.module:function', tensors, "
    "a Dataset or a DataLoader"
)


def load_source(spec: Any, **options: Any) -> DataSource:
    """Describe data by its splits; nothing large is read before it is needed.

    =============================  ==================================================================================
    spec                           is
    =============================  ==================================================================================
    ``"digits"``                   :func:`~limbeck.data.digits`
    folder or file of Parquet, CSV :func:`~limbeck.data.parquet`
    folder of class folders        :func:`~limbeck.data.image_folder`
    ``"hf:NAME"``                  :func:`~limbeck.data.hub`
    ``"package.module:function"``  what the function returns for the options: anything of this table
    ``(inputs, labels)``           :func:`~limbeck.data.tensors`
    ``Dataset``                    map-style: its samples; iterable: as it comes
    ``DataLoader``, iterable       its batches, in its own order
    any text, with ``tokenizer``   :func:`~limbeck.data.language.language_source`: JSON lines, Parquet, ``hf:``, lists
    ``{"train": ..., ...}``        one of the above for ``train``, ``validation`` and ``test``
    ``DataSource``                 itself
    =============================  ==================================================================================

    Where there is no validation split, 10 % of every class of train are held out for it, chosen by a hash of the seed
    (options ``validation`` and ``seed``; ``validation=0`` holds out nothing). Iterables and DataLoaders cannot be
    split.

    Args:
        spec: See above.
        options: Of the kind of source.

    Raises:
        DataError: What is there cannot be read.
        ConfigError: The source has no such option.

    Example:
        >>> import torch
        >>> load_source((torch.zeros(20, 3), torch.arange(20) % 2)).samples
        {'train': 18, 'validation': 2}
    """
    if isinstance(spec, DataSource):
        return _call(lambda: spec, "a DataSource", options)
    if _is_text(spec, options):
        return _call(lambda **o: language_source(spec, **o), "text", options, like=language_source)
    if isinstance(spec, (str, Path)):
        return _named(str(spec), options)
    if isinstance(spec, Mapping) and spec and all(isinstance(k, str) and split_name(k) for k in spec):
        return _call(lambda **o: _parts(spec, **o), "a dict of splits", options, like=complete)
    return _call(lambda **o: complete(_name_of(spec), {"train": as_split(spec)}, **o), "data", options, like=complete)


def tensors(
    inputs: Any,
    labels: Tensor | None = None,
    *,
    test: tuple[Any, Tensor] | None = None,
    classes: Sequence[str] | None = None,
    normalise: str = "none",
    task: str = "classification",
    validation: float = VALIDATION,
    seed: int = 0,
) -> DataSource:
    """Data in tensors.

    Args:
        inputs: ``[N, ...]``, or a dict or tuple of such tensors: image bytes, features, tokens.
        labels: ``[N]`` classes, or any targets with a row for each sample.
        test: Inputs and labels of the test split.
        classes: Names.
        normalise: Name of the images' normalisation where the loader is given none.
        task: What the labels mean; see :data:`limbeck.data.TASKS`.
        validation: Fraction of every class held out; 0 holds out nothing.
        seed: Of what is held out.

    Example:
        >>> import torch
        >>> tensors(torch.zeros(20, 3), torch.arange(20) % 2, validation=0.2).samples
        {'train': 16, 'validation': 4}
    """
    names = None if classes is None else tuple(classes)
    known: dict[str, Any] = {"classes": names, "normalise": normalise, "task": task}
    splits: dict[str, Split] = {"train": TensorSplit(inputs, labels=labels, **known)}
    if test is not None:
        splits["test"] = TensorSplit(test[0], labels=test[1], **known)
    return complete("tensors", splits, validation=validation, seed=seed)


def as_split(data: Any) -> Split:
    """One split of what a user has in hand: a split, tensors, a Dataset, a DataLoader, or any iterable of batches."""
    if isinstance(data, Split):
        return data
    if isinstance(data, Tensor):
        return TensorSplit(data)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        return TensorSplit(data[0], labels=data[1])
    if type(data) is TensorDataset and len(data.tensors) in (1, 2):
        return TensorSplit(data.tensors[0], labels=data.tensors[1] if len(data.tensors) == 2 else None)
    if isinstance(data, (DataLoader, IterableDataset)):
        return StreamSplit(data)
    if isinstance(data, (str, bytes, Mapping, Batch, DataSource)) or data is None:
        raise DataError("this is no data set", where="data", found=type(data).__name__, wanted=_KINDS)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return DatasetSplit(data)
    if isinstance(data, Iterable) and iter(data) is not data:
        return StreamSplit(data)
    raise DataError(
        "this is no data set",
        where="data",
        found=type(data).__name__,
        wanted=_KINDS,
        remedy="a generator can be walked through only once: wrap it in a torch IterableDataset",
    )


def _is_text(spec: Any, options: Mapping[str, Any]) -> bool:
    """Whether data are text to be learned by a causal language model: options name a tokenizer, or the file is text."""
    if not isinstance(spec, (str, Path)):
        return "tokenizer" in options
    path = Path(spec).expanduser()
    if path.suffix in (".jsonl", ".txt") and path.is_file():
        if "tokenizer" not in options:
            remedy = "give the option tokenizer: a folder, bytes, or {bpe: SIZE}"
            raise ConfigError("text needs a tokenizer", where=str(spec), remedy=remedy)
        return True
    return "tokenizer" in options and (str(spec).startswith("hf:") or path.exists())


def _named(spec: str, options: dict[str, Any]) -> DataSource:
    if spec == "digits":
        return _call(digits, spec, options)
    if spec.startswith("hf:"):
        return _call(lambda **o: hub(spec[3:], **o), spec, options, like=hub)
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix in (".parquet", ".csv"):
        return _call(lambda **o: parquet(path, **o), spec, options, like=parquet)
    if path.is_dir():
        if any(any(path.glob(f"{place}*.{kind}")) for place in ("", "data/") for kind in ("parquet", "csv")):
            return _call(lambda **o: parquet(path, **o), spec, options, like=parquet)
        if any(p.is_dir() for p in path.iterdir()):
            return _call(lambda **o: image_folder(path, **o), spec, options, like=image_folder)
        raise DataError(
            "nothing to read in this folder", where=spec, wanted="train.parquet, or one sub-folder of images a class"
        )
    module, colon, function = spec.partition(":")
    if colon and all(part.isidentifier() for part in [*module.split("."), *function.split(".")]):
        return _imported(spec, options)
    raise DataError(
        "there is no such data", where="data", found=repr(spec), wanted=_KINDS, remedy=did_you_mean(spec, ["digits"])
    )


def _call(function: Callable[..., DataSource], name: str, options: dict[str, Any], like: Any = None) -> DataSource:
    """Call with options, or say which the source has."""
    parameters = inspect.signature(like or function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "note"]
    for option in options:
        if option not in known:
            raise ConfigError(
                "there is no such option",
                where=f"data ({name})",
                found=repr(option),
                wanted=f"one of {', '.join(known)}" if known else "none",
                remedy=did_you_mean(option, known),
            )
    return function(**options)


def _parts(spec: Mapping[str, Any], **options: Any) -> DataSource:
    splits = {split_name(name) or name: as_split(part) for name, part in spec.items()}
    return complete(_name_of(spec.get("train")), {n: splits[n] for n in SPLITS if n in splits}, **options)


def _name_of(data: Any) -> str:
    data = getattr(data, "dataset", data)
    return "tensors" if isinstance(data, (Tensor, tuple, list)) else type(data).__name__


def _imported(spec: str, options: dict[str, Any]) -> DataSource:
    module, _, attribute = spec.partition(":")
    try:
        with current_folder_on_path():
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
            made = found(**options) if callable(found) else found
    except LimbeckError:
        raise
    except ModuleNotFoundError as error:
        raise DataError(f"there is no module {error.name!r}", where=spec, remedy="check PYTHONPATH") from error
    except Exception as error:  # the user's code: whatever it raises, the message says where it came from
        raise DataError(f"it raised {type(error).__name__}: {error}", where=spec) from error
    if isinstance(made, str):
        raise DataError("it returned a string", where=spec, found=repr(made), wanted=_KINDS)
    return load_source(made)
