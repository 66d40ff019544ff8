"""transformers' side of surgery: configurations with other numbers, and models of them without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import MissingExtra, ModelError


def check_teacher(teacher: Any) -> None:
    """Refuse what is no transformers model, or one whose weights are not plain numbers."""
    if not isinstance(teacher, library().PreTrainedModel):
        raise ModelError(
            "only transformers models are cut",
            where="teacher",
            found=type(teacher).__name__,
            wanted="a transformers.PreTrainedModel",
            remedy="load it with load_model('hf:NAME'); merge adapters into it first",
        )
    if getattr(teacher, "is_quantized", False) or not all(p.is_floating_point() for p in teacher.parameters()):
        raise ModelError(
            "quantized weights cannot be cut", where="teacher", remedy="load the model in float32 or bfloat16"
        )


def configure(config: Any, changes: Mapping[str, Any]) -> Any:
    """A configuration of the same class with some values changed.

    Raises:
        ModelError: The family refuses these values.
    """
    try:
        return type(config).from_dict({**config.to_dict(), **changes})
    except Exception as error:  # each family has its own
        reason = str(error).strip().splitlines()[-1].strip()
        told = ", ".join(f"{key}={value}" for key, value in changes.items() if isinstance(value, int))
        raise ModelError(f"{config.model_type!r} refuses this size: {reason}", where="config", found=told) from error


def bare(teacher: Any, config: Any) -> nn.Module:
    """A model of the teacher's class on the meta device, which takes no memory.

    Raises:
        ModelError: The class cannot be built from this configuration.
    """
    try:
        with quiet(), undrawn(), torch.device("meta"):
            model = type(teacher)(config)
            model.tie_weights()  # which goes with the drawing of weights otherwise
            return model
    except Exception as error:  # each family has its own
        reason = "".join(str(error).strip().splitlines()[-1:])
        raise ModelError(f"{type(teacher).__name__} cannot be built: {reason}", where="config") from error


def skeleton(teacher: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of such a model, by name."""
    return {name: tuple(tensor.shape) for name, tensor in bare(teacher, config).state_dict().items()}


def fresh(teacher: Any, config: Any) -> Any:
    """A model of the teacher's class, precision and device whose weights are whatever memory held.

    Raises:
        ModelError: The class cannot be built from this configuration.
    """
    attention = getattr(teacher.config, "_attn_implementation", None)
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with quiet(), undrawn():
            model = type(teacher)._from_config(config, dtype=teacher.dtype, **options)
            model.tie_weights()
    except Exception as error:  # each family has its own
        reason = "".join(str(error).strip().splitlines()[-1:])
        raise ModelError(f"{type(teacher).__name__} cannot be built: {reason}", where="config") from error
    return model.to(teacher.device).eval()


def library() -> Any:
    """The package transformers, or the error that tells how to get it."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", extra="language") from error
    return transformers


def undrawn() -> Any:
    """A context in which models are built without drawing weights."""
    library()
    five = find_spec("transformers.initialization") is not None  # from transformers 5 on
    home = "initialization" if five else "modeling_utils"
    return import_module(f"transformers.{home}").no_init_weights()


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks: skeletons are not worth them."""
    logging = library().utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
