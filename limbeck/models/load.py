"""Models by a short text: limbeck's zoo, any callable, transformers, timm, torchvision, or a module as it is."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.errors import LimbeckError, MissingExtra, ModelError, did_you_mean
from limbeck.models import zoo
from limbeck.models.weights import load_weights

Spec = str | os.PathLike[str] | nn.Module
_KINDS = "a zoo name, package.module:callable, a folder with config.json, hf:NAME, timm:NAME or torchvision:NAME"


def load_model(
    spec: Spec,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    auto: str | None = None,
    pretrained: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Build or load a model.

    ==============================  ====================================================================================
    spec                            gives
    ==============================  ====================================================================================
    ``"resnet20"``                  limbeck's zoo, see :func:`limbeck.models.create`
    ``"package.module:callable"``   what the callable returns, given ``options`` (and ``num_classes``, ``in_channels``,
                                    ``image_size`` where its signature has them); or the module of that name itself
    a folder with ``config.json``   a transformers model; the class is that of the configuration, or ``auto``
    ``"hf:NAME"``                   the same from the Hugging Face Hub or its local cache
    ``"timm:NAME"``                 ``timm.create_model``
    ``"torchvision:NAME"``          ``torchvision.models.get_model``
    an ``nn.Module``                that module
    ==============================  ====================================================================================

    Args:
        spec: Which model, see above.
        num_classes: Number of logits; ``None`` leaves the source's own default.
        in_channels: Channels of an image; ``None`` leaves the source's own default.
        image_size: Height of an image, for models that must know it.
        weights: File or folder for :func:`load_weights`, read strictly.
        auto: A transformers class such as ``"AutoModelForImageClassification"``.
        pretrained: Start from the source's own weights; default yes for transformers, no for timm and torchvision.
        options: Handed on to the builder.

    Raises:
        ModelError: The model cannot be found or built, or the weights do not fit.
        MissingExtra: timm, torchvision or transformers is not installed.

    Example:
        >>> import torch
        >>> load_model("torch.nn:Linear", in_features=4, out_features=2)(torch.zeros(1, 4)).shape
        torch.Size([1, 2])
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    given = {key: value for key, value in sizes.items() if value is not None}
    name = spec if isinstance(spec, nn.Module) else os.fspath(spec)
    if isinstance(name, nn.Module):
        model = name
        _refuse("an nn.Module", options, auto=auto, pretrained=pretrained)
    elif name.startswith("timm:"):
        model = _timm(name.removeprefix("timm:"), given, bool(pretrained), options)
    elif name.startswith("torchvision:"):
        model = _torchvision(name.removeprefix("torchvision:"), given, bool(pretrained), options)
    elif name.startswith("hf:"):
        model = _transformers(name.removeprefix("hf:"), given, auto, pretrained is not False, options)
    elif isinstance(spec, str) and zoo.is_known(name):
        _refuse(name, {}, auto=auto, pretrained=pretrained)
        model = zoo.create(name, **given, **options)
    elif Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            remedy = "to read weights, name the model and give the folder as its weights"
            raise ModelError("no transformers model: this folder has no config.json", where=name, remedy=remedy)
        model = _transformers(name, given, auto, pretrained is not False, options)
    elif ":" in name:
        _refuse(name, {}, auto=auto, pretrained=pretrained)
        model = _callable(name, given, options)
    else:
        remedy = did_you_mean(name, zoo.available()) or "the zoo has: " + ", ".join(zoo.available())
        raise ModelError("no such model", where="model", found=repr(name), wanted=_KINDS, remedy=remedy)
    if weights is not None:
        load_weights(model, weights)
    return model


def _refuse(name: str, options: dict[str, Any], **others: Any) -> None:
    """Options that would have no effect are a mistake of the caller."""
    unused = [*options, *(key for key, value in others.items() if value is not None)]
    if unused:
        raise ModelError(f"{name} takes no {', '.join(unused)}", where="model", remedy="drop them")


def _callable(name: str, given: dict[str, int], options: dict[str, Any]) -> nn.Module:
    path, _, attribute = name.partition(":")
    here = os.getcwd()
    added = here not in sys.path  # an installed command does not look in the folder it was called in
    if added:
        sys.path.insert(0, here)
    try:
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
    finally:
        if added:
            sys.path.remove(here)
    if isinstance(found, nn.Module):
        _refuse(name, options)
        return found
    if not callable(found):
        raise ModelError("this is no callable", where=name, found=type(found).__name__, wanted="a class or a function")
    model = _build(name, lambda: found(**_accepted(found, given), **options))
    if not isinstance(model, nn.Module):
        raise ModelError("it returned no model", where=name, found=type(model).__name__, wanted="an nn.Module")
    return model


def _accepted(function: Any, given: dict[str, int]) -> dict[str, int]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C, says nothing about itself
        return {}
    return {key: value for key, value in given.items() if key in parameters}


def _build(name: str, call: Any) -> Any:
    """Call a builder that is not ours; whatever it raises is about the arguments it was given."""
    try:
        return call()
    except LimbeckError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise ModelError(f"building it raised {type(error).__name__}: {''.join(first)}", where=name) from error


def _optional(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtra(package, extra=extra) from error


def _timm(name: str, given: dict[str, int], pretrained: bool, options: dict[str, Any]) -> nn.Module:
    timm = _optional("timm", "vision")
    if "in_channels" in given:
        options = {"in_chans": given["in_channels"], **options}
    if "num_classes" in given:
        options = {"num_classes": given["num_classes"], **options}
    return _build(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained, **options))


def _torchvision(name: str, given: dict[str, int], pretrained: bool, options: dict[str, Any]) -> nn.Module:
    models = _optional("torchvision.models", "vision")
    if "num_classes" in given:
        options = {"num_classes": given["num_classes"], **options}
    weights = "DEFAULT" if pretrained else None
    return _build(f"torchvision:{name}", lambda: models.get_model(name, weights=weights, **options))


def _transformers(
    name: str, given: dict[str, int], auto: str | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    transformers = _optional("transformers", "language")
    local = Path(name).is_dir()
    config = _build(name, lambda: transformers.AutoConfig.from_pretrained(name, local_files_only=local))
    class_name = auto or next(iter(config.architectures or ()), "AutoModel")
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        near = did_you_mean(class_name, dir(transformers))
        remedy = near or "give auto='AutoModelFor...'"
        raise ModelError("transformers has no such class", where="auto", found=class_name, remedy=remedy)
    classes = given.get("num_classes")
    new_head = classes is not None and "Classification" in class_name and classes != config.num_labels
    if new_head:
        config.num_labels = classes
    for key, value in options.items():
        if not hasattr(config, key):
            near = did_you_mean(key, config.to_dict())
            raise ModelError("no such entry in the model's configuration", where=f"{name}.{key}", remedy=near)
        setattr(config, key, value)
    if not pretrained:
        make = model_class.from_config if class_name.startswith("Auto") else model_class
        return _build(name, lambda: make(config))
    return _build(
        name,
        lambda: model_class.from_pretrained(
            name, config=config, local_files_only=local, use_safetensors=True, ignore_mismatched_sizes=new_head
        ),
    )
