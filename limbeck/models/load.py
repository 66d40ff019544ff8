"""Models by a short text: limbeck's zoo, any callable, transformers, timm, torchvision, or a module as it is."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.errors import ModelError, did_you_mean
from limbeck.core.importing import current_folder_on_path
from limbeck.models import zoo
from limbeck.models.heads import HeadSpec, put_head
from limbeck.models.libraries import build, from_timm, from_torchvision, from_transformers, new_transformers
from limbeck.models.weights import load_weights

Spec = str | os.PathLike[str] | nn.Module
_KINDS = (
    "a zoo name, package.module:callable, a folder with config.json, hf:NAME, transformers:TYPE, timm:NAME "
    "or torchvision:NAME"
)


def load_model(
    spec: Spec,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    in_features: int | None = None,
    vocabulary: int | None = None,
    marks: Mapping[str, int | None] | None = None,
    weights: str | os.PathLike[str] | None = None,
    auto: str | None = None,
    pretrained: bool | None = None,
    head: HeadSpec | None = None,
    **options: Any,
) -> nn.Module:
    """Build or load a model.

    ==============================  ====================================================================================
    spec                            gives
    ==============================  ====================================================================================
    ``"resnet20"``                  limbeck's zoo, see :func:`limbeck.models.create`
    ``"package.module:callable"``   what the callable returns, given ``options`` (and ``num_classes``, ``in_channels``,
                                    ``image_size``, ``in_features``, ``vocabulary`` where its signature has them); or
                                    the module of that name itself
    a folder with ``config.json``   a transformers model; the class is that of the configuration, or ``auto``
    ``"hf:NAME"``                   the same from the Hugging Face Hub or its local cache
    ``"transformers:TYPE"``         a new transformers model of this type (``llama``, ``vit``), its configuration's
                                    values in ``options``
    ``"timm:NAME"``                 ``timm.create_model``
    ``"torchvision:NAME"``          ``torchvision.models.get_model``
    an ``nn.Module``                that module
    ==============================  ====================================================================================

    Args:
        spec: Which model, see above.
        num_classes: Number of logits; ``None`` leaves the source's own default.
        in_channels: Channels of an image; ``None`` leaves the source's own default.
        image_size: Height of an image, for models that must know it.
        in_features: Length of a feature vector, for models that take such.
        vocabulary: Number of token ids, for models of texts that must know it.
        marks: Ids of the tokens that begin, end and fill up a text (``bos``, ``eos``, ``pad``), for models that write.
        weights: File or folder for :func:`load_weights`, read strictly; of the model with its head or without it.
        auto: A transformers class such as ``"AutoModelForImageClassification"``; a new model that is told a vocabulary
            and no classes is an ``AutoModelForCausalLM``.
        pretrained: Start from the source's own weights; default yes for transformers, no for timm and torchvision.
        head: Another head in the place of the last linear layer, see :func:`limbeck.models.put_head`. Which layer that
            is, no example tells here: it is the last registered, unless ``{NAME: {layer: ...}}`` says which.
        options: Handed on to the builder.

    Raises:
        ModelError: The model cannot be found or built, or the weights do not fit.
        MissingExtra: timm, torchvision or transformers is not installed.

    Example:
        >>> import torch
        >>> load_model("torch.nn:Linear", in_features=4, out_features=2)(torch.zeros(1, 4)).shape
        torch.Size([1, 2])
    """
    sizes = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "image_size": image_size,
        "in_features": in_features,
        "vocabulary": vocabulary,
    }
    given = {key: value for key, value in sizes.items() if value is not None}
    name = spec if isinstance(spec, nn.Module) else os.fspath(spec)
    if isinstance(name, nn.Module):
        model = name
        _refuse("an nn.Module", options, auto=auto, pretrained=pretrained)
    elif name.startswith("timm:"):
        _refuse(name, {}, auto=auto)
        model = from_timm(name.removeprefix("timm:"), given, bool(pretrained), options)
    elif name.startswith("torchvision:"):
        _refuse(name, {}, auto=auto)
        model = from_torchvision(name.removeprefix("torchvision:"), given, bool(pretrained), options)
    elif name.startswith("hf:"):
        model = from_transformers(name.removeprefix("hf:"), given, auto, pretrained is not False, options)
    elif name.startswith("transformers:"):
        _refuse(name, {}, pretrained=pretrained)
        model = new_transformers(name.removeprefix("transformers:"), {**given, **(marks or {})}, auto, options)
    elif isinstance(spec, str) and zoo.is_known(name):
        _refuse(name, {}, auto=auto, pretrained=pretrained)
        model = zoo.create(name, **given, **options)
    elif Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            remedy = "to read weights, name the model and give the folder as its weights"
            raise ModelError("no transformers model: this folder has no config.json", where=name, remedy=remedy)
        model = from_transformers(name, given, auto, pretrained is not False, options)
    elif ":" in name:
        _refuse(name, {}, auto=auto, pretrained=pretrained)
        model = _callable(name, given, options)
    else:
        remedy = did_you_mean(name, zoo.available()) or "the zoo has: " + ", ".join(zoo.available())
        raise ModelError("no such model", where="model", found=repr(name), wanted=_KINDS, remedy=remedy)
    with_head(model, head, weights)
    return model


def with_head(
    model: nn.Module,
    head: HeadSpec | None,
    weights: str | os.PathLike[str] | None = None,
    *,
    example: Any = None,
    teacher: Any = None,
) -> None:
    """Put a head on a model and read its weights: those of the whole, or else of the model before it had the head.

    Args:
        model: Changed in place.
        head: See :func:`limbeck.models.put_head`.
        weights: File or folder.
        example: Inputs, or a ``Batch``.
        teacher: Whose classifier may be reused.
    """
    if weights is not None and head is not None:
        try:
            load_weights(model, weights)
            weights = None
        except ModelError:  # perhaps they are those of the model with its head
            pass
    if head is not None:
        put_head(model, head, example=example, teacher=teacher)
    if weights is not None:
        load_weights(model, weights)


def _refuse(name: str, options: dict[str, Any], **others: Any) -> None:
    """Options that would have no effect are a mistake of the caller."""
    unused = [*options, *(key for key, value in others.items() if value is not None)]
    if unused:
        raise ModelError(f"{name} takes no {', '.join(unused)}", where="model", remedy="drop them")


def _callable(name: str, given: dict[str, int], options: dict[str, Any]) -> nn.Module:
    path, _, attribute = name.partition(":")
    try:
        with current_folder_on_path():
            found: Any = importlib.import_module(path)
            for part in attribute.split("."):
                found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise ModelError(f"there is no module {error.name!r}", where=name, remedy="check PYTHONPATH") from error
    except AttributeError as error:
        remedy = did_you_mean(attribute, dir(found))
        raise ModelError(f"{path!r} has no {attribute!r}", where=name, remedy=remedy) from error
    except Exception as error:
        raise ModelError(f"importing it raised {type(error).__name__}: {error}", where=name) from error
    if isinstance(found, nn.Module):
        _refuse(name, options)
        return found
    if not callable(found):
        raise ModelError("this is no callable", where=name, found=type(found).__name__, wanted="a class or a function")
    model = build(name, lambda: found(**_accepted(found, given), **options))
    if not isinstance(model, nn.Module):
        raise ModelError("it returned no model", where=name, found=type(model).__name__, wanted="an nn.Module")
    return model


def _accepted(function: Any, given: dict[str, int]) -> dict[str, int]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C, says nothing about itself
        return {}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {key: value for key, value in given.items() if key in parameters or (anything and key == "in_features")}
