"""Models of other libraries: transformers, timm and torchvision, each imported only when asked for."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.errors import LimbeckError, MissingExtra, ModelError, did_you_mean

logger = logging.getLogger(__name__)


def from_timm(name: str, given: dict[str, int], pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """``timm.create_model``, with limbeck's names for classes and channels."""
    timm = _optional("timm", "timm")
    names = {"num_classes": "num_classes", "in_channels": "in_chans"}
    options = {**{names[key]: value for key, value in given.items() if key in names}, **options}
    return build(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained, **options))


def from_torchvision(name: str, given: dict[str, int], pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """``torchvision.models.get_model``; its models take images of three channels."""
    models = _optional("torchvision.models", "torchvision")
    where = f"torchvision:{name}"
    if given.get("in_channels", 3) != 3:
        raise ModelError("torchvision's models take three channels", where=where, found=given["in_channels"])
    if "num_classes" in given:
        options = {"num_classes": given["num_classes"], **options}
    weights = "DEFAULT" if pretrained else None
    return build(where, lambda: models.get_model(name, weights=weights, **options))


def from_transformers(
    name: str, given: dict[str, int], auto: str | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    """A transformers model from a folder or the Hub, safetensors only, and never with code that comes with the weights.

    With ``num_classes`` other than the folder's, a classification model gets a new last layer. Otherwise weights that
    are missing are an error, where transformers would only warn and draw them at random.
    """
    transformers = _optional("transformers", "language")
    if "trust_remote_code" in options:
        remedy = "build the model yourself and hand it over"
        raise ModelError("limbeck runs no code that comes with weights", where="trust_remote_code", remedy=remedy)
    source = {"trust_remote_code": False, "local_files_only": Path(name).is_dir()}
    read = transformers.AutoConfig.from_pretrained
    config, rest = build(name, lambda: read(name, return_unused_kwargs=True, **source, **options))
    rest = {key: value for key, value in rest.items() if key not in source}
    class_name = auto or next(iter(config.architectures or ()), "AutoModel")
    model_class = _class_of(class_name)
    classes = given.get("num_classes")
    new_head = classes is not None and "Classification" in class_name and classes != config.num_labels
    if new_head:
        config.num_labels = classes
    if not pretrained:
        return build(name, lambda: _maker(model_class, class_name)(config, **rest))
    source |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with _quiet(transformers):
        model, info = build(name, lambda: model_class.from_pretrained(name, config=config, **source, **rest))
    other = {key: list(now) for key, _, now in info["mismatched_keys"]}
    missing = sorted(key for key in info["missing_keys"] if key not in other)
    head = new_head and all(shape[0] == classes for shape in other.values())
    if (other and not head) or (missing and auto is None and not new_head):
        kind = "of another shape" if other and not head else "missing"
        keys = ", ".join((sorted(other) if other and not head else missing)[:5])
        raise ModelError(f"these weights do not fit {class_name}", where=name, found=f"{kind}: {keys}")
    if other or missing:
        logger.warning("%s: %s start at random, the weights have none", name, ", ".join([*sorted(other), *missing]))
    return model


#: What a configuration calls the sizes and marks that data tell; it is told of those that it knows.
_SIZES = {
    "num_classes": "num_labels",
    "in_channels": "num_channels",
    "image_size": "image_size",
    "vocabulary": "vocab_size",
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "pad": "pad_token_id",
}


def new_transformers(kind: str, given: dict[str, Any], auto: str | None, options: dict[str, Any]) -> nn.Module:
    """A transformers model of this type with random weights; what its configuration does not know is refused."""
    transformers, where = _optional("transformers", "language"), f"transformers:{kind}"
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if kind not in known:
        raise ModelError("transformers knows no such type", where="model", found=kind, remedy=did_you_mean(kind, known))
    usual = build(where, lambda: transformers.AutoConfig.for_model(kind)).to_dict()
    for name in options:
        if name not in usual:
            remedy = did_you_mean(name, usual)
            raise ModelError("this configuration has no such value", where=where, found=name, remedy=remedy)
    sizes = {_SIZES[name]: value for name, value in given.items() if name in _SIZES}
    sizes = {name: value for name, value in sizes.items() if name in usual or name == "num_labels"}
    config = build(where, lambda: transformers.AutoConfig.for_model(kind, **{**sizes, **options}))
    if auto is None:
        classes, texts = "num_classes" in given, "vocabulary" in given
        auto = "AutoModelForSequenceClassification" if texts and classes else "AutoModelForImageClassification"
        auto = auto if classes else "AutoModelForCausalLM" if texts else "AutoModel"
    return build(where, lambda: _maker(_class_of(auto), auto)(config))


def _class_of(name: str) -> Any:
    """A class of transformers that makes models."""
    transformers = _optional("transformers", "language")
    found: Any = getattr(transformers, name, None)
    if found is None or not (
        name.startswith("AutoModel") or (isinstance(found, type) and issubclass(found, nn.Module))
    ):
        remedy = did_you_mean(name, dir(transformers)) or "give auto='AutoModelFor...'"
        raise ModelError("transformers has no such model class", where="auto", found=name, remedy=remedy)
    return found


def _maker(found: Any, name: str) -> Callable[..., Any]:
    """What makes a model of this class from its configuration."""
    return found.from_config if name.startswith("AutoModel") else found


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and tables on the screen while it loads; what they would say is checked here."""
    logging_ = transformers.utils.logging
    verbosity, bar = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    logging_.set_verbosity_error()
    logging_.disable_progress_bar()
    try:
        yield
    finally:
        logging_.set_verbosity(verbosity)
        if bar:
            logging_.enable_progress_bar()


def build(name: str, call: Callable[[], Any]) -> Any:
    """Call a builder that is not limbeck's; whatever it raises is about what it was asked for."""
    try:
        return call()
    except LimbeckError:
        raise
    except Exception as error:
        first = "".join(str(error).strip().splitlines()[:1])
        raise ModelError(f"building it raised {type(error).__name__}: {first}", where=name) from error


def _optional(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtra(package.partition(".")[0], extra=extra) from error
